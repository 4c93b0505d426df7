"""One pretraining step with ALBEF's losses in the plain form of the published code: what ours is timed against.

FROZEN: written once from the definition, never tuned and never touched again, or older figures would mean
something else. Plain means: eager attention that forms every score matrix, the photo repeated for every text that sees
it, the positives, the negatives and the masked texts each in a pass of their own, the vocabulary head on all positions,
dropout in the teacher's passes too, AdamW and the moving average parameter by parameter. There is no queue: both sides
contrast the batch alone.

It works on a `SyncMaskForPreTraining`'s own weights, so that losses and gradients of the two can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass
class StepInputs:
    """What a step is given, so that two implementations can be given the same.

    Attributes:
        pixel_values: (B, 3, S, S). input_ids, masked_input_ids: (B, L). attention_mask: (B, L).
        text_mask: (B, L) bool, True = hidden.
        negative_image_index, negative_text_index: (B,), rows of the batch that do not match.
    """

    pixel_values: Tensor
    input_ids: Tensor
    masked_input_ids: Tensor
    attention_mask: Tensor
    text_mask: Tensor
    negative_image_index: Tensor
    negative_text_index: Tensor


class PlainStep:
    """Student and teacher as two tables of tensors.

    Args:
        model: a `SyncMaskForPreTraining` with ViT and BERT towers; its weights are copied.
        dropout: of hidden states and attention weights of the text's layers (BERT's .1), 0 for comparisons.
        soft_target_weight: the teacher's share in ITC's and MLM's targets.
        learning_rate, momentum: of AdamW, and of the teacher.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dropout: float = 0.1,
        soft_target_weight: float = 0.4,
        learning_rate: float = 1e-4,
        momentum: float = 0.995,
    ):
        self.config, self.dropout, self.alpha, self.momentum = model.config, dropout, soft_target_weight, momentum
        names = {name: value for name, value in model.named_parameters() if not name.startswith("mim_decoder.")}
        self.student = {name: value.detach().clone().requires_grad_() for name, value in names.items()}
        self.teacher = {name: value.detach().clone() for name, value in names.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.student.values()), lr=learning_rate, weight_decay=0.02, foreach=False, fused=False
        )

    def step(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Losses, backward, optimiser, moving average; returns the losses."""
        losses = self.losses(inputs)
        sum(losses.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, average in self.teacher.items():
                average.copy_(average * self.momentum + self.student[name] * (1 - self.momentum))
        return losses

    def losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        """ITC, ITM and MLM, unweighted."""
        student, teacher = self.student, self.teacher
        image, text = self.image(student, inputs.pixel_values), self.text(student, inputs.input_ids, inputs)
        image_feats, text_feats = self.project(student, "vision", image), self.project(student, "text", text)
        with torch.no_grad():
            image_t, text_t = self.image(teacher, inputs.pixel_values), self.text(teacher, inputs.input_ids, inputs)
            image_feats_t = self.project(teacher, "vision", image_t)
            text_feats_t = self.project(teacher, "text", text_t)
            similarity_t = image_feats_t @ text_feats_t.T / self.temperature(teacher)
            targets = torch.eye(len(image))
            image_targets = self.alpha * similarity_t.softmax(-1) + (1 - self.alpha) * targets
            text_targets = self.alpha * similarity_t.T.softmax(-1) + (1 - self.alpha) * targets
        similarity = image_feats @ text_feats.T / self.temperature(student)
        by_image = -(F.log_softmax(similarity, -1) * image_targets).sum(-1).mean()
        by_text = -(F.log_softmax(similarity.T, -1) * text_targets).sum(-1).mean()
        itm, mlm = self.matching(image, text, inputs), self.masked_words(image, image_t, inputs)
        return {"itc": (by_image + by_text) / 2, "itm": itm, "mlm": mlm}

    def matching(self, image: Tensor, text: Tensor, inputs: StepInputs) -> Tensor:
        """The pairs in one pass, both kinds of negatives in a second one."""
        mask, other_image, other_text = inputs.attention_mask, inputs.negative_image_index, inputs.negative_text_index
        positive = self.fuse(self.student, text, mask, image)[:, 0]
        texts, masks = torch.cat([text, text[other_text]]), torch.cat([mask, mask[other_text]])
        negative = self.fuse(self.student, texts, masks, torch.cat([image[other_image], image]))[:, 0]
        logits = linear(self.student, "itm_head", torch.cat([positive, negative]))
        labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
        return F.cross_entropy(logits, labels)

    def masked_words(self, image: Tensor, image_t: Tensor, inputs: StepInputs) -> Tensor:
        """Student and teacher read the masked text; logits at all positions."""
        labels = inputs.input_ids.masked_fill(~inputs.text_mask, -100)
        logits = self.vocabulary(self.student, self.read_masked(self.student, image, inputs))
        with torch.no_grad():
            soft = self.vocabulary(self.teacher, self.read_masked(self.teacher, image_t, inputs)).softmax(-1)
        hard_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        soft_loss = -(F.log_softmax(logits, -1) * soft).sum(-1)[inputs.text_mask].mean()
        return (1 - self.alpha) * hard_loss + self.alpha * soft_loss

    def read_masked(self, w: Weights, image: Tensor, inputs: StepInputs) -> Tensor:
        """(B, L, D) of the masked texts fused with their photos."""
        return self.fuse(w, self.text(w, inputs.masked_input_ids, inputs), inputs.attention_mask, image)

    # ------------------------------------------------------------------------------------------------------- layers

    def image(self, w: Weights, pixel_values: Tensor) -> Tensor:
        """ViT, pre-norm: (B, 3, S, S) -> (B, 1 + N, Dv)."""
        at, vision = "syncmask.vision_model", self.config.vision_config
        patch = f"{at}.embeddings.patch_embeddings.projection"
        x = F.conv2d(pixel_values, w[f"{patch}.weight"], w[f"{patch}.bias"], stride=vision.patch_size)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w[f"{at}.embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + w[f"{at}.embeddings.position_embeddings"]
        for layer in range(vision.num_hidden_layers):
            here = f"{at}.layers.{layer}"
            y = norm(w, f"{here}.layernorm_before", x, vision.layer_norm_eps)
            names = [f"{here}.attention.{part}_proj" for part in "qkvo"]
            x = x + attend(w, names, y, y, vision.num_attention_heads, None, 0.0)
            y = norm(w, f"{here}.layernorm_after", x, vision.layer_norm_eps)
            x = x + linear(w, f"{here}.mlp.fc2", F.gelu(linear(w, f"{here}.mlp.fc1", y)))
        return norm(w, f"{at}.layernorm", x, vision.layer_norm_eps)

    def text(self, w: Weights, input_ids: Tensor, inputs: StepInputs) -> Tensor:
        """BERT's lower layers, post-norm: (B, L) -> (B, L, D)."""
        at, text = "syncmask.text_model", self.config.text_config
        tables = [f"{at}.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
        x = w[tables[0]][input_ids] + w[tables[1]][: input_ids.shape[1]] + w[tables[2]][0]
        x = F.dropout(norm(w, f"{at}.embeddings.LayerNorm", x, text.layer_norm_eps), self.dropout)
        for layer in range(text.num_hidden_layers):
            here = f"{at}.encoder.layer.{layer}"
            names = [f"{here}.attention.self.{part}" for part in ("query", "key", "value")]
            names.append(f"{here}.attention.output.dense")
            y = attend(w, names, x, x, text.num_attention_heads, inputs.attention_mask, self.dropout)
            x = norm(w, f"{here}.attention.output.LayerNorm", x + F.dropout(y, self.dropout), text.layer_norm_eps)
            y = linear(w, f"{here}.output.dense", F.gelu(linear(w, f"{here}.intermediate.dense", x)))
            x = norm(w, f"{here}.output.LayerNorm", x + F.dropout(y, self.dropout), text.layer_norm_eps)
        return x

    def fuse(self, w: Weights, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Texts (R, L, D) attend to themselves and to a photo a row (R, M, Dv): (R, L, D)."""
        fusion = self.config.fusion_encoder_config
        for layer in range(fusion.num_hidden_layers):
            here = f"syncmask.fusion_encoder.layers.{layer}"
            for kind, context, seen in (("self", x, mask), ("cross", image, None)):
                names = [f"{here}.{kind}_attention.{part}" for part in ("query", "key", "value")]
                names.append(f"{here}.{kind}_output")
                y = attend(w, names, x, context, fusion.num_attention_heads, seen, self.dropout)
                x = norm(w, f"{here}.{kind}_norm", x + F.dropout(y, self.dropout), fusion.layer_norm_eps)
            y = linear(w, f"{here}.output", F.gelu(linear(w, f"{here}.intermediate", x)))
            x = norm(w, f"{here}.output_norm", x + F.dropout(y, self.dropout), fusion.layer_norm_eps)
        return x

    def vocabulary(self, w: Weights, fused: Tensor) -> Tensor:
        """BERT's MLM head, tied to the word embeddings: (B, L, D) -> (B, L, V)."""
        hidden = F.gelu(linear(w, "mlm_head.dense", fused))
        hidden = norm(w, "mlm_head.norm", hidden, self.config.fusion_encoder_config.layer_norm_eps)
        return F.linear(hidden, w["syncmask.text_model.embeddings.word_embeddings.weight"], w["mlm_head.decoder.bias"])

    def project(self, w: Weights, side: str, states: Tensor) -> Tensor:
        """[CLS] (B, ., D) at unit length in the shared space: (B, P)."""
        return F.normalize(linear(w, f"syncmask.{side}_projection", states[:, 0]), dim=-1)

    def temperature(self, w: Weights) -> Tensor:
        """Between .001 and .5, log-linear in a sigmoid."""
        low, high = torch.tensor(0.001).log(), torch.tensor(0.5).log()
        return (low + (high - low) * w["syncmask.temperature_logit"].sigmoid()).exp()


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """Multiply and add: x W' + b."""
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(
    w: Weights, names: list[str], x: Tensor, context: Tensor, heads: int, mask: Tensor | None, dropout: float
) -> Tensor:
    """Multi-head attention of x (R, L, D) to context (R, M, E) with its score matrices formed: (R, L, D)."""
    query, key, value = (
        linear(w, name, source).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name, source in zip(names, (x, context, context))
    )
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None, :]) * -10_000.0
    weights = F.dropout(scores.softmax(-1), dropout)
    return linear(w, names[3], (weights @ value).transpose(1, 2).flatten(2))
