"""Transformers' own models as image and text towers: prefix tokens, patch grids, and encoding of kept patches alone."""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

# Tokens that a vision model puts before its patches, DINOv2's registers apart. A family is added here once its
# kept-patch encoding is tested.
PREFIX_TOKENS = {
    "vit": 1,
    "deit": 2,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
}
# Fields of families' configurations that switch on what would stay unused.
SWITCHES = {"siglip_vision_model": "vision_use_head", "dinov2": "use_mask_token"}


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the transformers model of `config` without the parts that would stay unused.

    These are pooling layers and heads, and the mask token that DINOv2 was pretrained with; `config` says so afterwards,
    where its family has a switch.
    """
    if config.model_type in SWITCHES:
        setattr(config, SWITCHES[config.model_type], False)
    try:
        tower = AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # the family has no such layer to leave out
        tower = AutoModel.from_config(config)
    if config.model_type == "dinov2_with_registers":
        # It has no switch: as a buffer that is not saved, the token is no parameter, and loading can still zero it.
        mask_token = tower.embeddings.mask_token.detach()
        del tower.embeddings.mask_token
        tower.embeddings.register_buffer("mask_token", mask_token, persistent=False)
    return tower


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Return how many tokens stand before the patches: [CLS], if there is one, is the first of them.

    Raises:
        ValueError: for a vision family whose kept-patch encoding has not been tested.
    """
    if config.model_type not in PREFIX_TOKENS:
        raise ValueError(
            f"vision model type {config.model_type!r} cannot be an image tower yet: supported are "
            f"{sorted(PREFIX_TOKENS)}. Take one of these, or add it to PREFIX_TOKENS with a test of kept patches."
        )
    return PREFIX_TOKENS[config.model_type] + getattr(config, "num_register_tokens", 0)


def final_tokens(tower: PreTrainedModel, last_hidden_state: torch.Tensor) -> torch.Tensor:
    """Return an image tower's tokens (B, M, Dv) behind its last norm.

    All families but CLIP norm every token. CLIP norms [CLS] alone; here its patches pass the same norm (our choice),
    since the fusion encoder expects tokens of one scale. [CLS] is what CLIP itself goes on with.
    """
    if tower.config.model_type != "clip_vision_model":
        return last_hidden_state
    return tower.post_layernorm(last_hidden_state)


def pool_tokens(image_embeds: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """Sum a photo up: (B, M, Dv) -> (B, Dv), [CLS], or the mean of the patches where there is none.

    SigLIP has a pooling head in place of [CLS]. We leave it out (our choice): it was trained for SigLIP's own space,
    which is not kept, and the mean is as well defined for kept patches and has no weights.
    """
    return image_embeds[:, 0] if num_prefix else image_embeds.mean(dim=1)


def patch_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the rows and columns of patches of one photo.

    Raises:
        ValueError: when the patch size does not divide the photo.
    """
    height, width = _pair(config.image_size)
    rows, columns = _pair(config.patch_size)
    if height % rows or width % columns:
        raise ValueError(
            f"patch_size={config.patch_size} does not divide image_size={config.image_size}; "
            "choose a photo size that is a multiple of the patch size."
        )
    return height // rows, width // columns


def resize_positions(
    table: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int], mode: str = "bicubic", antialias: bool = False
) -> torch.Tensor:
    """Fit positions of patches to another grid as a picture is resized; those of prefix tokens stay.

    Args:
        table: (..., prefix + N, D), patches row by row. grid: its rows and columns. wanted: those of the result.
        mode, antialias: of `interpolate`; bicubic without antialiasing is what ViT, DeiT, CLIP, SigLIP and DINOv2 do.
    """
    if grid == wanted:
        return table
    rows, columns = grid
    prefix, patches = table.flatten(0, -2).split([table.shape[-2] - rows * columns, rows * columns])
    picture = patches.T.unflatten(1, grid).unsqueeze(0)
    resized = nn.functional.interpolate(picture, size=wanted, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([prefix, resized[0].flatten(1).T]).reshape(*table.shape[:-2], -1, table.shape[-1])


def max_text_tokens(tower: PreTrainedModel) -> int:
    """Return how many tokens of a text the tower has positions for.

    RoBERTa's positions begin behind the padding's, so it has fewer than rows in its table.
    """
    table = getattr(tower.embeddings, "position_embeddings", None)
    offset = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
    return tower.config.max_position_embeddings - offset


def patchify(pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cut photos into patches: (B, C, S, S) -> (B, N, C * height * width), row by row.

    Example: a 4 x 4 photo on a (2, 2) grid gives 4 patches of 2 x 2 pixels.
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = grid
    patches = pixel_values.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@contextmanager
def kept_patches(tower: nn.Module, keep: torch.Tensor | None, num_prefix: int):
    """Let `tower` see the prefix tokens and the patches `keep` (B, n) alone, while the context lasts.

    A hook on the tower's embeddings drops the hidden patches after positions are added, as MAE does, so the blocks run
    on fewer tokens. `keep=None` keeps all.
    """
    if keep is None:
        yield
        return

    def drop_hidden(module, args, embeddings):
        prefix = torch.arange(num_prefix, device=keep.device).expand(keep.shape[0], -1)
        index = torch.cat([prefix, keep + num_prefix], dim=1)
        return embeddings.gather(1, index.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1]))

    handle = tower.embeddings.register_forward_hook(drop_hidden)
    try:
        yield
    finally:
        handle.remove()


def _pair(size: int | list | tuple) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
