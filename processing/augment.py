"""Mild, seeded augmentation of a photo.

Mild on purpose: a heavy crop or a strong shift of colour makes words of the text untrue of the photo, and which words
a photo shows is what this method is about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and brightness of a photo that becomes a square.

    Args:
        scale: share of the photo's area that is kept, drawn between the two.
        stretch: the crop's proportions differ from the photo's by at most this factor either way.
        flip: mirror every second photo. Turn it off where left and right matter to the texts.
        brightness: factor drawn from 1 - brightness to 1 + brightness.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Augmentation()(Image.new("RGB", (80, 60)), 32, rng).shape
        (3, 32, 32)
    """

    scale: tuple[float, float] = (0.8, 1.0)
    stretch: float = 1.1
    flip: bool = True
    brightness: float = 0.1

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale is {self.scale}; wanted 0 < low <= high <= 1 (shares of the photo's area).")
        if self.stretch < 1 or not 0 <= self.brightness < 1:
            raise ValueError(f"got stretch {self.stretch}, brightness {self.brightness}; wanted >= 1, in [0, 1).")

    @property
    def smallest_side(self) -> float:
        """The least share of a side that a crop keeps."""
        return min(1.0, (self.scale[0] / self.stretch) ** 0.5)

    def __call__(
        self, image: Image.Image, size: int, rng: np.random.Generator, resample: int = Image.Resampling.BICUBIC
    ) -> np.ndarray:
        """(3, size, size) uint8 of an RGB photo; draws the same six numbers whatever the settings."""
        area, stretch, left, top, light, mirror = rng.random(6)
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        factor = self.stretch ** (stretch - 0.5)  # of the width, its inverse of the height
        width = image.width * min(1.0, area**0.5 * factor)
        height = image.height * min(1.0, area**0.5 / factor)
        left, top = left * (image.width - width), top * (image.height - height)
        image = image.resize((size, size), resample, box=(left, top, left + width, top + height))
        pixels = np.asarray(image).astype(np.float32) * (1 + self.brightness * (2 * light - 1))
        pixels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
        if self.flip and mirror < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
