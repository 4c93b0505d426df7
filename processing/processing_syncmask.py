"""Photos and texts to tensors: `SyncMaskImageProcessor`, `SyncMaskProcessor` and the definition of a word.

This file travels to the Hub as remote code, so it imports nothing of the project.
"""

from __future__ import annotations

import os
import re
import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, load_image
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

REMOTE = ("http://", "https://", "data:image/")


# ---------------------------------------------------------------------------------------------- words
def _is_outer(character: str) -> bool:
    """Punctuation, symbols, control characters; never letters, digits or the marks that belong to them."""
    return unicodedata.category(character)[0] in "PSC"


def split_words(text: str) -> list[tuple[int, int]]:
    """Character spans of the words of a text: whitespace-separated units without their outer punctuation.

    A unit that is only punctuation is no word. Every part of the project that speaks of words means these.

    Example:
        >>> text = "A v-neck, (cotton) -- 2.5 cm"
        >>> [text[start:end] for start, end in split_words(text)]
        ['A', 'v-neck', 'cotton', '2.5', 'cm']
    """
    spans = []
    for unit in re.finditer(r"\S+", text):
        start, end = unit.span()
        while start < end and _is_outer(text[start]):
            start += 1
        while end > start and _is_outer(text[end - 1]):
            end -= 1
        if start < end:
            spans.append((start, end))
    return spans


def align_words(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Index of the word that each token belongs to; -1 for special, padding and outer punctuation tokens.

    Args:
        offsets: (L, 2) character span of each token, start == end for tokens that stand for no text.
        spans: the words of the same text, from `split_words`.

    Returns:
        (L,) int64.

    Example:
        >>> align_words(np.array([[0, 0], [0, 3], [3, 4], [5, 8]]), [(0, 3), (5, 8)]).tolist()
        [-1, 0, -1, 1]
    """
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    token_starts, token_ends = np.asarray(offsets, dtype=np.int64).T
    # The first word that ends behind the token's first character; the token is its own if they overlap.
    word = np.searchsorted(ends, token_starts, side="right")
    begins = np.append(starts, np.iinfo(np.int64).max)[word]
    return np.where((token_ends > token_starts) & (begins < token_ends), word, -1)


# --------------------------------------------------------------------------------------------- images
def open_image(source: str | os.PathLike | bytes | Image.Image, at_least: int | None = None) -> Image.Image:
    """Open a photo from a path, a web address or the bytes of an image file, and read its pixels.

    Args:
        source: see above; a PIL image comes back as it is.
        at_least: decode a JPEG at a half, a quarter or an eighth of its size, as far as both sides keep this many
            pixels; faster, and pixels differ a little. None = at its own size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image or is cut short; the message names it and says why.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith(REMOTE):
        return load_image(source)
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name} does not exist. Check the path; it is taken from {os.getcwd()!r}.")
    try:
        image = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # other formats take no notice
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a photo ({error}). Mend or remove the file.") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any photo as an upright 8-bit RGB one; a photo that is one already comes back itself, read but not copied.

    The camera's orientation tag is applied; transparency is laid on white, as shops show their products;
    16-bit greys are scaled down; of an animation the first frame counts.

    Raises:
        ValueError: a mode that has no agreed way to RGB (such as LAB).

    Example:
        >>> to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if getattr(image, "is_animated", False) and image.tell() != 0:
        image.seek(0)
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image of mode {image.mode!r} cannot become RGB; save it as PNG.") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        # Asked first, since Pillow copies what is upright already: a tenth of the time of a small photo.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return image  # A broken tag block says nothing of the orientation; the pixels are fine.


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Pixel values as bytes: floats of [0, 1] or [0, 255], 16-bit and other integers, booleans."""
    if array.dtype == np.uint8:
        return array
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    fractional = np.issubdtype(array.dtype, np.floating) or array.dtype == bool
    if not (low >= 0 and high <= (255 if fractional else 65535)):
        raise ValueError(
            f"pixel values run from {low:.4g} to {high:.4g}; wanted floats of [0, 1], bytes of [0, 255] or "
            "16-bit integers. Undo any normalisation: the processor does it itself."
        )
    if fractional and high <= 1:
        scale = 255.0
    else:
        scale = 255 / 65535 if array.dtype == np.uint16 or high > 255 else 1.0
    return np.round(array.astype(np.float64) * scale).astype(np.uint8)


def _array_to_image(array: np.ndarray, channels_last: bool | None) -> Image.Image:
    """An array (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels as a photo."""
    if array.ndim == 3:
        if channels_last is None:
            channels_last = array.shape[0] not in (1, 3, 4)
        array = array if channels_last else np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"image array has shape {array.shape}; wanted (H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4.")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


def _flat_images(images) -> list:
    """One image, a batch array or any nesting of lists as a flat list of images."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flat_images(part)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


class SyncMaskImageProcessor(PilBackend):
    """Photos to `pixel_values` (B, 3, S, S) float32, by Pillow alone (no torchvision).

    Takes PIL images, paths, web addresses, bytes of image files, numpy arrays, tensors, and lists of them, in
    any colour mode (see `to_rgb`). Photos are resized to a square, bicubically, then standardised by mean and
    sd .5 (what vision transformers trained on ImageNet-21k expect; configurable like all of it).

    Example:
        >>> SyncMaskImageProcessor(size=32)(Image.new("L", (50, 40)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """

    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, images) -> list:
        """The photos as a flat list, files opened.

        Raises:
            ValueError: no image at all, or a file that is none.
            TypeError: something that is not an image.
        """
        flat = _flat_images(images)
        if not flat:
            raise ValueError("got an empty list of images; pass at least one photo.")
        for position, image in enumerate(flat):
            if isinstance(image, (str, os.PathLike, bytes)):
                flat[position] = open_image(image)
            elif not isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
                raise TypeError(f"image {position} is a {type(image).__name__}; wanted a PIL image, path or array.")
        return flat

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        """One photo as (3, H, W) uint8; with `do_convert_rgb=False` as it comes, channels first."""
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
        if not do_convert_rgb:
            return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format)
        if isinstance(image, np.ndarray):
            channels_last = None if input_data_format is None else str(input_data_format).endswith("last")
            image = _array_to_image(image, channels_last)
        return np.moveaxis(np.asarray(to_rgb(image)), -1, 0)


