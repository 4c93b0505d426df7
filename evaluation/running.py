"""From a protocol's name to its result: which corpus, split and scores each one takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from syncmask.processing.corpus import load_corpus
from syncmask.processing.readers_fashioniq import load_fashioniq

from .candidates import Candidates
from .co_occurrence_protocol import co_occurrence
from .composed import fashioniq
from .fashiongen import fashiongen_sampled
from .loading import Loaded
from .protocol_names import Protocol
from .protocols import fashiongen_full, items
from .recognition import LEVELS, label_list, recognition, zero_shot
from .result import Result


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        protocol: which one.
        corpus: any corpus source; None = the run's own.
        split: None = `test`, or `validation` where there is no test split.
        max_rows: at most this many photos (whole items, a seeded sample); None = all.
        rerank_k: candidates that the matching head re-ranks; 0 = none.
        rerank_queries: queries a direction that it re-ranks for; None = all.
        candidates: frozen lists of a sampled protocol; None = drawn by the seed.
        batch_size: photos a pass.
        seed: of draws, samples and intervals.
    """

    protocol: Protocol
    corpus: str | None = None
    split: str | None = None
    max_rows: int | None = None
    rerank_k: int = 16
    rerank_queries: int | None = None
    candidates: Path | None = None
    batch_size: int = 128
    seed: int = 0


def run_protocol(loaded: Loaded, request: Request) -> Result:
    """Scores a loaded checkpoint.

    Raises:
        ValueError: the corpus lacks what the protocol needs, or it has no such split; candidates for a protocol that
            draws none.
        FileNotFoundError: the corpus or the file of candidates is not there.
    """
    protocol = request.protocol
    if request.candidates is not None and not protocol.startswith("fashiongen-sampled"):
        raise ValueError(f"{protocol} draws no candidates; leave --candidates away")
    if protocol.startswith("fashioniq"):
        result = _fashioniq(loaded, request)
    else:
        splits = run_corpus(loaded, request.corpus)
        split = _split(splits, request.split)
        result = _on_split(loaded, request, splits, split)
    result.model = loaded.about
    return result


def _on_split(loaded: Loaded, request: Request, splits, split: str) -> Result:
    name, rows = request.protocol.value, splits[split]
    about = {"corpus_name": request.corpus or own_corpus(loaded), "split": split}
    sample = about | {"max_rows": request.max_rows, "seed": request.seed}
    options = sample | {"batch_size": request.batch_size}
    model = (loaded.model, loaded.processor)
    if request.protocol is Protocol.CO_OCCURRENCE:
        layer = loaded.settings.get("objective", {}).get("mask_layer")
        data = (loaded.processor, splits["train"], rows)
        return co_occurrence(loaded.teacher, *data, word_means=loaded.word_means, layer=layer, **options)
    if name in LEVELS:
        labels, commonest = label_list(splits["train"], LEVELS[name])
        scorers = {"zero_shot": zero_shot(*model, labels, request.batch_size)}
        return recognition(name, rows, labels, scorers, commonest=commonest, **sample)
    if name.startswith("fashiongen-sampled"):
        lists = Candidates.load(request.candidates) if request.candidates else None
        return fashiongen_sampled(name, *model, rows, candidates=lists, rerank_k=request.rerank_k, **options)
    whole = items if request.protocol is Protocol.ITEMS else fashiongen_full
    return whole(*model, rows, rerank_k=request.rerank_k, rerank_queries=request.rerank_queries, **options)


def _fashioniq(loaded: Loaded, request: Request) -> Result:
    if request.corpus is None:
        raise ValueError(f"{request.protocol} needs FashionIQ's folder: --corpus path/to/fashion_iq")
    if request.split not in (None, "validation") or request.max_rows is not None:
        raise ValueError(f"{request.protocol} is measured on all of validation; leave --split and --max-rows away")
    data = load_fashioniq(Path(request.corpus))
    options = {"corpus_name": request.corpus, "batch_size": request.batch_size, "seed": request.seed}
    return fashioniq(request.protocol.value, loaded.model, loaded.processor, data, **options)


def _split(splits, wanted: str | None) -> str:
    chosen = wanted or ("test" if "test" in splits else "validation")
    if chosen not in splits:
        raise ValueError(f"the corpus has no split {chosen!r}; it has {', '.join(splits)}: --split SPLIT")
    return chosen


def own_corpus(loaded: Loaded) -> str:
    """The source that the run was trained on.

    Raises:
        ValueError: the model belongs to no run.
    """
    data = loaded.settings.get("data", {})
    source = data.get("data_dir") if data.get("corpus") == "folder" else data.get("corpus")
    if not source:
        raise ValueError("this model belongs to no run, so its corpus is unknown; say which: --corpus SOURCE")
    return source


def run_corpus(loaded: Loaded, source: str | None):
    """The corpus by its source; the run's columns, filters and seed hold for its own corpus."""
    data = loaded.settings.get("data", {})
    if source is not None and source != data.get("corpus"):
        return load_corpus(source)
    generated = data.get("corpus") == "garments"
    return load_corpus(
        own_corpus(loaded),
        image_column=data.get("image_column"),
        text_column=data.get("text_column"),
        item_id_column=data.get("item_id_column"),
        where=dict(entry.split("=", 1) for entry in data.get("where") or []),
        seed=data.get("corpus_seed", 0),
        num_items=data.get("num_items") if generated else None,
        image_size=data.get("image_size") if generated else None,
    )
