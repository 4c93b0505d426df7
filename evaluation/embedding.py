"""What a model says of the rows of a corpus: features and matching scores, in batches, without gradients."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
import torch
from PIL import Image

from syncmask.processing.collator import read_photo
from syncmask.processing.corpus import CorpusIndex


def batches(processor, dataset, rows: np.ndarray, batch_size: int, device="cpu") -> Iterator[dict]:
    """Model inputs of some rows: pixel_values (B, 3, S, S), input_ids, attention_mask, word_ids (B, L), rows (B,)."""
    texts = dataset.select_columns(["text"])
    for start in range(0, len(rows), batch_size):
        part = np.asarray(rows[start : start + batch_size])
        inputs = processor(images=photos(dataset, part), text=texts[part.tolist()]["text"], return_word_ids=True)
        batch = {name: tensor.to(device) for name, tensor in inputs.items()}
        yield batch | {"rows": torch.from_numpy(part)}


def photos(dataset, rows: np.ndarray) -> list[Image.Image]:
    """The photos of some rows, upright and RGB; one that cannot be read raises UnreadablePhoto with its row."""
    undecoded = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    cells = undecoded[[int(row) for row in rows]]["image"]
    return [read_photo(cell, int(row)) for cell, row in zip(cells, rows)]


def by_photo(image_rows: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Split pairs so that each photo is encoded once and its keys and values serve all its texts.

    Args:
        image_rows: (n,) the photo of each pair. limit: most pairs of a part.

    Returns:
        parts (photos, pairs of each), positions in `image_rows`; those of a line have one photo, and so each photo of a
        part has as many. A photo with more pairs than `limit` has several lines.

    Example:
        >>> [part.tolist() for part in by_photo(np.array([7, 5, 7, 9]), limit=4)]
        [[[1], [3]], [[0, 2]]]
    """
    order = np.argsort(image_rows, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(image_rows[order])) + 1)
    lines = [run[start : start + limit] for run in runs for start in range(0, len(run), limit)]
    for count in sorted({len(line) for line in lines}):
        alike = np.stack([line for line in lines if len(line) == count])
        step = limit // count
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


class Embedder:
    """Features of a corpus's photos and distinct texts, and matching scores of any pairs of them.

    Equal texts are encoded as one, so they have the same features to the bit. The first matching keeps the texts'
    tokens (texts x tokens x width); photos are encoded anew for it, since their tokens would not fit the memory at a
    real size.

    Args:
        model: with `.syncmask`, and for matching with `itm_logits`; its mode is not changed, call `.eval()` before.
        processor: its `SyncMaskProcessor`.
        dataset: rows of a corpus; texts' features alone need none.
        index: its `CorpusIndex`; photos alone need none.
        batch_size: photos or texts a pass.
    """

    def __init__(self, model, processor, dataset, index: CorpusIndex | None = None, *, batch_size: int = 128):
        self.model, self.processor, self.dataset, self.index = model, processor, dataset, index
        self.batch_size = batch_size
        self._tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def can_match(self) -> bool:
        """Whether the model has a matching head; without one there is no score `itm`."""
        return hasattr(self.model, "itm_logits")

    @torch.no_grad()
    def image_feats(self) -> np.ndarray:
        """(rows, P) float32, unit length."""
        parts = []
        for start in range(0, len(self.dataset), self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, len(self.dataset)))
            parts.append(self.model.syncmask.project_image(self._image_embeds(rows)).float().cpu())
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def text_feats(self) -> np.ndarray:
        """(distinct texts, P) float32, unit length, by text id."""
        project = self.model.syncmask.project_text
        parts = [project(embeds, mask).float().cpu() for embeds, mask in self._encoded_texts()]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def matching(self, image_rows: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """Logit of match less logit of no match (n,) for pairs of photos and texts, given by row and text id."""
        embeds, mask = self._text_embeds()
        scores = np.empty(len(image_rows), dtype=np.float64)
        for pairs in by_photo(image_rows, 4 * self.batch_size):
            texts = torch.from_numpy(text_ids[pairs].ravel()).to(embeds.device)
            longest = int(mask[texts].sum(dim=1).max())
            image_embeds = self._image_embeds(image_rows[pairs[:, 0]])
            logits = self.model.itm_logits(embeds[texts, :longest], mask[texts, :longest], image_embeds)
            scores[pairs] = (logits[:, 1] - logits[:, 0]).double().cpu().numpy().reshape(pairs.shape)
        return scores

    def _image_embeds(self, rows: np.ndarray) -> torch.Tensor:
        pixels = self.processor(images=photos(self.dataset, rows))["pixel_values"]
        parts = [self.model.syncmask.encode_image(part.to(self.model.device)) for part in pixels.split(self.batch_size)]
        return torch.cat(parts)

    def _text_embeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (T, L, D) and attention mask (T, L) of all distinct texts, encoded on first use."""
        if self._tokens is None:
            embeds, masks = zip(*self._encoded_texts())
            self._tokens = torch.cat(embeds), torch.cat(masks)
        return self._tokens

    def _encoded_texts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens and attention mask of some distinct texts at a time, all padded to the longest."""
        inputs = self.processor(text=self.index.texts)
        ids, masks = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        for part, mask in zip(ids.split(self.batch_size), masks.split(self.batch_size)):
            yield self.model.syncmask.encode_text(part, mask), mask
