"""`syncmask evaluate`, `syncmask compare` and `syncmask report`. Heavy imports wait for the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .exits import or_exit
from .protocol_names import Protocol

app = typer.Typer(help="Score a checkpoint by a named protocol; compare; report.", no_args_is_help=True)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="a run folder, its final/ or a checkpoint; a model on the Hub")],
    protocol: Annotated[Protocol, typer.Option(help="what is measured")] = Protocol.ITEMS,
    corpus: Annotated[str | None, typer.Option(help="any corpus source; none = the run's own")] = None,
    split: Annotated[str | None, typer.Option(help="split that is scored; none = test, else validation")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; none = results/PROTOCOL.json of the run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, not as a table")] = False,
    max_rows: Annotated[int | None, typer.Option(help="photos that are scored, at most; none = all")] = None,
    rerank_k: Annotated[int, typer.Option(help="candidates that the matching head re-ranks; 0 = none")] = 16,
    rerank_queries: Annotated[
        int | None, typer.Option(help="items, fashiongen-full: queries a direction that it re-ranks; none = all")
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="fashiongen-sampled-*: frozen lists (.npz); none = drawn by the seed")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="recognition-*: the label list, one a line or a JSON list; none = the model's, or train's"),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="colour-variants: PRODUCT_COLUMN,COLOUR_COLUMN, for a corpus that holds no triplets"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="photos a pass")] = 128,
    seed: Annotated[int, typer.Option(help="of draws, samples and intervals")] = 0,
) -> None:
    """Score a checkpoint by a named protocol and write results/PROTOCOL.json."""
    from .loading import load_checkpoint
    from .result import check_writable
    from .running import Request, run_protocol

    request = Request(
        protocol=protocol,
        corpus=corpus,
        split=split,
        max_rows=max_rows,
        rerank_k=rerank_k,
        rerank_queries=rerank_queries,
        candidates=candidates,
        labels=labels,
        variants=variants,
        batch_size=batch_size,
        seed=seed,
    )
    loaded = or_exit(load_checkpoint, checkpoint)
    place = out or (loaded.run or Path.cwd()) / "results"
    or_exit(check_writable, place)
    result = or_exit(run_protocol, loaded, request)
    path = or_exit(result.save, place)
    typer.echo(json.dumps(result.content(), indent=2) if as_json else f"{result.table()}\n\nwritten to {path}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="results/PROTOCOL.json of one model")],
    second: Annotated[Path, typer.Argument(help="the same of another model")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, not a table")] = False,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
) -> None:
    """Tell by a paired bootstrap whether two models differ; unlike protocols or corpora are refused."""
    from .compare import compare as compared

    found = or_exit(compared, first, second, seed=seed)
    typer.echo(json.dumps(found.content(), indent=2) if as_json else found.table())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    corpus: Annotated[str | None, typer.Option(help="any corpus source; none = the run's own")] = None,
    split: Annotated[str | None, typer.Option(help="split that is shown; none = test, else validation")] = None,
) -> None:
    """Rebuild report/index.html of a run from its records, results and final model."""
    from .loading import load_checkpoint
    from .reporting import report_run
    from .running import run_corpus

    if not (run / "config.yaml").is_file():
        raise typer.BadParameter(f"{run} is no run folder: it has no config.yaml", param_hint="RUN")
    loaded = or_exit(load_checkpoint, run)
    splits = or_exit(run_corpus, loaded, corpus)
    path = or_exit(report_run, run, loaded, splits, split, corpus=corpus)
    typer.echo(f"written to {path}")
