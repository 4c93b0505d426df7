"""SyncMaskModel: two towers and a fusion encoder. What is made of it stands in the other modeling_*.py."""

import math
import os

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .conversion import from_vision_text
from .fusion import SyncMaskFusionEncoder
from .inputs import check_length, check_padding, text_first
from .outputs import SyncMaskOutput
from .towers import build_tower, final_tokens, kept_patches, num_prefix_tokens, patch_grid, pool_tokens

LOG_TEMPERATURE_RANGE = (math.log(0.001), math.log(0.5))


class SyncMaskPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by every SyncMask model."""

    config: SyncMaskConfig
    base_model_prefix = "syncmask"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SyncMaskFusionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Any class loads from any other's checkpoint without a word about the heads that it leaves behind.
    _keys_to_ignore_on_load_unexpected = [
        r"^(itm_head|mlm_head|mim_decoder|query_head|classifiers)\.",
        r"^no_(image|text)$",
    ]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SyncMaskModel):
            low, high = LOG_TEMPERATURE_RANGE
            share = (math.log(self.config.initial_temperature) - low) / (high - low)
            init.constant_(module.temperature_logit, math.log(share / (1 - share)))

    @classmethod
    def from_albef(cls, path: str | os.PathLike, image_size: int | None = None, **config):
        """Build this class from a checkpoint (.pth) of ALBEF, in eval mode, with a `.conversion_report`.

        Towers, fusion encoder, projections, temperature, ITM and MLM head come over; momentum copies and queues do not,
        and what ALBEF lacks, such as the MIM decoder, is new. The tokenizer is bert-base-uncased's.

        Args:
            path: the file; nothing in it is unpickled but tensors and plain values.
            image_size: side of the photos; the checkpoint's own when None, else positions are interpolated.
            config: fields of [`SyncMaskConfig`] that are not read off the checkpoint, such as `label_sets`, or are
                changed, its sub-configurations as {field: value}.

        Raises:
            FileNotFoundError: no such file. ValueError: broken, holds code, or is not laid out as ALBEF's are.
        """
        from .albef import load_albef  # which needs this file

        return load_albef(cls, path, image_size, **config)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | os.PathLike, text: str | os.PathLike, split_layer: int | None = None, **settings
    ):
        """Build this class on a vision and a text checkpoint, in eval mode, with a `.conversion_report`.

        The vision model becomes the image tower. The lower layers of a BERT-like text model become the text tower and
        the upper ones the fusion encoder's; other text models are kept whole, under a new fusion encoder.

        Args:
            vision, text: local folders or Hub names, of the models alone or with heads; see docs/checkpoints.md for
                their families.
            split_layer: layers of a BERT-like text model that stay in the text tower; half when None.
            settings: `image_size`, side of the photos, and `max_position_embeddings`, rows of the text tower's table
                of positions, the checkpoints' own when not given (else positions are resized); `text_pooling`, "mean"
                when not given; `fusion_layers` of a new fusion encoder, 6; `mask_token_id`, else the tokenizer's beside
                the text model; fields of [`SyncMaskConfig`], its sub-configurations as {field: value} that are changed.

        Raises:
            ValueError: for a checkpoint of another kind, or settings that do not fit it.

        Example:

        ```python
        >>> model = SyncMaskForPreTraining.from_vision_text_pretrained(
        ...     "facebook/dinov2-base", "google-bert/bert-base-uncased", image_size=224
        ... )
        >>> print(model.conversion_report)
        ```
        """
        return from_vision_text(cls, os.fspath(vision), os.fspath(text), split_layer, **settings).eval()


class SyncMaskModel(SyncMaskPreTrainedModel):
    r"""Image tower, text tower and a fusion encoder in which text tokens attend to image tokens.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import syncmask
    >>> model = AutoModel.from_pretrained("runs/quickstart/final")
    >>> processor = AutoProcessor.from_pretrained("runs/quickstart/final")
    >>> feats = model.get_image_features(**processor(images="photo.jpg")).pooler_output
    ```
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.num_prefix_tokens = num_prefix_tokens(config.vision_config)
        self.grid = patch_grid(config.vision_config)
        self.vision_model = build_tower(config.vision_config)
        self.text_model = build_tower(config.text_config)
        self.fusion_encoder = SyncMaskFusionEncoder(config.fusion_encoder_config)
        self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        # The temperature is read through a sigmoid, so no step can leave its range and nothing is clamped in place.
        # Shape (1,), since sharding wrappers refuse scalars.
        self.temperature_logit = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the text tower's token embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Replace the text tower's token embeddings."""
        self.text_model.set_input_embeddings(value)

    @property
    def temperature(self) -> torch.Tensor:
        """The ITC temperature, shape (1,), between .001 and .5."""
        low, high = LOG_TEMPERATURE_RANGE
        return (low + (high - low) * self.temperature_logit.sigmoid()).exp()

    def encode_image(self, pixel_values: torch.Tensor, keep: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Encode photos, or only their patches `keep` (B, n): (B, 3, S, S) -> (B, prefix + N or n, Dv)."""
        with kept_patches(self.vision_model, keep, self.num_prefix_tokens):
            tokens = self.vision_model(pixel_values=pixel_values, **kwargs).last_hidden_state
        return final_tokens(self.vision_model, tokens)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """Encode texts: (B, L) -> (B, L, D); [CLS] comes first, see `text_first` for texts padded on the left."""
        check_padding(attention_mask)
        check_length(input_ids, self.text_model)
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state

    def fuse(
        self,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_embeds: torch.Tensor,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let texts attend to photos: (R, L, D), (B, M, Dv) -> (R, L, D).

        The last n rows see the photos `image_index` (n,); those before are shared out evenly, the first few to the
        first photo, and so on.
        """
        return self.fusion_encoder(
            text_embeds, attention_mask, encoder_hidden_states=image_embeds, encoder_index=image_index
        ).last_hidden_state

    def fuse_cls(self, text_embeds, attention_mask, image_embeds, image_index=None) -> torch.Tensor:
        """Return [CLS] of `fuse` alone, (R, D): the last layer is run for that token only."""
        hidden = self.fusion_encoder.lower(text_embeds, attention_mask, image_embeds, image_index)
        return self.fusion_encoder.last_cls(hidden, attention_mask, image_embeds, image_index)

    def pool_image(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Sum photos up: (B, M, Dv) -> (B, Dv), [CLS], or the mean of the patches where the family has no [CLS]."""
        return pool_tokens(image_embeds, self.num_prefix_tokens)

    def project_image(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Project what `pool_image` gives to unit length: (B, M, Dv) -> (B, P)."""
        return nn.functional.normalize(self.vision_projection(self.pool_image(image_embeds)), dim=-1)

    def pool_text(self, text_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Sum texts up: (B, L, D) -> (B, D), [CLS] or the mean of the real tokens, as `config.text_pooling` says."""
        if self.config.text_pooling == "cls":
            return text_embeds[:, 0]
        if attention_mask is None:
            return text_embeds.mean(dim=1)
        real = attention_mask.unsqueeze(-1).to(text_embeds.dtype)
        return (text_embeds * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)

    def project_text(self, text_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Project what `pool_text` gives to unit length: (B, L, D) -> (B, P)."""
        return nn.functional.normalize(self.text_projection(self.pool_text(text_embeds, attention_mask)), dim=-1)

    def compare(self, feats: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return cosines over the temperature, (Q, G), of features (Q, P) and (G, P), on the device of the first."""
        return feats @ others.T.to(feats.device) / self.temperature.to(feats.device)  # towers may be on devices apart

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Return the unit-length image features as `pooler_output` (B, P) and tokens as `last_hidden_state`."""
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        outputs.last_hidden_state = final_tokens(self.vision_model, outputs.last_hidden_state)
        return _pooled(outputs, self.project_image(outputs.last_hidden_state))

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the unit-length text features as `pooler_output` (B, P) and tokens as `last_hidden_state`.

        Texts may be padded on either side; their tokens are returned with the padding behind, see `text_first`.
        """
        attention_mask, input_ids = text_first(attention_mask, input_ids)
        check_length(input_ids, self.text_model)
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return _pooled(outputs, self.project_text(outputs.last_hidden_state, attention_mask))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> SyncMaskOutput:
        """Encode photos (B, 3, S, S) and texts (B, L), compare all with all, and fuse each text with its photo.

        Either may be left out: the other tower's outputs alone are returned then. Where there are not as many photos as
        texts, they are compared and not fused. Texts may be padded on either side; tokens are returned with the padding
        behind, see `text_first`.

        Raises:
            ValueError: when neither is given, or texts are longer than the text tower reads.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("SyncMaskModel was called with neither pixel_values nor input_ids; give one or both.")
        attention_mask, input_ids = text_first(attention_mask, input_ids)
        output = SyncMaskOutput()
        if pixel_values is not None:
            vision = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            output.image_feats, output.image_embeds = vision.pooler_output, vision.last_hidden_state
            output.vision_hidden_states, output.vision_attentions = vision.hidden_states, vision.attentions
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
            output.text_feats, output.text_embeds = text.pooler_output, text.last_hidden_state
            output.text_hidden_states, output.text_attentions = text.hidden_states, text.attentions
        if pixel_values is not None and input_ids is not None:
            output.logits_per_text = self.compare(output.text_feats, output.image_feats)
            output.logits_per_image = output.logits_per_text.T
            self._fuse_pairs(output, attention_mask, **kwargs)
        return SyncMaskOutput(**output)

    def _fuse_pairs(self, output: SyncMaskOutput, attention_mask: torch.Tensor | None, **kwargs):
        if output.image_embeds.shape[0] != output.text_embeds.shape[0]:
            return  # photos and texts are compared all with all, but there are no pairs to fuse
        fused = self.fusion_encoder(
            output.text_embeds, attention_mask, encoder_hidden_states=output.image_embeds, **kwargs
        )
        output.fused, output.fusion_hidden_states = fused.last_hidden_state, fused.hidden_states
        output.fusion_attentions, output.cross_attentions = fused.attentions, fused.cross_attentions


def _pooled(outputs, feats):
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=feats,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


__all__ = ["SyncMaskModel", "SyncMaskPreTrainedModel"]
