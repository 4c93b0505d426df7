"""SyncMaskForComposedImageRetrieval: a reference photo and a text that says what should differ -> the photo meant."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .gather import gather_rows, gather_with_gradient, own_rows
from .inputs import check_pairs, text_first
from .losses import composed_targets, itc_loss
from .modeling_syncmask import SyncMaskModel, SyncMaskPreTrainedModel
from .outputs import SyncMaskForComposedImageRetrievalOutput


class SyncMaskQueryHead(nn.Module):
    """Reference photo, text and what the fusion encoder makes of both -> one query among the image features.

    q = normalize(a f_photo + b f_text + W fused[CLS])

    a and b start at 1 and W at 0: an untrained head is the sum of both towers, which pretraining has put into one space
    (our choice).
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__()
        self.shares = nn.Parameter(torch.ones(2))
        self.dense = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)

    def forward(self, image_feats: torch.Tensor, text_feats: torch.Tensor, fused_cls: torch.Tensor) -> torch.Tensor:
        """(B, P), (B, P), (B, D) -> (B, P), unit length."""
        query = self.shares[0] * image_feats + self.shares[1] * text_feats + self.dense(fused_cls)
        return nn.functional.normalize(query, dim=-1)


class SyncMaskForComposedImageRetrieval(SyncMaskPreTrainedModel):
    r"""Composed (text-guided) retrieval: "like this photo, but with long sleeves".

    The query lives in the space of the image features, so the gallery is what `syncmask.get_image_features` gives.
    Loads from a pretraining checkpoint with only the query head new.

    Example:

    ```python
    >>> from syncmask import SyncMaskForComposedImageRetrieval, SyncMaskProcessor
    >>> model = SyncMaskForComposedImageRetrieval.from_pretrained("runs/quickstart/final")
    >>> processor = SyncMaskProcessor.from_pretrained("runs/quickstart/final")
    >>> query = model.get_query_features(**processor(images=["shirt.jpg"], text=["the same but in blue"])).pooler_output
    >>> gallery = model.syncmask.get_image_features(**processor(images=["a.jpg", "b.jpg"])).pooler_output
    >>> query @ gallery.T  # (1, 2)
    ```
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.syncmask = SyncMaskModel(config)
        self.query_head = SyncMaskQueryHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SyncMaskQueryHead):
            init.ones_(module.shares)
            init.zeros_(module.dense.weight)

    @can_return_tuple
    def get_query_features(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Return the unit-length queries as `pooler_output` (B, P) and fused [CLS] as `last_hidden_state` (B, 1, D).

        Args:
            pixel_values: (B, 3, S, S), the reference photos. input_ids, attention_mask: (B, L), padded on either side.

        Raises:
            ValueError: when there are not as many photos as texts.
        """
        query, _, fused_cls = self._query(pixel_values, input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=fused_cls[:, None], pooler_output=query)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        target_pixel_values: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        reference_ids: torch.Tensor | None = None,
    ) -> SyncMaskForComposedImageRetrievalOutput:
        """Compose queries; with target photos, contrast them with all photos of the global batch.

        Args:
            pixel_values: (B, 3, S, S), the REFERENCE photos. input_ids, attention_mask: (B, L), what should differ.
            target_pixel_values: (B, 3, S, S), the photos meant.
            target_ids, reference_ids: (B,), what counts as the same photo; every target its own and no reference
                anybody's when None.

        Raises:
            ValueError: when ids are given without what they are of, or there are not as many photos as texts.
        """
        _check_ids(target_pixel_values, target_ids, reference_ids)
        query, reference_feats, _ = self._query(pixel_values, input_ids, attention_mask)
        output = SyncMaskForComposedImageRetrievalOutput(query_feats=query)
        if target_pixel_values is not None:
            image_feats = self.syncmask.project_image(self.syncmask.encode_image(target_pixel_values))
            candidates = torch.cat([image_feats, reference_feats])
            output.loss = self._contrast(query, image_feats, reference_feats, target_ids, reference_ids)
            output.logits = self.syncmask.compare(query, candidates)
            output.image_feats = image_feats
        return SyncMaskForComposedImageRetrievalOutput(**output)

    def _query(self, pixel_values, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries (B, P), reference features (B, P) and fused [CLS] (B, D)."""
        check_pairs(pixel_values, input_ids)
        attention_mask, input_ids = text_first(attention_mask, input_ids)
        image_embeds = self.syncmask.encode_image(pixel_values)
        text_embeds = self.syncmask.encode_text(input_ids, attention_mask)
        reference_feats = self.syncmask.project_image(image_embeds)
        fused_cls = self.syncmask.fuse_cls(text_embeds, attention_mask, image_embeds)
        query = self.query_head(reference_feats, self.syncmask.project_text(text_embeds, attention_mask), fused_cls)
        return query, reference_feats, fused_cls

    def _contrast(self, query, image_feats, reference_feats, target_ids, reference_ids) -> torch.Tensor:
        """Contrast this slice with the global batch: queries with all photos, target photos with all queries."""
        target_ids = own_rows(query) if target_ids is None else target_ids
        all_target_ids = gather_rows(target_ids)
        if reference_ids is None:
            all_reference_ids = (all_target_ids.min() - 1).expand_as(all_target_ids)  # an id that no target has
        else:
            all_reference_ids = gather_rows(reference_ids)
        photos = torch.cat([gather_with_gradient(image_feats), gather_with_gradient(reference_feats)])
        query_targets, image_targets = composed_targets(target_ids, all_target_ids, all_reference_ids)
        return itc_loss(
            query,
            image_feats,
            gather_with_gradient(query),
            photos,
            self.syncmask.temperature,
            query_targets,
            image_targets,
        )


def _check_ids(target_pixel_values, target_ids, reference_ids):
    if target_ids is not None and target_pixel_values is None:
        raise ValueError("target_ids were given without target_pixel_values; give the target photos too.")
    if reference_ids is not None and target_ids is None:
        raise ValueError("reference_ids were given without target_ids, which they are compared with; give both.")


__all__ = ["SyncMaskForComposedImageRetrieval"]
