"""From a protocol's name to its result: which corpus, split and scores each one takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from syncmask import SyncMaskForPreTraining
from syncmask.processing.collator import UnreadablePhoto
from syncmask.processing.corpus import corpus_of_run, load_corpus, source_of_run
from syncmask.processing.readers_fashioniq import load_fashioniq

from .candidates import Candidates
from .co_occurrence_protocol import co_occurrence
from .composed import fashioniq, retrieve_variants
from .fashiongen import fashiongen_sampled
from .loading import Loaded
from .protocol_names import Protocol
from .protocols import fashiongen_full, items
from .recognition import LEVELS, head_scorers, label_list, model_labels, read_labels, recognition, zero_shot
from .result import Result

logger = logging.getLogger(__name__)


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
        labels: file of the label list of recognition, for a model that has none; None = the train split's labels.
        variants: "PRODUCT_COLUMN,COLOUR_COLUMN" makes triplets of the corpus; None = as the run did with its own.
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
    labels: Path | None = None
    variants: str | None = None
    batch_size: int = 128
    seed: int = 0


def run_protocol(loaded: Loaded, request: Request) -> Result:
    """Scores a loaded checkpoint.

    Raises:
        ValueError: the corpus or the model lacks what the protocol needs, or there is no such split; candidates or
            labels for a protocol that takes none; a photo that cannot be read.
        FileNotFoundError: the corpus, or the file of candidates or labels, is not there.
    """
    _check_options(request)
    try:
        result = _run(loaded, request)
    except UnreadablePhoto as problem:
        # Left out in silence, it would make this another test than everybody else's.
        raise ValueError(
            f"{problem} Or leave it out for all models: `syncmask corpus convert SOURCE OUT --verify` and --corpus OUT"
        ) from problem
    result.model = loaded.about
    return result


def _run(loaded: Loaded, request: Request) -> Result:
    if request.protocol.startswith("fashioniq"):
        return _fashioniq(loaded, request)
    splits = run_corpus(loaded, request.corpus, request.variants)
    return _on_split(loaded, request, splits, choose_split(splits, request.split))


def _check_options(request: Request) -> None:
    protocol = request.protocol
    if request.candidates is not None and not protocol.startswith("fashiongen-sampled"):
        raise ValueError(f"{protocol} draws no candidates; leave --candidates away")
    if request.labels is not None and protocol.value not in LEVELS:
        raise ValueError(f"{protocol} has no label list; leave --labels away")
    if request.variants is not None and protocol is not Protocol.COLOUR_VARIANTS:
        raise ValueError(f"{protocol} takes no triplets of colour variants; leave --variants away")


def _on_split(loaded: Loaded, request: Request, splits, split: str) -> Result:
    name, rows = request.protocol.value, splits[split]
    about = {"corpus_name": request.corpus or own_corpus(loaded), "split": split}
    sample = about | {"max_rows": request.max_rows, "seed": request.seed}
    options = sample | {"batch_size": request.batch_size}
    model = (loaded.model, loaded.processor)
    if request.protocol is Protocol.CO_OCCURRENCE:
        _check_pretraining(loaded.teacher)
        layer = loaded.settings.get("objective", {}).get("mask_layer")
        data = (loaded.processor, splits["train"], rows)
        return co_occurrence(loaded.teacher, *data, word_means=loaded.word_means, layer=layer, **options)
    if request.protocol is Protocol.COLOUR_VARIANTS:
        return retrieve_variants(*model, rows, **options)
    if name in LEVELS:
        return _recognition(loaded, request, splits["train"], rows, sample)
    if request.rerank_k and not hasattr(loaded.model, "itm_logits"):
        logger.warning("%s has no matching head: itc alone, no itm", type(loaded.model).__name__)
    if name.startswith("fashiongen-sampled"):
        lists = Candidates.load(request.candidates) if request.candidates else None
        return fashiongen_sampled(name, *model, rows, candidates=lists, rerank_k=request.rerank_k, **options)
    whole = items if request.protocol is Protocol.ITEMS else fashiongen_full
    return whole(*model, rows, rerank_k=request.rerank_k, rerank_queries=request.rerank_queries, **options)


def _recognition(loaded: Loaded, request: Request, train, rows, sample: dict) -> Result:
    """By the model's own label list where it has a head, else by a file's or the train split's."""
    level, model = LEVELS[request.protocol.value], (loaded.model, loaded.processor)
    labels, source = model_labels(loaded.model, level), "the model"
    scorers = {} if labels is None else head_scorers(*model, level, request.batch_size)
    if labels is not None and request.labels is not None:
        raise ValueError("this model has a label list of its own, which its head is for; leave --labels away")
    if request.labels is not None:
        labels, source = read_labels(request.labels), str(request.labels)
    known = level in train.column_names and any(train[level])
    trained, commonest = label_list(train, level) if known or labels is None else ([], None)
    if labels is None:
        labels, source = trained, "the train split"
    scorers["zero_shot"] = zero_shot(*model, labels, request.batch_size)
    options = {"commonest": commonest, "label_source": source, **sample}
    return recognition(request.protocol.value, rows, labels, scorers, **options)


def _check_pretraining(model) -> None:
    if not isinstance(model, SyncMaskForPreTraining):
        raise ValueError(
            f"co-occurrence measures the masks of pretraining; a {type(model).__name__} has no heads for masked words "
            "and patches, and finetuning keeps no teacher. Evaluate the pretraining run that it started from"
        )


def _fashioniq(loaded: Loaded, request: Request) -> Result:
    corpus = request.corpus or own_corpus(loaded)
    if request.split not in (None, "validation") or request.max_rows is not None:
        raise ValueError(f"{request.protocol} is measured on all of validation; leave --split and --max-rows away")
    data = load_fashioniq(Path(corpus))
    options = {"corpus_name": corpus, "batch_size": request.batch_size, "seed": request.seed}
    return fashioniq(request.protocol.value, loaded.model, loaded.processor, data, **options)


def choose_split(splits, wanted: str | None) -> str:
    """The split that is wanted, else test, else validation; ValueError where the corpus has no such rows."""
    # A small corpus may have an empty split: its items fall where their hashes do.
    kept = [name for name, rows in splits.items() if len(rows)]
    chosen = wanted or ("test" if "test" in kept else "validation")
    if chosen not in kept:
        what = "row in its split" if chosen in splits else "split"
        raise ValueError(f"the corpus has no {what} {chosen!r}; it has {', '.join(kept)}: --split SPLIT")
    return chosen


def own_corpus(loaded: Loaded) -> str:
    """The source that the run was trained on; ValueError where the model belongs to no run."""
    return source_of_run(loaded.settings.get("data", {}))


def run_corpus(loaded: Loaded, source: str | None, variants: str | None = None):
    """The corpus by its source; the run's columns, filters, triplets and seed hold for its own corpus."""
    data = loaded.settings.get("data", {})
    if source is not None and source != data.get("corpus"):
        return load_corpus(source, variants=variants)
    return corpus_of_run(data, variants)
