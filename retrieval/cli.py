"""`syncmask index`, `search` and `export`. Heavy imports wait for the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from syncmask.evaluation.exits import or_exit

app = typer.Typer(
    help="Index photos, search them.", no_args_is_help=True, rich_markup_mode="markdown", add_completion=False
)

INDEX_EXAMPLES = """Examples:

    syncmask index photos/ shop/ --model runs/quickstart

    syncmask index photos/ shop/ --prune

    syncmask index photos/ shop/ --model runs/better --reembed

    accelerate launch -m syncmask.retrieval.embed photos/ shop/ --model runs/quickstart
"""
SEARCH_EXAMPLES = """Examples:

    syncmask search shop/ "black hoodie with zip"

    syncmask search shop/ "black hoodie with zip" --filter category=Tops --filter "price<50" --sheet hits.html

    syncmask search shop/ "black hoodie with zip" --rerank 32

    syncmask search shop/ --image photo.jpg -k 5 --json

    syncmask search shop/ "with short sleeves" --image photo.jpg
"""
EXPORT_EXAMPLES = """Examples:

    syncmask export runs/quickstart exported/

    syncmask export runs/quickstart exported/ --int8 --openvino --check path/to/photos

    python exported/client.py search photos/ --text "a red hat"
"""
EXPLAIN_EXAMPLES = """Examples:

    syncmask explain runs/quickstart photo.jpg "a black hoodie with a zip" --out why.png

    syncmask explain runs/quickstart photo.jpg "a black hoodie with a zip" --out why.html --other a.jpg --other b.jpg

    syncmask explain runs/quickstart photo.jpg "a black hoodie with a zip" --word hoodie

    syncmask explain runs/quickstart --pointing
"""
APP_EXAMPLES = """Examples:

    syncmask app shop/

    syncmask app shop/ --port 8000 --browser

    syncmask app shop/ --space my_space/
"""


@app.command(epilog=INDEX_EXAMPLES)
def index(
    source: Annotated[
        str, typer.Argument(help="a folder of photos, or any corpus source: photos with metadata, parquet, tar, ...")
    ],
    catalogue: Annotated[str, typer.Argument(help="a folder, made if it is not there; or an object store's address")],
    model: Annotated[
        str | None, typer.Option(help="a run, its final/ or a model on the Hub; none = the catalogue's own")
    ] = None,
    split: Annotated[str | None, typer.Option(help="read this split of the source alone")] = None,
    image_column: Annotated[
        str | None, typer.Option(help="column of the photos; found by name where not given")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    item_id_column: Annotated[str | None, typer.Option(help="column that is equal for photos of one item")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="photos a pass")] = 32,
    store_photos: Annotated[bool, typer.Option(help="copy the photos' files into the catalogue")] = False,
    prune: Annotated[bool, typer.Option(help="delete photos that the source no longer has")] = False,
    reembed: Annotated[bool, typer.Option(help="first replace the vectors there by those of --model")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Bring a catalogue to what a source holds: new photos in, changed ones anew, unchanged ones at no cost."""
    from .embed import index as run

    columns = {"split": split, "image_column": image_column, "text_column": text_column}
    columns = {
        name: value for name, value in {**columns, "item_id_column": item_id_column}.items() if value is not None
    }
    report, opened = _or_exit(
        run, source, catalogue, model, batch_size=batch_size, store_photos=store_photos, prune=prune,
        re_embed=reembed, columns=columns,
    )  # fmt: skip
    if not _first_process():
        return
    about = opened.describe()
    if as_json:
        typer.echo(json.dumps({"report": vars(report), "catalogue": about}, indent=2, default=str))
        return
    for photo_id, reason in report.skipped[:20]:
        typer.echo(f"skipped {photo_id}: {reason}", err=True)
    if len(report.skipped) > 20:
        typer.echo(f"... and {len(report.skipped) - 20} more; --json lists all", err=True)
    typer.echo(str(report))
    typer.echo(f"{about['photos']:,} photos of {about['items']:,} items; searched by {about['search']}")


@app.command(epilog=SEARCH_EXAMPLES)
def search(
    catalogue: Annotated[str, typer.Argument(help="a catalogue made by `syncmask index`")],
    text: Annotated[str | None, typer.Argument(help="what is wanted; with --image, how it should differ")] = None,
    image: Annotated[Path | None, typer.Option(help="a photo to search with")] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option(help="column=value, or != < <= > >=; repeated: all must hold, = of one column any"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="items")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="so many of the best go through the matching head; 0 = none")] = 0,
    model: Annotated[str | None, typer.Option(help="where the catalogue's model is now; none = as it says")] = None,
    sheet: Annotated[Path | None, typer.Option(help="also write a contact sheet: .png, .jpg or .html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, not a table")] = False,
) -> None:
    """Find items by words, by a photo, or by a photo and words."""
    ranking = _or_exit(_search, catalogue, model, text, image, filter, k, rerank)
    if sheet is not None:
        from .sheet import save_sheet

        _or_exit(save_sheet, sheet, ranking, text, image)
    if as_json:
        typer.echo(json.dumps(ranking.content(), indent=2, default=str, ensure_ascii=False))
        return
    for note in ranking.notes:
        typer.echo(f"note: {note}", err=True)
    for place, hit in enumerate(ranking, 1):
        typer.echo(_line(place, hit))
    if sheet is not None:
        typer.echo(f"written to {sheet}")


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    model: Annotated[str, typer.Argument(help="a run, its final/ or a model on the Hub")],
    out: Annotated[Path, typer.Argument(help="the folder to make")],
    int8: Annotated[bool, typer.Option("--int8", help="also with 8-bit weights")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="also as OpenVINO IR")] = False,
    check: Annotated[
        str | None, typer.Option(help="any corpus source: compare with torch on its photos; a difference stops all")
    ] = None,
    split: Annotated[str | None, typer.Option(help="of the check's corpus; none = test, else validation")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the description as JSON")] = False,
) -> None:
    """Write a model as ONNX with a client that needs no torch."""
    from .encoder import Encoder
    from .export import check_rows, export_model, sizes_table

    rows = None if check is None else _or_exit(check_rows, check, split)
    encoder = _or_exit(Encoder.from_pretrained, model, device="cpu")
    options = {"int8": int8, "openvino": openvino, "overwrite": overwrite, "check_on": rows}
    about = _or_exit(export_model, encoder, out, **options)
    if as_json:
        typer.echo(json.dumps(about, indent=2))
        return
    typer.echo(sizes_table(out, about))
    if "check" in about:
        from .export_check import check_table

        typer.echo(f"\n{check_table(about['check'])}")
    typer.echo(f"\nwritten to {out}; try: python {out / 'client.py'} --help")


