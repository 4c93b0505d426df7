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
    """Rows for the fusion encoder: a text and the photo of the batch that it attends to.

    Args:
        text_embeds: (R, L, D). attention_mask: (R, L). image_index: (R,), rows of the batch's photos.
    """

    text_embeds: torch.Tensor
    attention_mask: torch.Tensor
    image_index: torch.Tensor

    def __len__(self) -> int:
        return len(self.image_index)

    @classmethod
    def join(cls, parts: list["FusionRows"]) -> "FusionRows":
        """Put rows one after the other."""
        return cls(
            torch.cat([part.text_embeds for part in parts]),
            torch.cat([part.attention_mask for part in parts]),
            torch.cat([part.image_index for part in parts]),
        )


class SyncMaskPairModel(SyncMaskPreTrainedModel):
    """The base model and a matching head: what [`SyncMaskForPreTraining`] and the retrieval model are built on."""

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.syncmask = SyncMaskModel(config)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)

    def itm_logits(self, text_embeds, attention_mask, image_embeds, image_index=None) -> torch.Tensor:
        """Match texts (R, L, D) with photos image_embeds[image_index]: (R, 2), column 1 = match."""
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
) -> FusionRows:
    """Return 3B rows for ITM: the pairs, each text with its negative photo, each photo with its negative text."""
    own = torch.arange(text_embeds.shape[0], device=text_embeds.device)
    other_image, other_text = negative_image_index.clamp(min=0), negative_text_index.clamp(min=0)
    return FusionRows(
        torch.cat([text_embeds, text_embeds, text_embeds[other_text]]),
        torch.cat([attention_mask, attention_mask, attention_mask[other_text]]),
        torch.cat([own, other_image, own]),
    )


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
