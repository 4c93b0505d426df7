"""SyncMaskForPreTraining: the objectives in one forward."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .fusion import SyncMaskMimDecoder, take_positions
from .inputs import check_pairs, text_first
from .losses import mim_loss, mlm_loss, wpa_loss
from .masks import hidden_positions, split_patches
from .modeling_pairs import (
    FusionRows,
    SyncMaskPairModel,
    Teacher,
    check_together,
    negatives_itm_loss,
    unweave,
    weave,
    with_negatives,
)
from .outputs import SyncMaskForPreTrainingOutput
from .towers import patchify


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


class SyncMaskWordPatchHead(nn.Module):
    """Where in a photo is a word? Brings patches into the space of the token embeddings, to be compared there [ours].

    A word is looked for without its text, so a photo that does not show it has nothing to guess it from.
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.fusion_encoder_config.layer_norm_eps)
        self.dense = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, N, Dv) -> (B, N, D)."""
        return self.dense(self.norm(patches))


class SyncMaskForPreTraining(SyncMaskPairModel):
    r"""SyncMask with its objectives: ITC, ITM, MLM, MIM and, where the configuration asks for it, WPA.

    The forward is the only differentiable call of a training step and is deterministic in its inputs (dropout apart):
    masks, negatives and the teacher's features are given to it. What is not given is skipped: no masks, no MLM and MIM;
    no negatives, no ITM; no teacher, hard ITC targets.
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        self.mlm_head = SyncMaskMlmHead(config)
        rows, columns = self.syncmask.grid
        self.mim_decoder = SyncMaskMimDecoder(
            config.mim_decoder_config,
            image_width=config.vision_config.hidden_size,
            num_prefix=self.syncmask.num_prefix_tokens,
            num_patches=rows * columns,
            patch_dim=self._pixels_per_patch(config),
        )
        self.word_patch_head = SyncMaskWordPatchHead(config) if config.word_patch_alignment else None
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

    def get_output_embeddings(self) -> nn.Module:
        """Return the MLM head's vocabulary matrix."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        """Replace the MLM head's vocabulary matrix."""
        self.mlm_head.decoder = value

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cut photos (B, 3, S, S) into patches (B, N, patch_dim)."""
        return patchify(pixel_values, self.syncmask.grid)

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

    def word_fits(self, image_embeds: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return how well tokens (U,) fit each patch of the photos (B, prefix + N, Dv): (B, N, U).

        A photo fits a token as its best patch does. To be compared between photos or patches, not between tokens: each
        token has a level of its own.

        Raises:
            ValueError: where the model has no such head.
        """
        if self.word_patch_head is None:
            raise ValueError(
                "this model does not align words with patches: its config says word_patch_alignment=False; train it "
                "with wpa_weight above 0."
            )
        patches = self.word_patch_head(image_embeds[:, self.syncmask.num_prefix_tokens :])
        return patches @ self.syncmask.get_input_embeddings()(token_ids).T

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
        teacher_mlm_logits: torch.Tensor | None = None,
        soft_target_weight: float = 0.0,
    ) -> SyncMaskForPreTrainingOutput:
        """Compute the objectives whose inputs are given.

        Args:
            pixel_values: (B, 3, S, S). input_ids, attention_mask: (B, L), the unmasked text, padded on either side.
            item_ids, text_ids: (B,), what counts as the same item or text; every row its own when None.
            text_mask: (B, L) bool, True = hidden token. masked_input_ids: (B, L), the text with the hidden tokens
                replaced; every hidden token becomes [MASK] when None.
            patch_mask: (B, N) bool, True = hidden patch, equally many in every row.
            negative_image_index, negative_text_index: (B,), a row of this slice that does not match; -1 = none.
            teacher_image_feats, teacher_text_feats: (B, P) of the momentum teacher. teacher_temperature: (1,).
            teacher_mlm_logits: (M, V) of the momentum teacher at the M hidden tokens, row by row; None = hard targets.
            soft_target_weight: share of the teacher in the targets of ITC, and of MLM where it is asked, in [0, 1].
        """
        check_together(negative_image_index=negative_image_index, negative_text_index=negative_text_index)
        teacher = Teacher(teacher_image_feats, teacher_text_feats, teacher_temperature, soft_target_weight)
        check_pairs(pixel_values, input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask, input_ids, text_mask, masked_input_ids = text_first(
            attention_mask, input_ids, text_mask, masked_input_ids
        )
        image_embeds = self.syncmask.encode_image(pixel_values)
        text_embeds, masked_embeds = self._encode_texts(input_ids, attention_mask, text_mask, masked_input_ids)
        output = SyncMaskForPreTrainingOutput(
            image_feats=self.syncmask.project_image(image_embeds),
            text_feats=self.syncmask.project_text(text_embeds, attention_mask),
        )
        output.itc_loss = self.contrast(output.image_feats, output.text_feats, item_ids, text_ids, teacher)
        match_rows, masked_rows = [], []
        if negative_image_index is not None:
            match_rows = with_negatives(text_embeds, attention_mask, negative_image_index, negative_text_index)
        if text_mask is not None:
            masked_rows = [FusionRows(masked_embeds, attention_mask, text_mask)]
        output.itm_logits, output.mlm_logits = self._fused_logits(image_embeds, match_rows, masked_rows)
        if match_rows:
            output.itm_loss = negatives_itm_loss(output.itm_logits, negative_image_index, negative_text_index)
        if masked_rows:
            targets = input_ids[text_mask]
            output.mlm_loss = mlm_loss(output.mlm_logits, targets, teacher_mlm_logits, soft_target_weight)
        if patch_mask is not None:
            output.mim_predictions = self.predict_patches(pixel_values, patch_mask, text_embeds, attention_mask)
            output.mim_loss = mim_loss(output.mim_predictions, self.hidden_patches(pixel_values, patch_mask))
        if self.word_patch_head is not None:
            output.wpa_loss = self._aligned_words(image_embeds, input_ids, attention_mask)
        terms = (output.itc_loss, output.itm_loss, output.mlm_loss, output.mim_loss, output.wpa_loss)
        output.loss = sum(term for term in terms if term is not None)
        return SyncMaskForPreTrainingOutput(**output)

    def _aligned_words(self, image_embeds, input_ids, attention_mask) -> torch.Tensor:
        """WPA of this slice: its photos against all tokens of its texts."""
        token_ids, place = input_ids.unique(return_inverse=True)
        real = attention_mask.long()
        counts = real.new_zeros(len(input_ids), len(token_ids)).scatter_add(1, place, real)
        return wpa_loss(self.word_fits(image_embeds, token_ids).amax(dim=1), counts > 0)

    def _encode_texts(self, input_ids, attention_mask, text_mask, masked_input_ids):
        """Encode texts and, where tokens are hidden, their masked versions: (B, L, D), and (B, L, D) or None.

        As one batch, since the gradient of the token embeddings is as large as their table, and so is made once.
        """
        if text_mask is None:
            return self.syncmask.encode_text(input_ids, attention_mask), None
        if masked_input_ids is None:
            masked_input_ids = input_ids.masked_fill(text_mask, self.config.mask_token_id)
        both = torch.cat([input_ids, masked_input_ids])
        return self.syncmask.encode_text(both, attention_mask.repeat(2, 1)).chunk(2)

    def _fused_logits(self, image_embeds, match_rows: list[FusionRows], masked_rows: list[FusionRows]):
        """Return the logits of ITM (3B, 2) and of MLM (M, V): all 4B rows go through the fusion encoder as one batch.

        A photo's keys and values are projected once; the last layer is run for [CLS] of the ITM rows and for the hidden
        tokens of the MLM rows alone.
        """
        parts = [*match_rows, *masked_rows]
        if not parts:
            return None, None
        rows = weave(parts)
        positions, real = hidden_positions(rows.asked)
        seen = (rows.attention_mask, image_embeds, rows.image_index)
        fusion = self.syncmask.fusion_encoder
        fused = fusion.last(fusion.lower(rows.text_embeds, *seen), *seen, positions)
        fused, real = unweave(fused, parts), unweave(real, parts)
        itm_logits = self.itm_head(torch.cat(fused[:3])[:, 0]) if match_rows else None
        mlm_logits = self.mlm_head(fused[-1][real[-1]]) if masked_rows else None
        return itm_logits, mlm_logits


__all__ = ["SyncMaskForPreTraining"]
