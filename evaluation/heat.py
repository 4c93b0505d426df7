"""Maps of where words look, drawn on their photos."""

from __future__ import annotations

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from .figures import PHOTO, enlarge
from .typeset import INK, PAPER


def heat_photo(photo: Image.Image, heat: np.ndarray, size: int = PHOTO) -> Image.Image:
    """A photo in light grey under a map of where a word looks, the hottest patch ringed, on a white square.

    Args:
        photo: any PIL image.
        heat: (h, w), at least 0; scaled from its least to its largest value; a constant map shows no heat.
        size: side of the result in pixels.
    """
    heat = np.asarray(heat, dtype=np.float32)
    if heat.ndim != 2:
        raise ValueError(f"heat has shape {heat.shape}; give one map on the grid (h, w)")
    grey = np.asarray(photo.convert("L").resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)
    base = np.repeat(255 - (255 - grey[..., None]) * 0.55, 3, axis=-1)
    spread = float(heat.max() - heat.min())
    flat = spread <= 1e-6 * float(heat.max())
    heat = np.zeros_like(heat) if flat else (heat - heat.min()) / spread
    smooth = np.asarray(Image.fromarray(heat).resize((size, size), Image.Resampling.BILINEAR)).clip(0, 1)
    colour = matplotlib.colormaps["YlOrRd"](0.15 + 0.85 * smooth)[..., :3] * 255
    alpha = 0.85 * smooth[..., None] ** 0.8
    picture = Image.fromarray((base * (1 - alpha) + colour * alpha).round().astype(np.uint8))
    if not flat:
        _ring(picture, heat)
    return in_shape(picture, photo, size)


def _ring(picture: Image.Image, heat: np.ndarray) -> None:
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    height, width = picture.height / heat.shape[0], picture.width / heat.shape[1]
    box = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
    draw = ImageDraw.Draw(picture)
    draw.rectangle(box, outline=PAPER, width=4)
    draw.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=INK, width=2)


def in_shape(square: Image.Image, photo: Image.Image, size: int) -> Image.Image:
    """What was drawn on the square that the model sees, back in the photo's own shape."""
    scale = size / max(photo.size)
    shape = tuple(max(1, round(side * scale)) for side in photo.size)
    return enlarge(square.resize(shape, Image.Resampling.LANCZOS), size)
