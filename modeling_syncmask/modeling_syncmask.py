"""SyncMaskModel: two towers and a fusion encoder. What is made of it stands in the other modeling_*.py."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .fusion import SyncMaskFusionEncoder
from .outputs import SyncMaskOutput
from .towers import build_tower, kept_patches, num_prefix_tokens, patch_grid

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
            return self.vision_model(pixel_values=pixel_values, **kwargs).last_hidden_state

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """Encode texts: (B, L) -> (B, L, D)."""
        _check_padding(attention_mask)
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state

    def fuse(
        self,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_embeds: torch.Tensor,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let texts attend to photos: (R, L, D), (B, M, Dv) -> (R, L, D); row r sees photo image_index[r], or r."""
        return self.fusion_encoder(
            text_embeds, attention_mask, encoder_hidden_states=image_embeds, encoder_index=image_index
        ).last_hidden_state

    def fuse_cls(self, text_embeds, attention_mask, image_embeds, image_index=None) -> torch.Tensor:
        """Return [CLS] of `fuse` alone, (R, D): the last layer is run for that token only."""
        hidden = self.fusion_encoder.lower(text_embeds, attention_mask, image_embeds, image_index)
        return self.fusion_encoder.last_cls(hidden, attention_mask, image_embeds, image_index)

    def project_image(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Project [CLS] of the image tower to unit length: (B, M, Dv) -> (B, P)."""
        return nn.functional.normalize(self.vision_projection(image_embeds[:, 0]), dim=-1)

    def project_text(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Project [CLS] of the text tower to unit length: (B, L, D) -> (B, P)."""
        return nn.functional.normalize(self.text_projection(text_embeds[:, 0]), dim=-1)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Return the unit-length image features as `pooler_output` (B, P) and tokens as `last_hidden_state`."""
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        return _pooled(outputs, self.project_image(outputs.last_hidden_state))

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the unit-length text features as `pooler_output` (B, P) and tokens as `last_hidden_state`."""
        _check_padding(attention_mask)
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return _pooled(outputs, self.project_text(outputs.last_hidden_state))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> SyncMaskOutput:
        """Encode photos (B, 3, S, S) and texts (B, L), compare all with all, and fuse each text with its photo.

        Either may be left out: the other tower's outputs alone are returned then.

        Raises:
            ValueError: when neither is given, or their numbers of rows differ.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("SyncMaskModel was called with neither pixel_values nor input_ids; give one or both.")
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
            output.logits_per_text = output.text_feats @ output.image_feats.T / self.temperature
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


def _check_padding(attention_mask: torch.Tensor | None):
    """Refuse texts padded on the left, of which a padding token would be taken for [CLS]."""
    if attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return
    left = (attention_mask[:, 0] == 0) & attention_mask.any(dim=1)
    if left.any():
        raise ValueError(
            f"{int(left.sum())} of {len(left)} texts are padded on the left, but [CLS] must come first; set "
            "tokenizer.padding_side = 'right'."
        )


def _pooled(outputs, feats):
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=feats,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


__all__ = ["SyncMaskModel", "SyncMaskPreTrainedModel"]
