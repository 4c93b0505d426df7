"""What pretraining and retrieval share: photos and texts contrasted over the global batch, and pairs matched."""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_syncmask import SyncMaskConfig
from .gather import gather_rows, gather_with_gradient, own_rows
from .losses import itc_loss, itm_loss, match_targets, soften_targets
from .modeling_syncmask import SyncMaskModel, SyncMaskPreTrainedModel


@dataclass
class Teacher:
    """The momentum teacher's opinion of this slice, for soft ITC targets.

    Args:
        image_feats, text_feats: (B, P). temperature: (1,), the teacher's own.
        weight: its share of the targets, in [0, 1].
    """

    image_feats: torch.Tensor | None
    text_feats: torch.Tensor | None
    temperature: torch.Tensor | None
    weight: float

    def __post_init__(self):
        check_together(
            teacher_image_feats=self.image_feats,
            teacher_text_feats=self.text_feats,
            teacher_temperature=self.temperature,
        )

    def soften(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix hard targets (B, G) with the teacher's similarities: photos over texts, texts over photos."""
        if self.image_feats is None or self.weight == 0:
            return targets, targets
        # Similarities tie under autocast, so they are taken in fp32.
        with torch.autocast(self.image_feats.device.type, enabled=False):
            i2t = self.image_feats.float() @ gather_rows(self.text_feats).float().T / self.temperature
            t2i = self.text_feats.float() @ gather_rows(self.image_feats).float().T / self.temperature
        return soften_targets(targets, i2t, self.weight), soften_targets(targets, t2i, self.weight)


@dataclass
class FusionRows:
    """Texts for the fusion encoder, each to see its own photo or another one.

    Args:
        text_embeds: (R, L, D). attention_mask: (R, L).
        asked: (R, L) bool, the tokens that are wanted of the last layer.
        image_index: (n,), the photos that the last n rows see; the rows before see their own.
    """

    text_embeds: torch.Tensor
    attention_mask: torch.Tensor
    asked: torch.Tensor
    image_index: torch.Tensor | None = None


def weave(parts: list[FusionRows]) -> FusionRows:
    """Join parts of B rows each: those that see their own photos photo by photo, then those that see others.

    In this order own photos' keys and values need not be copied (see `SyncMaskModel.fuse`).
    """
    own = [part for part in parts if part.image_index is None]
    others = [part for part in parts if part.image_index is not None]

    def joined(name: str) -> torch.Tensor:
        by_photo = torch.stack([getattr(part, name) for part in own], dim=1).flatten(0, 1)
        return torch.cat([by_photo, *(getattr(part, name) for part in others)])

    index = torch.cat([part.image_index for part in others]) if others else None
    return FusionRows(joined("text_embeds"), joined("attention_mask"), joined("asked"), index)


def unweave(states: torch.Tensor, parts: list[FusionRows]) -> list[torch.Tensor]:
    """Cut what came of woven rows (R, ...) into the parts (B, ...) again."""
    size, kinds = len(parts[0].text_embeds), sum(part.image_index is None for part in parts)
    own = iter(states[: kinds * size].unflatten(0, (size, kinds)).unbind(1))
    others = iter(states[kinds * size :].split(size))
    return [next(own if part.image_index is None else others) for part in parts]


class SyncMaskPairModel(SyncMaskPreTrainedModel):
    """The base model and a matching head: what [`SyncMaskForPreTraining`] and the retrieval model are built on."""

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.syncmask = SyncMaskModel(config)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)

    def itm_logits(self, text_embeds, attention_mask, image_embeds, image_index=None) -> torch.Tensor:
        """Match texts (R, L, D) with photos (B, M, Dv): (R, 2), column 1 = match.

        The last n rows see the photos `image_index` (n,); those before are shared out evenly, the first few to the
        first photo, and so on.
        """
        return self.itm_head(self.syncmask.fuse_cls(text_embeds, attention_mask, image_embeds, image_index))

    def contrast(self, image_feats, text_feats, item_ids, text_ids, teacher: Teacher) -> torch.Tensor:
        """ITC of this slice (B, P), (B, P) against the global batch; see `losses.itc_loss`."""
        if item_ids is None:
            item_ids = own_rows(image_feats)
        text_ids = item_ids if text_ids is None else text_ids
        targets = match_targets(item_ids, text_ids, gather_rows(item_ids), gather_rows(text_ids))
        all_images, all_texts = gather_with_gradient(image_feats), gather_with_gradient(text_feats)
        temperature = self.syncmask.temperature
        return itc_loss(image_feats, text_feats, all_images, all_texts, temperature, *teacher.soften(targets))


def with_negatives(
    text_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    negative_image_index: torch.Tensor,
    negative_text_index: torch.Tensor,
) -> list[FusionRows]:
    """Return ITM's rows, B each: the pairs, each text with its negative photo, each photo with its negative text."""
    other_image, other_text = negative_image_index.clamp(min=0), negative_text_index.clamp(min=0)
    cls = torch.zeros_like(attention_mask, dtype=torch.bool)
    cls[:, 0] = True
    return [
        FusionRows(text_embeds, attention_mask, cls),
        FusionRows(text_embeds, attention_mask, cls, other_image),
        FusionRows(text_embeds[other_text], attention_mask[other_text], cls),
    ]


def negatives_itm_loss(
    logits: torch.Tensor, negative_image_index: torch.Tensor, negative_text_index: torch.Tensor
) -> torch.Tensor:
    """ITM of the rows of `with_negatives`, logits (3B, 2); an index of -1 leaves its row out."""
    pairs = torch.ones_like(negative_image_index, dtype=torch.bool)
    is_match = torch.cat([pairs, ~pairs, ~pairs])
    valid = torch.cat([pairs, negative_image_index >= 0, negative_text_index >= 0])
    return itm_loss(logits, is_match, valid)


def check_together(**inputs):
    """Refuse inputs of which only some are given.

    Raises:
        ValueError: names those that are missing.
    """
    missing = [name for name, value in inputs.items() if value is None]
    if missing and len(missing) < len(inputs):
        raise ValueError(f"{', '.join(missing)} not given: {', '.join(inputs)} go together, give all of them or none.")
