"""SyncMaskModel (two towers and a fusion encoder) and SyncMaskForPreTraining (the four objectives in one forward)."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .fusion import SyncMaskFusionEncoder, SyncMaskMimDecoder, take_positions
from .gather import gather_rows, gather_with_gradient
from .losses import itc_loss, itm_loss, match_targets, mim_loss, mlm_loss, soften_targets
from .outputs import SyncMaskForPreTrainingOutput, SyncMaskOutput
from .towers import build_tower, kept_patches, num_prefix_tokens, patch_grid, patchify

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

    # A pretraining checkpoint loads here without a word about the heads that are left behind.
    _keys_to_ignore_on_load_unexpected = [r"^itm_head\.", r"^mlm_head\.", r"^mim_decoder\."]

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


class SyncMaskMlmHead(nn.Module):
    """Transform and vocabulary matrix of BERT's MLM head; the matrix is tied to the token embeddings."""

    def __init__(self, config: SyncMaskConfig):
        super().__init__()
        size, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
        self.dense = nn.Linear(size, size)
        self.activation = ACT2FN[config.fusion_encoder_config.hidden_act]
        self.norm = nn.LayerNorm(size, eps=config.fusion_encoder_config.layer_norm_eps)
        self.decoder = nn.Linear(size, vocabulary)

    def forward(self, fused: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        return self.decoder(self.norm(self.activation(self.dense(fused))))


class SyncMaskForPreTraining(SyncMaskPreTrainedModel):
    r"""SyncMask with its four objectives: ITC, ITM, MLM and MIM.

    The forward is the only differentiable call of a training step and is deterministic in its inputs (dropout apart):
    masks, negatives and the teacher's features are given to it. What is not given is skipped: no masks, no MLM and MIM;
    no negatives, no ITM; no teacher, hard ITC targets.
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.syncmask = SyncMaskModel(config)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.mlm_head = SyncMaskMlmHead(config)
        rows, columns = self.syncmask.grid
        pixels = self._pixels_per_patch(config)
        self.mim_decoder = SyncMaskMimDecoder(
            config.mim_decoder_config,
            image_width=config.vision_config.hidden_size,
            num_prefix=self.syncmask.num_prefix_tokens,
            num_patches=rows * columns,
            patch_dim=pixels,
        )
        self._tied_weights_keys = {"mlm_head.decoder.weight": self._embedding_name()}
        self.post_init()

    @staticmethod
    def _pixels_per_patch(config: SyncMaskConfig) -> int:
        size = config.vision_config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.vision_config.num_channels * height * width

    def _embedding_name(self) -> str:
        """Name the token embedding's weight, which differs between text tower families."""
        embedding = self.syncmask.get_input_embeddings().weight
        return next(name for name, parameter in self.named_parameters() if parameter is embedding)

    def get_input_embeddings(self) -> nn.Module:
        """Return the text tower's token embeddings."""
        return self.syncmask.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Replace the text tower's token embeddings."""
        self.syncmask.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the MLM head's vocabulary matrix."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        """Replace the MLM head's vocabulary matrix."""
        self.mlm_head.decoder = value

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cut photos (B, 3, S, S) into patches (B, N, patch_dim)."""
        return patchify(pixel_values, self.syncmask.grid)

    def itm_logits(self, text_embeds, attention_mask, image_embeds, image_index=None) -> torch.Tensor:
        """Match texts (R, L, D) with photos image_embeds[image_index]: (R, 2), column 1 = match."""
        fusion = self.syncmask.fusion_encoder
        hidden = fusion.lower(text_embeds, attention_mask, image_embeds, image_index)
        return self._match(hidden, attention_mask, image_embeds, image_index)

    def mlm_logits(self, text_embeds, attention_mask, image_embeds, positions, image_index=None) -> torch.Tensor:
        """Predict the tokens at `positions` (R, Q) of masked texts (R, L, D): (R, Q, V)."""
        fusion = self.syncmask.fusion_encoder
        hidden = fusion.lower(text_embeds, attention_mask, image_embeds, image_index)
        return self.mlm_head(fusion.last(hidden, attention_mask, image_embeds, image_index, positions))

    def predict_patches(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the hidden patches from the kept ones and the text: (B, k, patch_dim), ascending order.

        Args:
            pixel_values: (B, 3, S, S). patch_mask: (B, N), True = hidden, equally many in every row.
            text_embeds: (B, L, D) of the unmasked text. attention_mask: (B, L).

        Raises:
            ValueError: when rows hide different numbers of patches.
        """
        keep, hidden = split_patches(patch_mask)
        kept_embeds = self.syncmask.encode_image(pixel_values, keep=keep)
        return self.mim_decoder(kept_embeds, keep, hidden, text_embeds, attention_mask)

    def hidden_patches(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """Return the true pixels of the hidden patches: (B, k, patch_dim), ascending order."""
        _, hidden = split_patches(patch_mask)
        return take_positions(self.patchify(pixel_values), hidden)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        item_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        masked_input_ids: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        negative_image_index: torch.Tensor | None = None,
        negative_text_index: torch.Tensor | None = None,
        teacher_image_feats: torch.Tensor | None = None,
        teacher_text_feats: torch.Tensor | None = None,
        teacher_temperature: torch.Tensor | None = None,
        soft_target_weight: float = 0.0,
    ) -> SyncMaskForPreTrainingOutput:
        """Compute the objectives whose inputs are given.

        Args:
            pixel_values: (B, 3, S, S). input_ids, attention_mask: (B, L), the unmasked text.
            item_ids, text_ids: (B,), what counts as the same item or text; every row its own when None.
            text_mask: (B, L) bool, True = hidden token. masked_input_ids: (B, L), the text with the hidden tokens
                replaced; every hidden token becomes [MASK] when None.
            patch_mask: (B, N) bool, True = hidden patch, equally many in every row.
            negative_image_index, negative_text_index: (B,), a row of this slice that does not match; -1 = none.
            teacher_image_feats, teacher_text_feats: (B, P) of the momentum teacher. teacher_temperature: (1,).
            soft_target_weight: share of the teacher in the ITC targets, in [0, 1].
        """
        _check_together(negative_image_index=negative_image_index, negative_text_index=negative_text_index)
        _check_together(
            teacher_image_feats=teacher_image_feats,
            teacher_text_feats=teacher_text_feats,
            teacher_temperature=teacher_temperature,
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        image_embeds = self.syncmask.encode_image(pixel_values)
        text_embeds = self.syncmask.encode_text(input_ids, attention_mask)
        output = SyncMaskForPreTrainingOutput(
            image_feats=self.syncmask.project_image(image_embeds),
            text_feats=self.syncmask.project_text(text_embeds),
        )
        output.itc_loss = self._itc(
            output.image_feats,
            output.text_feats,
            item_ids,
            text_ids,
            (teacher_image_feats, teacher_text_feats, teacher_temperature),
            soft_target_weight,
        )
        self._fused_objectives(
            output,
            image_embeds,
            text_embeds,
            attention_mask,
            input_ids,
            text_mask,
            masked_input_ids,
            negative_image_index,
            negative_text_index,
        )
        if patch_mask is not None:
            output.mim_predictions = self.predict_patches(pixel_values, patch_mask, text_embeds, attention_mask)
            output.mim_loss = mim_loss(output.mim_predictions, self.hidden_patches(pixel_values, patch_mask))
        terms = (output.itc_loss, output.itm_loss, output.mlm_loss, output.mim_loss)
        output.loss = sum(term for term in terms if term is not None)
        return SyncMaskForPreTrainingOutput(**output)

    def _itc(self, image_feats, text_feats, item_ids, text_ids, teacher, soft_target_weight) -> torch.Tensor:
        """Contrast this slice with the global batch; see `losses.itc_loss`."""
        all_images, all_texts = gather_with_gradient(image_feats), gather_with_gradient(text_feats)
        if item_ids is None:
            item_ids = _own_rows(image_feats, all_images)
        text_ids = item_ids if text_ids is None else text_ids
        targets = match_targets(item_ids, text_ids, gather_rows(item_ids), gather_rows(text_ids))
        image_targets = text_targets = targets
        teacher_images, teacher_texts, temperature = teacher
        if teacher_images is not None and soft_target_weight > 0:
            # Similarities tie under autocast, so they are taken in fp32.
            with torch.autocast(teacher_images.device.type, enabled=False):
                i2t = teacher_images.float() @ gather_rows(teacher_texts).float().T / temperature
                t2i = teacher_texts.float() @ gather_rows(teacher_images).float().T / temperature
            image_targets = soften_targets(targets, i2t, soft_target_weight)
            text_targets = soften_targets(targets, t2i, soft_target_weight)
        return itc_loss(
            image_feats,
            text_feats,
            all_images,
            all_texts,
            self.syncmask.temperature,
            image_targets,
            text_targets,
        )

    def _fused_objectives(
        self,
        output,
        image_embeds,
        text_embeds,
        attention_mask,
        input_ids,
        text_mask,
        masked_input_ids,
        negative_image_index,
        negative_text_index,
    ):
        """ITM and MLM: positives, both negatives and masked texts go through the fusion encoder as one batch of 4B.

        An image's keys and values are projected once; the last layer is run for [CLS] of the ITM rows and for the
        hidden tokens of the MLM rows alone.
        """
        own = torch.arange(image_embeds.shape[0], device=image_embeds.device)
        texts, masks, images = [], [], []
        if negative_image_index is not None:
            other_image, other_text = negative_image_index.clamp(min=0), negative_text_index.clamp(min=0)
            texts += [text_embeds, text_embeds, text_embeds[other_text]]
            masks += [attention_mask, attention_mask, attention_mask[other_text]]
            images += [own, other_image, own]
        if text_mask is not None:
            if masked_input_ids is None:
                masked_input_ids = input_ids.masked_fill(text_mask, self.config.mask_token_id)
            texts.append(self.syncmask.encode_text(masked_input_ids, attention_mask))
            masks.append(attention_mask)
            images.append(own)
        if not texts:
            return
        mask, index = torch.cat(masks), torch.cat(images)
        hidden = self.syncmask.fusion_encoder.lower(torch.cat(texts), mask, image_embeds, index)
        pairs = 3 * len(own) if negative_image_index is not None else 0
        if pairs:
            output.itm_logits = self._match(hidden[:pairs], mask[:pairs], image_embeds, index[:pairs])
            is_match = torch.arange(pairs, device=own.device) < len(own)
            valid = torch.cat([own >= 0, negative_image_index >= 0, negative_text_index >= 0])
            output.itm_loss = itm_loss(output.itm_logits, is_match, valid)
        if text_mask is not None:
            positions, real = hidden_positions(text_mask)
            fused = self.syncmask.fusion_encoder.last(hidden[pairs:], attention_mask, image_embeds, None, positions)
            output.mlm_logits = self.mlm_head(fused[real])
            output.mlm_loss = mlm_loss(output.mlm_logits, input_ids[text_mask])

    def _match(self, hidden, attention_mask, image_embeds, image_index) -> torch.Tensor:
        cls = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        fused = self.syncmask.fusion_encoder.last(hidden, attention_mask, image_embeds, image_index, cls)
        return self.itm_head(fused[:, 0])


def _pooled(outputs, feats):
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=feats,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def split_patches(patch_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split (B, N) into the indices of kept (B, N - k) and of hidden patches (B, k), each ascending.

    Raises:
        ValueError: when rows hide different numbers of patches.

    Example: [[0, 1, 0, 1]] gives [[0, 2]] and [[1, 3]].
    """
    counts = patch_mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"patch_mask hides between {int(counts.min())} and {int(counts.max())} patches; every row must hide the "
            "same number, since kept patches are encoded as one batch."
        )
    order = patch_mask.long().argsort(dim=1, stable=True)
    keep = patch_mask.shape[1] - int(counts[0])
    return order[:, :keep], order[:, keep:]


def hidden_positions(text_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of hidden tokens (B, Q), padded with kept ones, and which are real (B, Q).

    Q is the largest number of hidden tokens in a row, at least 1. Real positions ascend, so that indexing by the second
    result lists hidden tokens in the row-major order of `text_mask`.
    """
    counts = text_mask.sum(dim=1)
    width = max(1, int(counts.max()))
    positions = (~text_mask).long().argsort(dim=1, stable=True)[:, :width]
    return positions, torch.arange(width, device=text_mask.device) < counts[:, None]


def _check_together(**inputs):
    missing = [name for name, value in inputs.items() if value is None]
    if missing and len(missing) < len(inputs):
        raise ValueError(f"{', '.join(missing)} not given: {', '.join(inputs)} go together, give all of them or none.")


def _own_rows(slice_: torch.Tensor, gathered: torch.Tensor) -> torch.Tensor:
    """Number the rows of this slice within the global batch: every row an item of its own."""
    start = 0
    if gathered.shape[0] != slice_.shape[0]:
        start = torch.distributed.get_rank() * slice_.shape[0]
    return torch.arange(start, start + slice_.shape[0], device=slice_.device)


__all__ = ["SyncMaskForPreTraining", "SyncMaskModel", "SyncMaskPreTrainedModel"]