# ------------------------------------------------------------------------------------------ processor
class SyncMaskProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call, in the form that every transformers of the supported range reads."""

    _defaults = {
        "text_kwargs": {"padding": True, "truncation": True, "return_token_type_ids": False, "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
    }


class SyncMaskProcessor(ProcessorMixin):
    """Photos and texts to the model's inputs.

    `processor(images=..., text=..., return_word_ids=False)` gives `pixel_values` (B, 3, S, S) float32,
    `input_ids` and `attention_mask` (B, L) int64, padded to the longest text and cut at the tokenizer's
    `model_max_length`; with `return_word_ids=True` also `word_ids` (B, L): which word of `split_words` a
    token belongs to, -1 for special, padding and outer punctuation tokens. Tensors unless `return_tensors`
    says otherwise. Never token_type_ids.

    Args:
        image_processor: a `SyncMaskImageProcessor`, or any other of transformers'.
        tokenizer: a fast tokenizer (word ids need its character offsets).

    Raises:
        ValueError: no input, an empty list, an unreadable photo, texts that are no strings.
    """

    valid_processor_kwargs = SyncMaskProcessorKwargs

    def __init__(self, image_processor, tokenizer, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        # A tokenizer's file may hold the length that somebody last cut to, which ProcessorMixin would prefer.
        tokenizer.init_kwargs.pop("max_length", None)

    def __call__(self, images=None, text=None, *, return_word_ids: bool = False, **kwargs):
        """See the class; further keywords go to the image processor and the tokenizer."""
        text = list(text) if isinstance(text, tuple) else text
        if isinstance(text, list) and not text:
            raise ValueError("got an empty list of texts; pass at least one.")
        if not return_word_ids:
            return super().__call__(images=images, text=text, **kwargs)
        if text is None:
            raise ValueError("return_word_ids=True needs text; pass `text` or leave return_word_ids out.")
        if not self.tokenizer.is_fast:
            raise ValueError(f"word ids need a fast tokenizer; {type(self.tokenizer).__name__} is none.")
        wanted = kwargs.get("return_offsets_mapping", False)
        batch = super().__call__(images=images, text=text, **{**kwargs, "return_offsets_mapping": True})
        offsets = batch["offset_mapping"] if wanted else batch.pop("offset_mapping")
        batch["word_ids"] = _word_ids(text, offsets)
        return batch

    @property
    def unused_input_names(self) -> list[str]:
        """What tokenizers may add and the model does not take."""
        return ["token_type_ids"]


def _word_ids(text: str | list[str], offsets):
    """Word ids in the container that the offsets came in (tensor, array or lists)."""
    if isinstance(text, str):
        if isinstance(offsets, list):
            return align_words(offsets, split_words(text)).tolist()
        text = [text]
    rows = [align_words(row, split_words(one)) for one, row in zip(text, offsets, strict=True)]
    if isinstance(offsets, list):
        return [row.tolist() for row in rows]
    rows = np.stack(rows)
    return torch.from_numpy(rows) if isinstance(offsets, torch.Tensor) else rows
