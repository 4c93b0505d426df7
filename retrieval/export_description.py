"""export.json: what a client in any language must know of an exported model, and the tokenizer beside it."""

from __future__ import annotations

from importlib.metadata import version

from PIL import Image
from tokenizers import Tokenizer

from syncmask import SyncMaskImageProcessor
from syncmask.towers import max_text_tokens

from .encoder import Encoder
from .export_graphs import base_of, photo_size

OPSET = 20  # the first with Gelu as one operator; later ones bring these graphs nothing (measured)
DESCRIPTION = "export.json"
TOKENIZER = "tokenizer.json"
PACKAGES = ("syncmask", "torch", "transformers", "onnx", "onnxscript")


def describe(encoder: Encoder) -> dict:
    """All of export.json but `graphs`, which is read from the files, and `check`.

    Raises:
        ValueError: a processor that a client could not follow; the message says what it does.
    """
    return {
        "format": "syncmask-onnx",
        "format_version": 1,
        "opset": OPSET,
        "model": {"class": type(encoder.model).__name__, "revision": encoder.revision},
        "vectors": {
            "dim": encoder.dim,
            "dtype": "float32",
            "compare": "all have length 1, so a dot product is a cosine; those of equal model revisions compare",
        },
        "temperature": {
            "value": base_of(encoder.model).temperature.item(),
            "use": "which of some texts fits a photo: softmax of their dot products / temperature",
        },
        "image": _describe_image(encoder),
        "text": _describe_text(encoder),
        "written_by": {package: version(package) for package in PACKAGES},
    }


def cutting_tokenizer(encoder: Encoder) -> Tokenizer:
    """The tokenizer as one that cuts at the model's length and pads to the longest text of a batch by itself."""
    source = encoder.processor.tokenizer
    tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
    tokenizer.enable_truncation(_max_length(encoder), direction=source.truncation_side)
    tokenizer.enable_padding(
        direction=source.padding_side, pad_id=source.pad_token_id, pad_token=source.pad_token, length=None
    )
    return tokenizer


def _describe_image(encoder: Encoder) -> dict:
    how = encoder.processor.image_processor
    _refuse_other_photos(how, photo_size(base_of(encoder.model).config))
    return {
        "steps": [
            "of an animation take the first frame",
            "turn the photo upright by its EXIF orientation tag",
            "16-bit grey: value * 255 / 65535, rounded half to even",
            "where there is transparency, lay the photo on white",
            "convert to 8-bit RGB (grey: the same value three times; others as Pillow's convert does)",
            "resize to size, each side by itself (no crop, the aspect ratio is not kept), with the filter of resample, "
            "its support widened by the scale when shrinking (antialiasing); round to 8 bits after each of the sides, "
            "width first",
            "x = value * rescale_factor, then (x - mean) / std, a channel",
            "order the axes as layout says",
        ],
        "size": {"height": how.size.height, "width": how.size.width},
        "resample": Image.Resampling(how.resample).name.lower(),
        "resample_is": "of the Pillow library; bicubic there is Keys' cubic with a = -0.5",
        "channel_order": "RGB",
        "rescale_factor": how.rescale_factor if how.do_rescale else 1.0,
        "mean": list(how.image_mean) if how.do_normalize else [0.0, 0.0, 0.0],
        "std": list(how.image_std) if how.do_normalize else [1.0, 1.0, 1.0],
        "layout": "NCHW",
        "dtype": "float32",
    }


def _refuse_other_photos(how, wanted: tuple[int, int]) -> None:
    """What a client does to photos is written down for one image processor, resizing to the model's size."""
    if not isinstance(how, SyncMaskImageProcessor):
        raise ValueError(f"cannot describe {type(how).__name__} to other languages; wanted a SyncMaskImageProcessor.")
    switches = {"do_resize": True, "do_convert_rgb": True, "do_center_crop": False, "do_pad": False}
    other = [f"{name}={getattr(how, name)}" for name, on in switches.items() if bool(getattr(how, name)) != on]
    if other:
        raise ValueError(f"the image processor has {', '.join(other)}; wanted {switches}: only that can be exported.")
    if (how.size.height, how.size.width) != wanted:
        raise ValueError(
            f"the image processor's size is {how.size.height} x {how.size.width}, the model's photos are {wanted[0]} x "
            f"{wanted[1]}; save the model with a processor of its own size."
        )


def _describe_text(encoder: Encoder) -> dict:
    tokenizer = encoder.processor.tokenizer
    return {
        "tokenizer": TOKENIZER,
        "tokenizer_is": "of the Hugging Face tokenizers library, which has bindings to several languages; the file "
        "lower-cases, adds the special tokens, cuts and pads by itself",
        "max_length": _max_length(encoder),
        "truncation_side": tokenizer.truncation_side,
        "padding_side": tokenizer.padding_side,
        "special_tokens": {
            name: {"token": token, "id": tokenizer.convert_tokens_to_ids(token)}
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        },
        "attention_mask": "1 = token of the text, 0 = padding",
        "dtype": "int64",
    }


def _max_length(encoder: Encoder) -> int:
    """Tokens that a text may have; a tokenizer that was never told has a huge one."""
    return min(encoder.processor.tokenizer.model_max_length, max_text_tokens(base_of(encoder.model).text_model))
