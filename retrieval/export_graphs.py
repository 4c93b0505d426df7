"""The parts of a model that are exported, each a module of tensors to tensors with the names of its dynamic axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Graph:
    """One ONNX file to be.

    Attributes:
        about: what it computes, for the description.
        module: takes `inputs`, gives a tuple of `outputs`.
        inputs: examples by name; their sizes differ, so that no axis is taken for another.
        axes: names of the leading, dynamic axes of each input; equal names are equal sizes.
        outputs: names.
    """

    about: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    axes: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]


class ImageTower(nn.Module):
    """pixel_values (B, 3, H, W) -> image_feats (B, P), image_embeds (B, prefix + N, Dv)."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, pixel_values):
        """See the class."""
        image_embeds = self.base.encode_image(pixel_values)
        return self.base.project_image(image_embeds), image_embeds


class TextTower(nn.Module):
    """input_ids, attention_mask (B, L) -> text_feats (B, P), text_embeds (B, L, D)."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, input_ids, attention_mask):
        """See the class."""
        text_embeds = self.base.encode_text(input_ids, attention_mask)
        return self.base.project_text(text_embeds, attention_mask), text_embeds


class MatchingHead(nn.Module):
    """Texts (R, L, D) and the photos image_embeds[image_index] -> (R,), logit of match less logit of no match."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text_embeds, attention_mask, image_embeds, image_index):
        """See the class."""
        logits = self.model.itm_logits(text_embeds, attention_mask, image_embeds, image_index)
        return (logits[:, 1] - logits[:, 0],)


class QueryHead(nn.Module):
    """Texts (B, L, D) and reference photos (B, M, Dv), row by row -> (B, P), queries for photos' vectors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text_embeds, attention_mask, image_embeds):
        """See the class."""
        base = self.model.syncmask
        fused_cls = base.fuse_cls(text_embeds, attention_mask, image_embeds)
        text_feats = base.project_text(text_embeds, attention_mask)
        return (self.model.query_head(base.project_image(image_embeds), text_feats, fused_cls),)


def graphs_of(model) -> dict[str, Graph]:
    """The graphs of any SyncMask model: "image", "text", and "match" and "query" where it has these heads."""
    base = base_of(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *photo_size(base.config), generator=generator)
    ids = torch.randint(base.config.text_config.vocab_size, (3, 5), generator=generator)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4])[:, None]).long()
    found = {
        "image": Graph(
            "photos to unit-length vectors (image_feats) and to the tokens that match and query take (image_embeds)",
            ImageTower(base),
            {"pixel_values": pixels},
            {"pixel_values": ("batch",)},
            ("image_feats", "image_embeds"),
        ),
        "text": Graph(
            "texts to unit-length vectors (text_feats) and to the tokens that match and query take (text_embeds)",
            TextTower(base),
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length")},
            ("text_feats", "text_embeds"),
        ),
    }
    with torch.no_grad():
        image_embeds, text_embeds = base.encode_image(pixels), base.encode_text(ids, mask)
    if hasattr(model, "itm_logits"):
        found["match"] = _matching(model, text_embeds, mask, image_embeds)
    if hasattr(model, "query_head"):
        found["query"] = _querying(model, text_embeds, mask, image_embeds[[0, 1, 1]])
    return found


def base_of(model):
    """The SyncMaskModel of any SyncMask class."""
    return getattr(model, "syncmask", model)


def photo_size(config) -> tuple[int, int]:
    """Height and width of the image tower's photos."""
    size = config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _matching(model, text_embeds, mask, image_embeds) -> Graph:
    pairs = ("pairs", "length")
    return Graph(
        "row r: does text r match photo image_index[r]? The logit of match less that of no match; its sigmoid is the "
        "probability. A photo's tokens are given once, however many texts it is compared with",
        MatchingHead(model),
        {
            "text_embeds": text_embeds,
            "attention_mask": mask,
            "image_embeds": image_embeds,
            "image_index": torch.tensor([0, 1, 1]),
        },
        {"text_embeds": pairs, "attention_mask": pairs, "image_embeds": ("images",), "image_index": ("pairs",)},
        ("match_logit",),
    )


def _querying(model, text_embeds, mask, image_embeds) -> Graph:
    texts = ("batch", "length")
    return Graph(
        "a reference photo and what should differ from it, row by row, to a unit-length query for photos' vectors",
        QueryHead(model),
        {"text_embeds": text_embeds, "attention_mask": mask, "image_embeds": image_embeds},
        {"text_embeds": texts, "attention_mask": texts, "image_embeds": ("batch",)},
        ("query_feats",),
    )
