"""Photos and texts to vectors, and pairs of them to matching scores: a trained model behind three calls."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize as to_unit_length

import syncmask
from syncmask import SyncMaskConfig, SyncMaskProcessor
from syncmask.evaluation.embedding import by_photo
from syncmask.evaluation.loading import model_folder

Photo = Image.Image | str | os.PathLike | bytes

# Counted up when the way from a photo or text to its vector changes in this file or the processor.
ENCODING = 1
TOWERS = ("vision_model.", "vision_projection.", "text_model.", "text_projection.")


class Encoder:
    """A SyncMask model of any class with its processor, in eval mode, without gradients.

    Vectors are float32 and of unit length, so that a dot product is a cosine; photos and texts share one space.

    Args:
        model: any SyncMask class; moved to the device and put in eval mode.
        processor: its `SyncMaskProcessor`.
        device: where it runs; an accelerator if there is one, else the CPU.

    Attributes:
        name: where the model came from; "" for one that was made in memory.

    Example:
        >>> encoder = Encoder.from_pretrained("runs/quickstart")  # doctest: +SKIP
        >>> encoder.encode_text(["a red hat"]) @ encoder.encode_image(["hat.jpg"]).T  # doctest: +SKIP
        tensor([[0.41]])
    """

    def __init__(self, model, processor: SyncMaskProcessor, device: str | torch.device | None = None):
        self.device = torch.device(device or _best_device())
        self.model, self.processor = model.to(self.device).eval(), processor
        self._base = getattr(model, "syncmask", model)
        self.name = getattr(model, "name_or_path", "")

    @classmethod
    def from_pretrained(
        cls,
        name_or_run: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Encoder:
        """Load a run folder, a saved model's folder, or a model on the Hub, as the class that it was saved as.

        Args:
            name_or_run: of a run, its final/ is taken.
            device: see the class.
            dtype: of the weights. bfloat16 is about twice as fast where the processor has it, and another `revision`.

        Raises:
            FileNotFoundError: a folder without a model.
            ValueError: a model of another kind.
        """
        syncmask.register_auto_classes()  # the `syncmask` command leaves it to those who need it
        home = model_folder(name_or_run)
        config = SyncMaskConfig.from_pretrained(home)
        return cls(
            _model_class(config, home).from_pretrained(home, dtype=dtype),
            SyncMaskProcessor.from_pretrained(home),
            device,
        )

    @property
    def dim(self) -> int:
        """P, the length of a vector."""
        return self._base.config.projection_dim

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that the model reads."""
        return self.processor.tokenizer.model_max_length

    @cached_property
    def revision(self) -> str:
        """Name (64 hexadecimal digits) of what a vector depends on: the weights of both towers and the preprocessing.

        Vectors of equal revisions can be compared. The heads do not count: a new matching head needs no new vectors.
        """
        digest = hashlib.sha256(f"encoding {ENCODING}".encode())
        weights = self._base.state_dict()
        for name in sorted(name for name in weights if name.startswith(TOWERS)):
            tensor = weights[name].detach().cpu().contiguous()
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        digest.update(_preprocessing(self.processor).encode())
        return digest.hexdigest()

    def encode_image(
        self, photos: Sequence[Photo], batch_size: int = 32, normalize: bool = True, as_numpy: bool = False
    ) -> torch.Tensor | np.ndarray:
        """Photos to vectors.

        Args:
            photos: PIL images, paths or the bytes of image files.
            batch_size: photos a pass.
            normalize: to unit length; False leaves the projection as it is.
            as_numpy: an array in place of a tensor.

        Returns:
            (n, P) float32 on the CPU; (0, P) for no photos.

        Raises:
            ValueError: a photo that cannot be read; the message names it.
            FileNotFoundError: a path without a file.
        """

        def project(part):
            return self._base.vision_projection(self._base.pool_image(self._image_embeds(part)))

        return self._encode(project, _listed(photos, "photos"), batch_size, normalize, as_numpy)

    def encode_text(
        self, texts: Sequence[str], batch_size: int = 32, normalize: bool = True, as_numpy: bool = False
    ) -> torch.Tensor | np.ndarray:
        """Texts to vectors (n, P), see `encode_image`; a text longer than the model reads is cut (see `cut_texts`)."""

        def project(part):
            return self._base.text_projection(self._base.pool_text(*self._text_embeds(part)))

        return self._encode(project, _listed(texts, "texts"), batch_size, normalize, as_numpy)

    def encode_composed(
        self,
        photos: Sequence[Photo],
        texts: Sequence[str],
        batch_size: int = 32,
        normalize: bool = True,
        as_numpy: bool = False,
    ) -> torch.Tensor | np.ndarray:
        """Photos with what should differ from them, row by row, to query vectors (n, P) for photo vectors.

        They come from the query head of `SyncMaskForComposedImageRetrieval`. A model of another class has none: its
        queries are the sums of both towers' vectors, which is where that head starts (our choice).

        Raises:
            ValueError: unequal numbers of photos and texts, or an unreadable photo.
        """
        pairs = _paired(photos, texts)
        query = self._query_head if hasattr(self.model, "get_query_features") else self._summed
        return self._encode(query, pairs, batch_size, normalize, as_numpy)

    @torch.no_grad()
    def match(self, photos: Sequence[Photo], texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """How well each photo matches the text in its row: logit of match less logit of no match, (n,) float32.

        The same photo or text may stand in many rows: photos given as the same object or path are encoded once for up
        to 4 `batch_size` pairs.

        Raises:
            ValueError: a model without a matching head, unequal numbers of photos and texts, or an unreadable photo.
        """
        if not hasattr(self.model, "itm_logits"):
            raise ValueError(
                f"{type(self.model).__name__} has no matching head; wanted SyncMaskForImageTextRetrieval or "
                "SyncMaskForPreTraining. Search without re-ranking, or load such a model."
            )
        pairs = _paired(photos, texts)
        photo_keys = [photo if isinstance(photo, (str, os.PathLike)) else id(photo) for photo, _ in pairs]
        scores = np.empty(len(pairs), dtype=np.float32)
        for rows in by_photo(np.array(_number(photo_keys), dtype=np.int64), 4 * batch_size):
            images = [self._image_embeds(part) for part in _parts([pairs[row][0] for row in rows[:, 0]], batch_size)]
            texts = [pairs[row][1] for row in rows.ravel()]
            text_of = _number(texts)
            embeds, mask = self._text_embeds(_firsts(texts, text_of))
            logits = self.model.itm_logits(embeds[text_of], mask[text_of], torch.cat(images))
            scores[rows] = (logits[:, 1] - logits[:, 0]).float().cpu().numpy().reshape(rows.shape)
        return scores

    def cut_texts(self, texts: Sequence[str]) -> list[int]:
        """The rows of the texts whose end the model does not read, since they have too many tokens."""
        tokens = self.processor.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [row for row, ids in enumerate(tokens) if len(ids) > self.max_tokens]

    # ------------------------------------------------------------------------------------------------ parts
    @torch.no_grad()
    def _encode(self, project: Callable, rows: list, batch_size: int, normalize: bool, as_numpy: bool):
        parts = [project(part).float().cpu() for part in _parts(rows, batch_size)]
        feats = torch.cat(parts) if parts else torch.empty(0, self.dim)
        feats = to_unit_length(feats, dim=-1) if normalize else feats
        return feats.numpy() if as_numpy else feats

    def _image_embeds(self, photos: Sequence[Photo]) -> torch.Tensor:
        return self._base.encode_image(self._pixels(photos))

    def _pixels(self, photos: Sequence[Photo]) -> torch.Tensor:
        pixels = self.processor(images=list(photos))["pixel_values"]
        return pixels.to(self.device, self._base.dtype)

    def _text_embeds(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (n, L, D) and attention mask (n, L)."""
        ids, mask = self._tokens(texts)
        return self._base.encode_text(ids, mask), mask

    def _tokens(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.processor(text=list(texts))
        return inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)

    def _query_head(self, pairs: list[tuple[Photo, str]]) -> torch.Tensor:
        photos, texts = zip(*pairs)
        ids, mask = self._tokens(texts)
        return self.model.get_query_features(self._pixels(photos), ids, mask).pooler_output

    def _summed(self, pairs: list[tuple[Photo, str]]) -> torch.Tensor:
        photos, texts = zip(*pairs)
        images = self._base.project_image(self._image_embeds(photos))
        return images + self._base.project_text(*self._text_embeds(texts))


def _model_class(config: SyncMaskConfig, home: Path | str):
    """The class that a model was saved as."""
    name = (config.architectures or ["none"])[0]
    if not name.startswith("SyncMask") or name not in syncmask.__all__:
        known = [known for known in syncmask.__all__ if known.startswith(("SyncMaskModel", "SyncMaskFor"))]
        raise ValueError(f"{home} holds a model of class {name!r}; wanted one of {', '.join(known)}.")
    return getattr(syncmask, name)


def _best_device() -> str | torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"


def _preprocessing(processor: SyncMaskProcessor) -> str:
    """All that decides about pixels and tokens, as one string."""
    images = processor.image_processor.to_dict()
    # Where it was loaded from, and by which class name, changes nothing.
    images = {name: value for name, value in images.items() if not name.startswith("_") and "processor" not in name}
    tokenizer = processor.tokenizer
    words = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # of the last call
        words.pop(state, None)
    return json.dumps([images, words, tokenizer.model_max_length], sort_keys=True, default=str)


def _listed(rows: Sequence, name: str) -> list:
    if isinstance(rows, (str, bytes, os.PathLike, Image.Image)):
        raise ValueError(f"{name} is a single {type(rows).__name__}; wanted a list. Write [it] for a list of one.")
    return list(rows)


def _paired(photos: Sequence[Photo], texts: Sequence[str]) -> list[tuple[Photo, str]]:
    photos, texts = _listed(photos, "photos"), _listed(texts, "texts")
    if len(photos) != len(texts):
        raise ValueError(f"got {len(photos)} photos and {len(texts)} texts; wanted as many of each, row by row.")
    return list(zip(photos, texts))


def _parts(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _number(keys: list) -> list[int]:
    """Equal keys as equal numbers, counted in order of first appearance."""
    numbers: dict = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _firsts(rows: list, numbers: list[int]) -> list:
    """The first row of each number, in the order of the numbers."""
    first: dict[int, object] = {}
    for row, number in zip(rows, numbers):
        first.setdefault(number, row)
    return list(first.values())
