"""MomentumTeacher: an exponential moving average of the student that is never trained, only followed."""

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from syncmask.masks import hidden_positions
from syncmask.scores import attention_scores


@dataclass
class TeacherOutput:
    """What one pass of the teacher over the unmasked pairs tells.

    Args:
        image_embeds: (B, prefix + N, Dv), text_embeds: (B, L, D), the towers' tokens.
        image_feats, text_feats: (B, P), projected, unit length, fp32.
        scores: (B, H, L, N), raw cross-attention scores of one fusion layer, fp32; None where no layer is asked for.
        temperature: (1,), the teacher's own average of the ITC temperature.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    image_feats: torch.Tensor
    text_feats: torch.Tensor
    scores: torch.Tensor | None
    temperature: torch.Tensor


class MomentumTeacher:
    """Holds the averaged copy: eval mode, frozen, always without gradient.

    One pass serves ITC's soft targets, the masks and the choice of negatives. The whole model is averaged (heads
    included), so that evaluation can ask the teacher everything it asks the student.

    Args:
        student: the model to follow; copied.
        momentum: m in teacher = m * teacher + (1 - m) * student, once an optimiser step.
        layer: index of the fusion layer whose scores are returned; None = no scores.
    """

    def __init__(self, student: PreTrainedModel, momentum: float, layer: int | None):
        self.model = copy.deepcopy(student)
        self.momentum = momentum
        self.layer = layer
        self.freeze()

    def freeze(self):
        """Eval mode and no gradient; needed again after loading, which thaws parameters."""
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> TeacherOutput:
        """Look at unmasked pairs: pixel_values (B, 3, S, S), input_ids and attention_mask (B, L)."""
        base = self.model.syncmask
        image_embeds = base.encode_image(batch["pixel_values"])
        text_embeds = base.encode_text(batch["input_ids"], batch["attention_mask"])
        scores = None
        if self.layer is not None:
            scores = attention_scores(base, image_embeds, text_embeds, batch["attention_mask"], self.layer)
        return TeacherOutput(
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            image_feats=base.project_image(image_embeds).float(),
            text_feats=base.project_text(text_embeds, batch["attention_mask"]).float(),
            scores=scores,
            temperature=base.temperature.float(),
        )

    @torch.no_grad()
    def hidden_words(self, masked_input_ids, attention_mask, text_mask, image_embeds) -> torch.Tensor:
        """Read masked texts (B, L) with their photos' tokens: logits (M, V) at the M hidden tokens, row by row."""
        positions, real = hidden_positions(text_mask)
        texts = self.model.syncmask.encode_text(masked_input_ids, attention_mask)
        return self.model.mlm_logits(texts, attention_mask, image_embeds, positions)[real]

    @torch.no_grad()
    def update(self, student: PreTrainedModel):
        """Follow the student by one optimiser step, matching by name.

        Raises:
            ValueError: when the two no longer have the same parameters.
        """
        mine, theirs = dict(self.model.named_parameters()), dict(student.named_parameters())
        if mine.keys() != theirs.keys():
            raise ValueError(
                f"teacher and student differ in {sorted(mine.keys() ^ theirs.keys())}; build a new teacher."
            )
        averages = [parameter.data for parameter in mine.values()]
        torch._foreach_lerp_(averages, [theirs[name].data for name in mine], 1 - self.momentum)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(student.get_buffer(name))