@app.command(epilog=EXPLAIN_EXAMPLES)
def explain(
    model: Annotated[str, typer.Argument(help="a run, its final/ or a model on the Hub")],
    photo: Annotated[Path | None, typer.Argument(help="a photo")] = None,
    text: Annotated[str | None, typer.Argument(help="what it is compared with")] = None,
    out: Annotated[Path, typer.Option(help="a picture (.png, .jpg) or a page (.html)")] = Path("explanation.png"),
    word: Annotated[str | None, typer.Option(help="show this word's heatmaps alone")] = None,
    other: Annotated[
        list[Path] | None, typer.Option(help="a photo of another item that a word's evidence is measured against")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="fusion layer that is read; none = the one of the masks")] = None,
    strategy: Annotated[
        str, typer.Option(help="attention, evidence or alignment: which scores choose hidden words")
    ] = "attention",
    pointing: Annotated[
        bool, typer.Option("--pointing", help="no photo: how often heatmaps hit what words name, where that is known")
    ] = False,
    corpus: Annotated[str | None, typer.Option(help="for --pointing; none = the run's own")] = None,
    max_rows: Annotated[int, typer.Option(help="for --pointing: photos, at most")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show where each word looks, which words a photo supports, and what SyncMask would hide."""
    if pointing:
        from .pointing import pointing_of

        result = _or_exit(pointing_of, model, corpus=corpus, layer=layer, max_rows=max_rows)
        typer.echo(json.dumps(result.content(), indent=2) if as_json else result.table())
        return
    if photo is None or text is None:
        raise typer.BadParameter("give a photo and a text, or --pointing", param_hint="PHOTO TEXT")
    options = {"others": other or (), "layer": layer, "strategy": strategy}
    explanation, path = _or_exit(_explain, model, photo, text, out, word, options)
    lines = [f"match {explanation.match:.2f}, cosine {explanation.similarity:.2f}", f"written to {path}"]
    typer.echo(json.dumps(explanation.content(), indent=2) if as_json else "\n".join(lines))


@app.command("app", epilog=APP_EXAMPLES)
def open_app(
    catalogue: Annotated[str, typer.Argument(help="a catalogue made by `syncmask index`")],
    model: Annotated[str | None, typer.Option(help="where the catalogue's model is now; none = as it says")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="none = the first free one from 7860 on")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="open one")] = False,
    space: Annotated[Path | None, typer.Option(help="write a folder that can be pushed as a Space instead")] = None,
    title: Annotated[str, typer.Option(help="of the Space")] = "Catalogue search",
    package: Annotated[str, typer.Option(help="how the Space installs this package: for pip, or a wheel")] = "",
) -> None:
    """Search in the browser, offline: by words, a photo or both; a click on a hit shows its heatmaps."""
    opened = _or_exit(_open, catalogue, model)
    if space is not None:
        from .space import write_space

        typer.echo(f"written to {_or_exit(write_space, space, opened, title=title, package=package)}")
        return
    page, address = _or_exit(_serve, opened, host, port, browser)
    typer.echo(f"{address}  (Ctrl-C ends)")
    page.block_thread()


def _explain(model: str, photo: Path, text: str, out: Path, word: str | None, options: dict):
    from .encoder import Encoder
    from .explain import explain
    from .explain_page import write_explanation

    explanation = explain(Encoder.from_pretrained(model), photo, text, **options)
    return explanation, write_explanation(explanation, out, word)


def _serve(catalogue, host: str, port: int | None, browser: bool):
    from .app import serve

    return serve(catalogue, host, port, browser=browser, block=False)


def _open(catalogue: str, model: str | None):
    from .catalogue import Catalogue
    from .encoder import Encoder

    return Catalogue.open(catalogue, Encoder.from_pretrained(model) if model else None)


def _search(catalogue: str, model: str | None, text, image, filter, k: int, rerank: int):
    from .catalogue import Catalogue
    from .encoder import Encoder

    opened = Catalogue.open(catalogue)
    if model is not None:
        opened = Catalogue.open(catalogue, Encoder.from_pretrained(model))
    return opened.search(text=text, image=image, filter=filter, k=k, rerank=rerank)


def _line(place: int, hit) -> str:
    matching = "       " if hit.matching is None else f"{hit.matching:+7.2f}"
    photos = f"{len(hit.photos)} photo{'s' if len(hit.photos) > 1 else ''}"
    return f"{place:>3}. {hit.vector:6.3f} {matching}  {hit.item_id:<24} {photos:<9} {' '.join(hit.text.split())[:70]}"


def _first_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _or_exit(action, *args, **kwargs):
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading the weights
    return or_exit(action, *args, **kwargs)
