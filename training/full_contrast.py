"""ITC over all micro batches of a step as if they were one: all features first, then a forward and backward for each.

ITC needs the features of all rows, but of no row's activations more than what its own micro batch holds: once the
gradient of the loss is known for each feature, a micro batch can be computed anew and sent backward alone. The price is
one more forward of the towers, without gradient.

Source: gradient caching, Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv 2101.06983). Ours: a stand-in for the loss that has its value too, so that nothing else in a step need know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncmask.inputs import text_first
from syncmask.modeling_pairs import SyncMaskPairModel, Teacher
from syncmask.modeling_syncmask import SyncMaskModel

from .task import Look


@dataclass
class Glance:
    """What is kept of a micro batch from the first pass to its forward.

    Args:
        look: the task's, without what is as large as activations.
        seed: of the forward's dropout, in both passes.
        image_feats, text_feats: (B, P) of the student, fp32, without gradient.
    """

    look: Look
    seed: int
    image_feats: Tensor
    text_feats: Tensor

    @classmethod
    def at(cls, base: SyncMaskModel, look: Look) -> Glance:
        """Project the photos and texts that a task has looked at."""
        seed = int(torch.randint(2**63 - 1, ()))
        pixels = look.inputs["pixel_values"]
        names = ("attention_mask", "input_ids", "masked_input_ids")
        mask, ids, masked = text_first(*(look.inputs.get(name) for name in names))
        given = [ids] if masked is None else [ids, masked]
        # Photos first, and masked texts in one batch with the others, as in the models' forward: it draws dropout so.
        with torch.no_grad(), draws(seed, pixels.device):
            images = base.project_image(base.encode_image(pixels))
            tokens = base.encode_text(torch.cat(given), mask.repeat(len(given), 1))
            texts = base.project_text(tokens[: len(ids)], mask)
        return cls(without_activations(look), seed, images.float(), texts.float())


@dataclass
class StandIn:
    """A step's ITC within one of its K micro batches: the loss in value, the micro batch's part of it in gradient.

    Summed over the micro batches and divided by K, as accumulation does, stand-ins have the gradient of the loss.

    Args:
        loss: scalar. image_gradient, text_gradient: (B, P), K times the loss's for these features.
        temperature_gradient: (1,), the loss's for `temperature_logit`.

    Example: a loss of 3 with the gradient .5 for a feature is 3 + .5 f - .5 f, the last term without gradient.
    """

    loss: Tensor
    image_gradient: Tensor
    text_gradient: Tensor
    temperature_gradient: Tensor

    def __call__(self, image_feats: Tensor, text_feats: Tensor, temperature_logit: Tensor) -> Tensor:
        """Return it for features (B, P) that were computed anew, with gradient."""
        slope = (image_feats * self.image_gradient).sum() + (text_feats * self.text_gradient).sum()
        slope = slope + (temperature_logit * self.temperature_gradient).sum()
        return self.loss + (slope - slope.detach())


def contrast_as_one(student: SyncMaskPairModel, glances: list[Glance]) -> list[StandIn]:
    """Contrast the rows of all micro batches and of all processes: a stand-in for each micro batch of this process.

    Args:
        student: whose temperature it is; without wrappers. glances: of the step's micro batches, in order.
    """
    images = torch.cat([glance.image_feats for glance in glances]).requires_grad_()
    texts = torch.cat([glance.text_feats for glance in glances]).requires_grad_()
    inputs = [glance.look.inputs for glance in glances]
    names = ("item_ids", "text_ids", "teacher_image_feats", "teacher_text_feats")
    item_ids, text_ids, *teacher_feats = (torch.cat([one[name] for one in inputs]) for name in names)
    teacher = Teacher(*teacher_feats, inputs[0]["teacher_temperature"], inputs[0]["soft_target_weight"])
    loss = student.contrast(images, texts, item_ids, text_ids, teacher)
    sources = [images, texts, student.syncmask.temperature_logit]
    of_images, of_texts, of_temperature = torch.autograd.grad(loss, sources)
    sizes, count = [len(glance.image_feats) for glance in glances], len(glances)
    parts = zip((count * of_images).split(sizes), (count * of_texts).split(sizes))
    return [StandIn(loss.detach(), *part, of_temperature) for part in parts]


def without_activations(look: Look) -> Look:
    """Drop photos, which come to the device once more, and the teacher's tokens and scores, which masks have used."""
    inputs = {name: value for name, value in look.inputs.items() if name != "pixel_values"}
    return replace(look, inputs=inputs, seen=replace(look.seen, image_embeds=None, text_embeds=None, scores=None))


def split_rows(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Cut a batch into micro batches of `rows` rows, the last of what is left.

    Example:
        >>> split_rows({"row_ids": torch.arange(3)}, 2)
        [{'row_ids': tensor([0, 1])}, {'row_ids': tensor([2])}]
    """
    columns = [tensor.split(rows) for tensor in batch.values()]
    return [dict(zip(batch, parts)) for parts in zip(*columns, strict=True)]


@contextmanager
def draws(seed: int, device: torch.device) -> Iterator[None]:
    """Let what is inside draw from this seed, on the host and the device, and what comes after go on as before."""
    devices = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**{"devices": []} | devices):
        torch.manual_seed(seed)
        yield
