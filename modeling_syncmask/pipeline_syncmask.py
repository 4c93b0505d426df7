"""Retrieval from a gallery of photos as transformers pipelines: "fashion-retrieval", "fashion-composed-retrieval"."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, Pipeline

from .modeling_composed import SyncMaskForComposedImageRetrieval

Photo = Image.Image | str | os.PathLike | bytes


@dataclass
class Gallery:
    """Candidates that were encoded once, to be asked many times.

    Args:
        photos: as they were given. image_feats: (n, P) float32, unit length, on the CPU.
    """

    photos: list[Photo]
    image_feats: torch.Tensor

    def __len__(self) -> int:
        return len(self.photos)


class SyncMaskGalleryPipeline(Pipeline):
    """What both pipelines share: a gallery, a ranking of it for each query, and saving with all code that is needed."""

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    registered_task: str
    auto_model: type

    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        if self.processor is None:
            raise ValueError("the pipeline needs a SyncMaskProcessor; pass processor=..., or a folder that holds one.")
        self.model.eval()

    def encode_gallery(self, photos: list[Photo], batch_size: int = 32) -> Gallery:
        """Encode candidates: PIL images, paths or the bytes of image files.

        Raises:
            ValueError: no list, an empty one, or a photo that cannot be read.
        """
        if not isinstance(photos, (list, tuple)) or not photos:
            raise ValueError(f"candidates are {type(photos).__name__}; wanted a list of at least one photo.")
        feats = []
        for start in range(0, len(photos), batch_size):
            pixel_values = self._pixel_values(photos[start : start + batch_size])
            with torch.no_grad(), self.device_placement():
                feats.append(self.model.syncmask.get_image_features(pixel_values, return_dict=True).pooler_output)
        return Gallery(list(photos), torch.cat(feats).float().cpu())

    def __call__(self, queries, candidates: list[Photo] | Gallery, **kwargs) -> list[dict] | list[list[dict]]:
        """Rank `candidates` for one query or a list of them; see the class."""
        queries = list(queries) if isinstance(queries, tuple) else queries
        if isinstance(queries, list) and not queries:
            raise ValueError("got an empty list of queries; pass at least one.")
        gallery = candidates if isinstance(candidates, Gallery) else self.encode_gallery(candidates)
        return super().__call__(queries, gallery=gallery, **kwargs)

    def _sanitize_parameters(self, **settings):
        for name, lowest in (("top_k", 1), ("rerank_k", 0)):
            if settings.get(name, lowest) < lowest:
                raise ValueError(f"{name}={settings[name]}; wanted {lowest} or more.")
        return {}, settings, {}

    def postprocess(self, ranking: dict[str, torch.Tensor]) -> list[dict]:
        """Make a list of hits of one query's ranking, tensors (1, k)."""
        hits = []
        for index, vector, matching in zip(*(ranking[name][0].tolist() for name in ("index", "vector", "matching"))):
            known = matching == matching  # not a number where the pair was not matched
            probability = torch.tensor(matching).sigmoid().item() if known else None
            hits.append(
                {
                    "index": index,
                    "vector": vector,
                    "matching": matching if known else None,
                    "probability": probability,
                }
            )
        return hits

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save model, processor and their code: `pipeline(task, folder, trust_remote_code=True)` loads it anywhere."""
        # Set here too, since what was loaded as remote code was never registered.
        self._registered_impl = {self.registered_task: {"impl": type(self), "pt": (self.auto_model,)}}
        parts = {
            type(self.model): self.auto_model.__name__,
            type(self.model.config): "AutoConfig",
            type(self.processor): "AutoProcessor",
            type(self.processor.image_processor): "AutoImageProcessor",
        }
        with saved_with_code(parts):
            super().save_pretrained(save_directory, **kwargs)
            self.processor.save_pretrained(save_directory)

    def _pixel_values(self, photos: list[Photo]) -> torch.Tensor:
        return self.processor(images=list(photos)).to(self.dtype).to(self.device)["pixel_values"]


class SyncMaskRetrievalPipeline(SyncMaskGalleryPipeline):
    r"""Text-to-photo and photo-to-photo retrieval: cosines rank the gallery, the matching head re-ranks its best.

    Queries are texts (`str`) or photos (PIL images, paths as `os.PathLike`, bytes), one or a list; `{"text": ...}` and
    `{"image": ...}` say which it is, where a path is a plain string. A photo as a query is not re-ranked, since photos
    are matched with texts.

    Args, of a call:
        candidates: photos (PIL images, paths, bytes), or what `encode_gallery` made of them.
        top_k: hits to return. rerank_k: candidates that the matching head sees, 0 for none; they stand first.

    Returns, for each query, hits, best first: `index` among the candidates; `vector`, the cosine; `matching`, logit of
    match less logit of no match, and `probability`, its sigmoid, both None where the pair was not matched.

    Example:

    ```python
    >>> import syncmask
    >>> from transformers import pipeline
    >>> search = pipeline("fashion-retrieval", model="runs/quickstart/final")
    >>> search("a red dress", candidates=["a.jpg", "b.jpg"])
    [{'index': 1, 'vector': 0.41, 'matching': 2.2, 'probability': 0.9}, {'index': 0, ...}]
    ```
    """

    registered_task = "fashion-retrieval"
    auto_model = AutoModelForZeroShotImageClassification

    def preprocess(self, query: str | Photo | dict) -> dict[str, torch.Tensor]:
        """Turn a query into the model's inputs.

        Raises:
            ValueError: a dictionary that is neither a text nor a photo.
        """
        if not isinstance(query, dict):
            query = {"text" if isinstance(query, str) else "image": query}
        if set(query) not in ({"text"}, {"image"}):
            raise ValueError(f"the query has {sorted(query)}; wanted 'text' or 'image' (for both there is composed).")
        if "text" in query:
            return self.processor(text=[query["text"]])
        return self.processor(images=[query["image"]]).to(self.dtype)

    def _forward(self, inputs, gallery: Gallery, top_k: int = 10, rerank_k: int = 10) -> dict[str, torch.Tensor]:
        base = self.model.syncmask
        if "pixel_values" in inputs:
            return _ranking(base.get_image_features(inputs["pixel_values"], return_dict=True), gallery, top_k)
        text = base.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=True)
        ranking = _ranking(text, gallery, max(top_k, rerank_k))
        for row, best in enumerate(ranking["index"][:, :rerank_k].tolist() if rerank_k else []):
            image_embeds = base.encode_image(self._pixel_values([gallery.photos[index] for index in best]))
            text_embeds = text.last_hidden_state[row : row + 1].expand(len(best), -1, -1)
            mask = inputs["attention_mask"][row : row + 1].expand(len(best), -1)
            logits = self.model.itm_logits(text_embeds, mask, image_embeds).float().cpu()
            _rerank(ranking, row, logits[:, 1] - logits[:, 0])
        return {name: values[:, :top_k] for name, values in ranking.items()}


class SyncMaskComposedRetrievalPipeline(SyncMaskGalleryPipeline):
    r"""Composed retrieval: a photo and a text that says what should differ, `{"image": ..., "text": ...}`, or a list.

    Args, of a call:
        candidates: photos (PIL images, paths, bytes), or what `encode_gallery` made of them.
        top_k: hits to return.

    Returns, for each query, hits as [`SyncMaskRetrievalPipeline`] does; `matching` and `probability` are None, since
    the model has no matching head. The photo of the query is a hit like any other if it is among the candidates.

    Example:

    ```python
    >>> search = pipeline("fashion-composed-retrieval", model="runs/composed/final")
    >>> search({"image": "shirt.jpg", "text": "the same but in blue"}, candidates=["a.jpg", "b.jpg"])
    ```
    """

    registered_task = "fashion-composed-retrieval"
    auto_model = AutoModel

    def __init__(self, model, **kwargs):
        super().__init__(_with_query_head(model), **kwargs)

    def preprocess(self, query: dict) -> dict[str, torch.Tensor]:
        """Turn a query into the model's inputs.

        Raises:
            ValueError: when it is not a photo with a text.
        """
        if not isinstance(query, dict) or set(query) != {"image", "text"}:
            seen = sorted(query) if isinstance(query, dict) else type(query).__name__
            raise ValueError(f"the query is {seen}; wanted {{'image': photo, 'text': what should differ}}.")
        return self.processor(images=[query["image"]], text=[query["text"]]).to(self.dtype)

    def _forward(self, inputs, gallery: Gallery, top_k: int = 10) -> dict[str, torch.Tensor]:
        query = self.model.get_query_features(
            inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"], return_dict=True
        )
        return _ranking(query, gallery, top_k)


def _ranking(query, gallery: Gallery, k: int) -> dict[str, torch.Tensor]:
    """Rank the k nearest photos by cosine: index, vector and matching (not a number yet), each (B, k)."""
    scores = query.pooler_output.float().cpu() @ gallery.image_feats.T
    vector, index = scores.sort(dim=1, descending=True, stable=True)
    vector, index = vector[:, :k], index[:, :k]
    return {"index": index, "vector": vector, "matching": torch.full_like(vector, torch.nan)}


def _rerank(ranking: dict[str, torch.Tensor], row: int, matching: torch.Tensor):
    """Put the first photos of a row in the order of `matching` (k,), those of equal matching by cosine."""
    k = len(matching)
    order = matching.argsort(descending=True, stable=True)
    ranking["matching"][row, :k] = matching
    for values in ranking.values():
        values[row, :k] = values[row, order]


def _with_query_head(model):
    """Return a composed model: AutoModel, which is all that a saved pipeline may name, gives the base model.

    Raises:
        ValueError: when the model has no query head, and was loaded from nowhere that could hold one.
    """
    if hasattr(model, "query_head"):
        return model
    if not model.name_or_path:
        raise ValueError(
            f"{type(model).__name__} has no query head; give a SyncMaskForComposedImageRetrieval or a checkpoint."
        )
    revision = getattr(model.config, "_commit_hash", None) or "main"
    return SyncMaskForComposedImageRetrieval.from_pretrained(model.name_or_path, revision=revision, dtype=model.dtype)


@contextmanager
def saved_with_code(parts: dict[type, str]) -> Iterator[None]:
    """Let classes save their code, to be found by the named Auto classes, while the context lasts."""
    before = {kind: kind._auto_class for kind in parts}
    try:
        for kind, auto_class in parts.items():
            kind.register_for_auto_class(auto_class)
        yield
    finally:
        for kind, auto_class in before.items():
            kind._auto_class = auto_class


__all__ = ["SyncMaskComposedRetrievalPipeline", "SyncMaskRetrievalPipeline"]
