"""SyncMaskForImageTextRetrieval: photos and texts compared all with all, and matched pair by pair."""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .inputs import text_first
from .modeling_pairs import (
    SyncMaskPairModel,
    Teacher,
    check_together,
    negatives_itm_loss,
    unweave,
    weave,
    with_negatives,
)
from .outputs import SyncMaskForImageTextRetrievalOutput


class SyncMaskForImageTextRetrieval(SyncMaskPairModel):
    r"""Text-to-photo and photo-to-text retrieval: cosines rank a whole gallery, the matching head re-ranks its best.

    Loads from a pretraining checkpoint with nothing new. The stock pipeline "zero-shot-image-classification" takes it.

    Example:

    ```python
    >>> from syncmask import SyncMaskForImageTextRetrieval, SyncMaskProcessor
    >>> model = SyncMaskForImageTextRetrieval.from_pretrained("runs/quickstart/final")
    >>> processor = SyncMaskProcessor.from_pretrained("runs/quickstart/final")
    >>> output = model(**processor(images=["photo.jpg"], text=["a red shirt", "a blue skirt"]))
    >>> output.logits_per_image.softmax(dim=1)  # (1, 2): which text fits
    ```
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`SyncMaskModel.get_image_features`]."""
        return self.syncmask.get_image_features(pixel_values, **kwargs)

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See [`SyncMaskModel.get_text_features`]."""
        return self.syncmask.get_text_features(input_ids, attention_mask, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        item_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        negative_image_index: torch.Tensor | None = None,
        negative_text_index: torch.Tensor | None = None,
        teacher_image_feats: torch.Tensor | None = None,
        teacher_text_feats: torch.Tensor | None = None,
        teacher_temperature: torch.Tensor | None = None,
        soft_target_weight: float = 0.0,
        return_loss: bool | None = None,
    ) -> SyncMaskForImageTextRetrievalOutput:
        """Compare all photos with all texts; where there are equally many, match them row by row.

        Args:
            pixel_values: (Bi, 3, S, S). input_ids, attention_mask: (Bt, L), padded on either side.
            token_type_ids: taken since stock pipelines hand on all that a tokenizer gives; a single text's are 0.
            item_ids, text_ids: (B,), what counts as the same item or text; every row its own when None.
            negative_image_index, negative_text_index: (B,), a row of this slice that does not match; -1 = none.
            teacher_image_feats, teacher_text_feats: (B, P) of a momentum teacher. teacher_temperature: (1,).
            soft_target_weight: share of the teacher in the ITC targets, in [0, 1].
            return_loss: whether to compute losses, for which rows are pairs; None = when ids or negatives are given.

        Raises:
            ValueError: when inputs that go together are given in part, or rows that must be pairs are not.
        """
        check_together(negative_image_index=negative_image_index, negative_text_index=negative_text_index)
        teacher = Teacher(teacher_image_feats, teacher_text_feats, teacher_temperature, soft_target_weight)
        if return_loss is None:
            return_loss = item_ids is not None or text_ids is not None or negative_image_index is not None
        paired = pixel_values.shape[0] == input_ids.shape[0]
        if not paired and (return_loss or negative_image_index is not None):
            raise ValueError(
                f"got {pixel_values.shape[0]} photos and {input_ids.shape[0]} texts: losses and negatives need pairs, "
                "row by row. Give equally many, or leave out ids, negatives and return_loss."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask, input_ids = text_first(attention_mask, input_ids)
        image_embeds = self.syncmask.encode_image(pixel_values)
        text_embeds = self.syncmask.encode_text(input_ids, attention_mask)
        output = SyncMaskForImageTextRetrievalOutput(
            image_feats=self.syncmask.project_image(image_embeds),
            text_feats=self.syncmask.project_text(text_embeds, attention_mask),
        )
        output.logits_per_text = self.syncmask.compare(output.text_feats, output.image_feats)
        output.logits_per_image = output.logits_per_text.T
        if negative_image_index is not None:
            parts = with_negatives(text_embeds, attention_mask, negative_image_index, negative_text_index)
            rows = weave(parts)
            logits = self.itm_logits(rows.text_embeds, rows.attention_mask, image_embeds, rows.image_index)
            output.itm_logits = torch.cat(unweave(logits, parts))
        elif paired:
            output.itm_logits = self.itm_logits(text_embeds, attention_mask, image_embeds)
        if return_loss:
            output.loss = output.itc_loss = self.contrast(
                output.image_feats, output.text_feats, item_ids, text_ids, teacher
            )
            if negative_image_index is not None:
                output.itm_loss = negatives_itm_loss(output.itm_logits, negative_image_index, negative_text_index)
                output.loss = output.itc_loss + output.itm_loss
        return SyncMaskForImageTextRetrievalOutput(**output)


__all__ = ["SyncMaskForImageTextRetrieval"]
