"""Transformers' own models as image and text towers: prefix tokens, patch grids, and encoding of kept patches alone."""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

# Tokens that a vision model puts before its patches. A family is added here once its kept-patch encoding is tested.
PREFIX_TOKENS = {"vit": 1, "deit": 2}


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the transformers model of `config`, without a pooling layer where it has one (it would stay unused)."""
    try:
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # the family has no such layer to leave out
        return AutoModel.from_config(config)


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Return how many tokens stand before the patches.

    Raises:
        ValueError: for a vision family whose kept-patch encoding has not been tested.
    """
    if config.model_type not in PREFIX_TOKENS:
        raise ValueError(
            f"vision model type {config.model_type!r} cannot be an image tower yet: supported are "
            f"{sorted(PREFIX_TOKENS)}. Take one of these, or add it to PREFIX_TOKENS with a test of kept patches."
        )
    return PREFIX_TOKENS[config.model_type]


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
