"""Does an export say what torch says? The same photos and texts through both, and the protocol `items` on both.

The exported side runs client.py with its own preprocessing, so a difference of pixels or tokens shows as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from syncmask.evaluation.embedding import Embedder, photos
from syncmask.evaluation.protocols import in_canonical_order, retrieval_metrics
from syncmask.evaluation.result import aligned, percent
from syncmask.processing.corpus import CorpusIndex, fingerprint

from .client import Client
from .encoder import Encoder

TOLERANCE = 1e-4  # of unit vectors, in float32
BATCH = 32
FULL_PRECISION = ("fp32", "openvino")


@dataclass
class Seen:
    """What one side makes of the rows of a corpus.

    Attributes:
        image_feats: (rows, P). text_feats: (distinct texts, P).
        matching: (rows, text ids) -> logits; None without that head.
        query_feats: (rows, P), each photo with another item's text; None without that head.
    """

    image_feats: np.ndarray
    text_feats: np.ndarray
    matching: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    query_feats: np.ndarray | None


def check_export(
    encoder: Encoder, folder: Path, dataset, *, max_rows: int | None = 512, rerank_k: int = 16, seed: int = 0
) -> dict:
    """Compare every precision of an export with torch.

    Args:
        encoder: the model that was exported.
        folder: the export.
        dataset: rows of `load_corpus`.
        max_rows: whole items up to so many photos, a seeded sample; None = all.
        rerank_k: how many of the best by cosine the matching head re-ranks.
        seed: of the sample.

    Returns:
        `photos`, `texts`, `corpus` (fingerprint), `max_abs_difference` (by precision and graph: of unit vectors, and of
        matching logits) and `recall` (by side and metric, in [0, 1]).

    Raises:
        ValueError: unit vectors in float32 differ by 1e-4 or more.
    """
    dataset = in_canonical_order(dataset, max_rows, seed)
    index = CorpusIndex.from_dataset(dataset)
    composed = np.roll(index.text_ids, 1)
    reference = _seen_by_torch(encoder, dataset, index, composed)
    found = {
        "photos": len(dataset),
        "texts": len(index.texts),
        "corpus": fingerprint(dataset),
        "max_abs_difference": {},
        "recall": {"torch": _recalls(reference, index, rerank_k)},
    }
    for precision, client in _clients(folder).items():
        seen = ExportedRows(client, dataset, index).seen(composed)
        found["max_abs_difference"][precision] = _differences(seen, reference, index)
        found["recall"][precision] = _recalls(seen, index, rerank_k)
    _refuse_strangers(found["max_abs_difference"])
    return found


def check_table(check: dict) -> str:
    """What `check_export` found, as plain text: recalls in %, changes in points."""
    precisions = list(check["max_abs_difference"])
    cells = [["largest difference from torch", *precisions]]
    for graph in check["max_abs_difference"]["fp32"]:
        values = [f"{check['max_abs_difference'][precision][graph]:.1e}" for precision in precisions]
        cells.append([f"{graph} (logit)" if graph == "match" else f"{graph} (unit vectors)", *values])
    lines = [f"{check['photos']} photos, {check['texts']} texts", "", *aligned(cells), ""]
    cells = [["items, in %", "torch", *(part for name in precisions for part in (name, "change"))]]
    for metric, value in check["recall"]["torch"].items():
        row = [metric.replace("_", " "), percent(value)]
        for precision in precisions:
            other = check["recall"][precision][metric]
            row += [percent(other), f"{100 * (other - value):+.1f}"]
        cells.append(row)
    return "\n".join([*lines, *aligned(cells)])


# ------------------------------------------------------------------------------------------ both sides
def _seen_by_torch(encoder: Encoder, dataset, index: CorpusIndex, composed: np.ndarray) -> Seen:
    parts = [encoder.encode_image(part, as_numpy=True) for _, part in _photo_batches(dataset)]
    queries = None
    if hasattr(encoder.model, "query_head"):
        queries = [
            encoder.encode_composed(part, [index.texts[text] for text in composed[rows]], as_numpy=True)
            for rows, part in _photo_batches(dataset)
        ]
    matching = None
    if hasattr(encoder.model, "itm_logits"):
        matching = Embedder(encoder.model, encoder.processor, dataset, index, batch_size=BATCH).matching
    return Seen(
        np.concatenate(parts),
        encoder.encode_text(index.texts, as_numpy=True),
        matching,
        None if queries is None else np.concatenate(queries),
    )


class ExportedRows:
    """The rows of a corpus through a client; tokens are kept, so the matching head encodes nothing anew.

    Args:
        client: of one precision. dataset: rows of a corpus. index: its `CorpusIndex`.
    """

    def __init__(self, client: Client, dataset, index: CorpusIndex):
        self.client, self.index = client, index
        outputs = ["image_feats", "image_embeds"]
        parts = [client.run("image", outputs, pixel_values=client.pixels(part)) for _, part in _photo_batches(dataset)]
        self.image_feats, self.image_embeds = (np.concatenate(part) for part in zip(*parts))

    @cached_property
    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T, L, D) and attention mask (T, L) of all texts, padded to the longest of all."""
        tokens = self.client.tokens(self.index.texts)
        cuts = range(BATCH, len(self.index.texts), BATCH)
        ids, masks = np.split(tokens["input_ids"], cuts), np.split(tokens["attention_mask"], cuts)
        parts = [
            self.client.run("text", ["text_embeds"], input_ids=part, attention_mask=mask)[0]
            for part, mask in zip(ids, masks)
        ]
        return np.concatenate(parts), tokens["attention_mask"]

    def seen(self, composed: np.ndarray) -> Seen:
        """All of it; `composed` (rows,) is the text of each row's composed query."""
        graphs = self.client.about["graphs"]
        return Seen(
            self.image_feats,
            self.client.encode_text(self.index.texts),
            self.matching if "match" in graphs else None,
            self._queries(composed) if "query" in graphs else None,
        )

    def matching(self, image_rows: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
        """Logits (n,) of pairs; the keys and values of a photo that is in several are computed once."""
        embeds, mask = self._texts
        scores = np.empty(len(image_rows))
        order = np.argsort(image_rows, kind="stable")
        for part in np.split(order, range(4 * BATCH, len(order), 4 * BATCH)):
            rows, image_index = np.unique(image_rows[part], return_inverse=True)
            scores[part] = self.client.run(
                "match",
                text_embeds=embeds[text_ids[part]],
                attention_mask=mask[text_ids[part]],
                image_embeds=self.image_embeds[rows],
                image_index=image_index.astype(np.int64),
            )[0]
        return scores

    def _queries(self, composed: np.ndarray) -> np.ndarray:
        embeds, mask = self._texts
        parts = []
        for rows in np.split(np.arange(len(composed)), range(BATCH, len(composed), BATCH)):
            texts = composed[rows]
            inputs = {"text_embeds": embeds[texts], "attention_mask": mask[texts]}
            parts += self.client.run("query", image_embeds=self.image_embeds[rows], **inputs)
        return np.concatenate(parts)


def _photo_batches(dataset) -> Iterator[tuple[np.ndarray, list]]:
    for rows in np.split(np.arange(len(dataset)), range(BATCH, len(dataset), BATCH)):
        yield rows, photos(dataset, rows)


def _clients(folder: Path) -> dict[str, Client]:
    """A client for each precision that was exported."""
    known = Client(folder).about["graphs"]["image"]["files"]
    return {name: OpenVinoClient(folder) if name == "openvino" else Client(folder, name) for name in known}


class OpenVinoClient(Client):
    """The client with OpenVINO in place of onnxruntime, in float32 (its own choice is bfloat16 where there is that)."""

    def run(self, graph: str, outputs: list[str] | None = None, **inputs: np.ndarray) -> list[np.ndarray]:
        """See `Client.run`."""
        import openvino

        if graph not in self._sessions:
            file = self.folder / self.about["graphs"][graph]["files"]["openvino"]
            self._sessions[graph] = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = outputs or [output["name"] for output in self.about["graphs"][graph]["outputs"]]
        results = self._sessions[graph](inputs)
        return [results[name] for name in names]


# ------------------------------------------------------------------------------------------- comparing
def _differences(seen: Seen, reference: Seen, index: CorpusIndex) -> dict[str, float]:
    pairs = {
        "image": (seen.image_feats, reference.image_feats),
        "text": (seen.text_feats, reference.text_feats),
    }
    if seen.matching is not None:
        rows = np.arange(len(index.text_ids))
        pairs["match"] = (seen.matching(rows, index.text_ids), reference.matching(rows, index.text_ids))
    if seen.query_feats is not None:
        pairs["query"] = (seen.query_feats, reference.query_feats)
    return {name: float(np.abs(one - other).max()) for name, (one, other) in pairs.items()}


def _recalls(seen: Seen, index: CorpusIndex, rerank_k: int) -> dict[str, float]:
    """The recalls of the protocol `items` (see `evaluation.protocols.items`), without its other readings."""
    firsts = np.unique(index.item_ids, return_index=True)[1]
    gallery = index.text_ids[firsts]
    metrics = retrieval_metrics(
        seen.image_feats,
        seen.text_feats[gallery],
        index.item_ids,
        index.item_ids[firsts],
        matching=seen.matching and (lambda images, texts: seen.matching(images, gallery[texts])),
        rerank_k=rerank_k,
    )
    return {name: metric["value"] for name, metric in metrics.items() if not name.endswith("/chance")}


def _refuse_strangers(differences: dict[str, dict[str, float]]) -> None:
    for precision in FULL_PRECISION:
        for graph, difference in differences.get(precision, {}).items():
            if graph != "match" and not difference < TOLERANCE:  # NaN too
                raise ValueError(
                    f"{graph} vectors of the {precision} export differ from torch's by {difference:.1e}; wanted less "
                    f"than {TOLERANCE:.0e}. Nothing was written; please report it with the model's configuration."
                )
