"""`syncmask evaluate` and `syncmask report`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Score a checkpoint by a named protocol; rebuild a run's report.", no_args_is_help=True)


class Protocol(StrEnum):
    """The protocols that run today."""

    ITEMS = "items"
    CO_OCCURRENCE = "co-occurrence"


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="a run folder, its final/ or a checkpoint; a model on the Hub")],
    protocol: Annotated[Protocol, typer.Option(help="what is measured")] = Protocol.ITEMS,
    corpus: Annotated[str | None, typer.Option(help="any corpus source; none = the run's own")] = None,
    split: Annotated[str, typer.Option(help="split that is scored")] = "test",
    out: Annotated[Path | None, typer.Option(help="JSON file; none = results/PROTOCOL.json of the run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, not as a table")] = False,
    max_rows: Annotated[int | None, typer.Option(help="photos that are scored, at most; none = all")] = None,
    rerank_k: Annotated[int, typer.Option(help="items: candidates that the matching head re-ranks; 0 = none")] = 16,
    batch_size: Annotated[int, typer.Option(help="photos a pass")] = 128,
    seed: Annotated[int, typer.Option(help="of samples and intervals")] = 0,
) -> None:
    """Score a checkpoint by a named protocol and write results/PROTOCOL.json."""
    from .co_occurrence_protocol import co_occurrence
    from .loading import load_checkpoint
    from .protocols import items

    loaded = _or_exit(load_checkpoint, checkpoint)
    splits = _or_exit(_corpus, loaded, corpus)
    if split not in splits:
        raise typer.BadParameter(f"the corpus has no split {split!r}; it has {', '.join(splits)}", param_hint="--split")
    about = {"corpus_name": corpus or _own_corpus(loaded), "split": split}
    options = {**about, "max_rows": max_rows, "batch_size": batch_size, "seed": seed}
    if protocol is Protocol.ITEMS:
        result = _or_exit(items, loaded.model, loaded.processor, splits[split], rerank_k=rerank_k, **options)
    else:
        pair = (loaded.processor, splits["train"], splits[split])
        layer = loaded.settings.get("objective", {}).get("mask_layer")
        result = _or_exit(co_occurrence, loaded.teacher, *pair, word_means=loaded.word_means, layer=layer, **options)
    result.model = loaded.about
    path = result.save(out or (loaded.run or Path.cwd()) / "results")
    typer.echo(json.dumps(asdict(result), indent=2) if as_json else f"{result.table()}\n\nwritten to {path}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    corpus: Annotated[str | None, typer.Option(help="any corpus source; none = the run's own")] = None,
    split: Annotated[str, typer.Option(help="split that the pictures are of")] = "test",
) -> None:
    """Rebuild report/index.html of a run from its records, results and final model."""
    from .loading import load_checkpoint
    from .showcase import report_run

    if not (run / "config.yaml").is_file():
        raise typer.BadParameter(f"{run} is no run folder: it has no config.yaml", param_hint="RUN")
    loaded = _or_exit(load_checkpoint, run)
    splits = _or_exit(_corpus, loaded, corpus)
    strategy = loaded.settings.get("objective", {}).get("mask_strategy", "attention")
    path = report_run(
        run, loaded.teacher, loaded.processor, splits[split], strategy, word_means=loaded.word_means.get(strategy)
    )
    typer.echo(f"written to {path}")


def _own_corpus(loaded) -> str:
    """The source that the run was trained on.

    Raises:
        ValueError: the model belongs to no run.
    """
    data = loaded.settings.get("data", {})
    source = data.get("data_dir") if data.get("corpus") == "folder" else data.get("corpus")
    if not source:
        raise ValueError("this model belongs to no run, so its corpus is unknown; say which: --corpus SOURCE")
    return source


def _corpus(loaded, source: str | None):
    """The corpus by its source; the run's columns, filters and seed hold for its own corpus."""
    from syncmask.processing.corpus import load_corpus

    data = loaded.settings.get("data", {})
    if source is not None and source != data.get("corpus"):
        return load_corpus(source)
    generated = data.get("corpus") == "garments"
    return load_corpus(
        _own_corpus(loaded),
        image_column=data.get("image_column"),
        text_column=data.get("text_column"),
        item_id_column=data.get("item_id_column"),
        where=dict(entry.split("=", 1) for entry in data.get("where") or []),
        seed=data.get("corpus_seed", 0),
        num_items=data.get("num_items") if generated else None,
        image_size=data.get("image_size") if generated else None,
    )


def _or_exit(action, *args, **kwargs):
    """Errors that tell the user how to mend them end the command in one line, not in a traceback."""
    try:
        return action(*args, **kwargs)
    except (ValueError, FileNotFoundError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
