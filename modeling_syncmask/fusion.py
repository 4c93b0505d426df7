"""The cross-attention encoder (text queries attend to image tokens) and the masked-image decoder of the same layers."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_syncmask import SyncMaskFusionEncoderConfig, SyncMaskMimDecoderConfig


def take_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick tokens: states (R, L, D) and positions (R, Q) give (R, Q, D)."""
    return states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`: returns the output (R, L, H, d) and the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SyncMaskAttention(nn.Module):
    """Queries of one sequence attend to the tokens of the same or of another one."""

    def __init__(self, config: SyncMaskFusionEncoderConfig, key_size: int):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False  # SDPA decides from this when no mask is given
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_size, config.hidden_size)
        self.value = nn.Linear(key_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_index: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: hidden_states (R, Q, D) to key_states (B, M, E); `key_index` (n,) is what the last n rows attend to.

        The R - n rows before them are shared out evenly: the first few attend to the first of B, and so on. Keys and
        values are projected once for each of the B rows, not once for each of the R, and copied for the n rows alone.
        """
        query, key, value = self.query(hidden_states), self.key(key_states), self.value(key_states)
        picked = 0 if key_index is None else key_index.shape[0]  # not len(), which a traced graph takes for a constant
        if picked == 0:
            return self._attend(query, key, value, attention_mask, **kwargs)
        own, other = query.split([query.shape[0] - picked, picked])
        keys = key.index_select(0, key_index), value.index_select(0, key_index)
        output, weights = self._attend(other, *keys, attention_mask, **kwargs)
        if own.shape[0] == 0:
            return output, weights
        return torch.cat([self._attend(own, key, value, attention_mask, **kwargs)[0], output]), None

    def _attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Projected states (R, Q, D), (B, M, D), (B, M, D) -> (R, Q, D): R / B rows are one long row of queries."""
        shape = query.shape
        if query.shape[0] != key.shape[0]:
            query = query.reshape(key.shape[0], -1, query.shape[-1])
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return output.reshape(shape), weights

    def scores(self, hidden_states: torch.Tensor, key_states: torch.Tensor) -> torch.Tensor:
        """Return the raw scaled scores (R, H, Q, M) before any softmax."""
        query, key = self._heads(self.query(hidden_states)), self._heads(self.key(key_states))
        return query @ key.transpose(2, 3) * self.scaling

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (R, L, D) -> (R, H, L, d)


class SyncMaskFusionLayer(GradientCheckpointingLayer):
    """BERT's post-norm layer with cross-attention: self-attention, attention to the other modality, feed-forward."""

    def __init__(self, config: SyncMaskFusionEncoderConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = SyncMaskAttention(config, size)
        self.self_output = nn.Linear(size, size)
        self.self_norm = nn.LayerNorm(size, eps=eps)
        self.cross_attention = SyncMaskAttention(config, config.encoder_hidden_size or size)
        self.cross_output = nn.Linear(size, size)
        self.cross_norm = nn.LayerNorm(size, eps=eps)
        self.intermediate = nn.Linear(size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_index: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states (R, L, D) -> (R, L, D), or (R, Q, D) for the tokens at `query_positions` alone."""
        hidden_states = self.attend_to_self(hidden_states, attention_mask, query_positions, **kwargs)
        attended, _ = self.cross_attention(
            hidden_states, encoder_hidden_states, encoder_attention_mask, encoder_index, **kwargs
        )
        hidden_states = self.cross_norm(hidden_states + self.dropout(self.cross_output(attended)))
        expanded = self.activation(self.intermediate(hidden_states))
        return self.output_norm(hidden_states + self.dropout(self.output(expanded)))

    def attend_to_self(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return the states that query the other modality, (R, L, D) or (R, Q, D)."""
        queries = hidden_states if query_positions is None else take_positions(hidden_states, query_positions)
        attended, _ = self.self_attention(queries, hidden_states, attention_mask, **kwargs)
        return self.self_norm(queries + self.dropout(self.self_output(attended)))


class SyncMaskFusionPreTrainedModel(PreTrainedModel):
    """What the fusion encoder and the decoder share with every transformers model."""

    config: SyncMaskFusionEncoderConfig
    main_input_name = "inputs_embeds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SyncMaskFusionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": SyncMaskFusionLayer,
        "attentions": OutputRecorder(SyncMaskAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(SyncMaskAttention, index=1, layer_name="cross_attention"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SyncMaskMimDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            init.normal_(module.position_embeddings, std=self.config.initializer_range)

    def run_layers(
        self,
        layers: Iterable[SyncMaskFusionLayer],
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_index: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Pass (R, L, D) through `layers`; with `query_positions` (R, Q) each of them must be the last.

        attention_mask (R, L) and encoder_attention_mask (R, M): 1 = real token, 0 = padding.

        Raises:
            ValueError: the rows that `encoder_index` says nothing of cannot be shared out evenly to the B others, or
                there is a mask of the others and several rows attend to one.
        """
        rows = hidden_states.shape[0] - (0 if encoder_index is None else encoder_index.shape[0])
        others = encoder_hidden_states.shape[0]
        if rows % others:
            raise ValueError(f"{rows} rows for {others} others; wanted as many for each of them, or an index.")
        if encoder_attention_mask is not None and rows not in (0, others):
            raise ValueError(f"{rows} rows for {others} others with a mask; wanted one for each, or an index of all.")
        queries = hidden_states if query_positions is None else take_positions(hidden_states, query_positions)
        own_mask = self._mask(queries, attention_mask, hidden_states)
        other_mask = self._mask(queries, encoder_attention_mask, encoder_hidden_states)
        for layer in layers:
            hidden_states = layer(
                hidden_states,
                own_mask,
                encoder_hidden_states,
                other_mask,
                encoder_index,
                query_positions,
                **kwargs,
            )
        return hidden_states

    def _mask(self, queries: torch.Tensor, mask: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor | None:
        if mask is None:
            return None
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=keys
        )


class SyncMaskFusionEncoder(SyncMaskFusionPreTrainedModel):
    """Text tokens attend to each other and to image tokens.

    The last layer can be run for some tokens alone (`last`), since only [CLS] matters to ITM and only masked tokens to
    MLM: `last(lower(x), positions)` equals `forward(x)` at those positions.
    """

    def __init__(self, config: SyncMaskFusionEncoderConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([SyncMaskFusionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_index: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithCrossAttentions:
        """Fuse: inputs_embeds (R, L, D), encoder_hidden_states (B, M, E), encoder_index (n,) -> (R, L, D)."""
        fused = self.run_layers(
            self.layers,
            inputs_embeds,
            attention_mask,
            encoder_hidden_states,
            encoder_index=encoder_index,
            **kwargs,
        )
        return BaseModelOutputWithCrossAttentions(last_hidden_state=fused)

    def lower(self, inputs_embeds, attention_mask, encoder_hidden_states, encoder_index=None) -> torch.Tensor:
        """Run all layers but the last: (R, L, D) -> (R, L, D)."""
        return self.run_layers(
            self.layers[:-1],
            inputs_embeds,
            attention_mask,
            encoder_hidden_states,
            encoder_index=encoder_index,
        )

    def last(
        self, hidden_states, attention_mask, encoder_hidden_states, encoder_index=None, query_positions=None
    ) -> torch.Tensor:
        """Run the last layer for the tokens at query_positions (R, Q): (R, L, D) -> (R, Q, D)."""
        return self.run_layers(
            self.layers[-1:],
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_index=encoder_index,
            query_positions=query_positions,
        )

    def last_cls(self, hidden_states, attention_mask, encoder_hidden_states, encoder_index=None) -> torch.Tensor:
        """Run the last layer for [CLS] alone: (R, L, D) -> (R, D)."""
        cls = torch.zeros(hidden_states.shape[0], 1, dtype=torch.long, device=hidden_states.device)
        return self.last(hidden_states, attention_mask, encoder_hidden_states, encoder_index, cls)[:, 0]

    def cross_scores(self, inputs_embeds, attention_mask, encoder_hidden_states, layer: int) -> torch.Tensor:
        """Return the raw cross-attention scores (B, H, L, M) of one layer; the layers above it are not run."""
        hidden = self.run_layers(self.layers[:layer], inputs_embeds, attention_mask, encoder_hidden_states)
        block = self.layers[layer]
        queries = block.attend_to_self(hidden, self._mask(hidden, attention_mask, hidden))
        return block.cross_attention.scores(queries, encoder_hidden_states)


class SyncMaskMimDecoder(SyncMaskFusionPreTrainedModel):
    """Puts mask tokens where patches were hidden and predicts their pixels from the kept ones and the text.

    Args:
        config: widths; `encoder_hidden_size` is the text tower's.
        image_width: width of the image tower's tokens.
        num_prefix, num_patches: tokens before the patches, and patches N of a photo.
        patch_dim: numbers in a patch (channels x height x width).
    """

    config: SyncMaskMimDecoderConfig

    def __init__(
        self,
        config: SyncMaskMimDecoderConfig,
        image_width: int,
        num_prefix: int,
        num_patches: int,
        patch_dim: int,
    ):
        super().__init__(config)
        self.num_prefix = num_prefix
        self.embed = nn.Linear(image_width, config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(num_prefix + num_patches, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([SyncMaskFusionLayer(config) for _ in range(config.num_hidden_layers)])
        self.to_pixels = nn.Linear(config.hidden_size, patch_dim)
        self.post_init()

    def forward(
        self,
        kept_embeds: torch.Tensor,
        keep: torch.Tensor,
        hidden: torch.Tensor,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict hidden patches.

        Args:
            kept_embeds: (B, prefix + n, Dv), the image tower's tokens of the kept patches.
            keep: (B, n) and hidden: (B, k), indices of the kept and of the hidden patches, k + n = N.
            text_embeds: (B, L, D) of the unmasked text; attention_mask (B, L).

        Returns:
            (B, k, patch_dim): standardised pixels of the hidden patches, in the order of `hidden`.
        """
        batch, patches = keep.shape[0], keep.shape[1] + hidden.shape[1]
        tokens = self.embed(kept_embeds)
        canvas = self.mask_token.to(tokens.dtype).expand(batch, patches, -1)
        canvas = canvas.scatter(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), tokens[:, self.num_prefix :])
        states = torch.cat([tokens[:, : self.num_prefix], canvas], dim=1) + self.position_embeddings
        states = self.norm(states)
        states = self.run_layers(self.layers[:-1], states, None, text_embeds, attention_mask)
        queries = hidden + self.num_prefix
        states = self.run_layers(self.layers[-1:], states, None, text_embeds, attention_mask, query_positions=queries)
        return self.to_pixels(states)
