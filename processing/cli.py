"""`syncmask corpus ...`: commands about corpora. Heavy imports wait for the command, so that --help is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make, check and convert corpora.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        help="A folder of photos with metadata, parquet or Arrow files, FashionGen's .h5 files, FashionIQ's folder, "
        ".tar shards, a dataset's name on the Hub, or 'garments'."
    ),
]
Split = Annotated[str | None, typer.Option(help="Read this split of the source alone.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the photos; found by name where not given.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts.")]
ItemColumn = Annotated[str | None, typer.Option(help="Column that is equal for photos of one item.")]
Where = Annotated[
    list[str] | None, typer.Option(help="Keep only rows whose column has this value: column=value; may be repeated.")
]


@app.command()
def make(
    output: Annotated[Path, typer.Argument(help="New folder for the photos and their metadata.")],
    num_items: Annotated[int, typer.Option(min=1, help="Garments to draw; each has several photos.")] = 2000,
    image_size: Annotated[int, typer.Option(min=32, help="Side of a photo in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed draws the same corpus and the same splits.")] = 0,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Also draw some items, photos and text side by side, to this PNG file.")
    ] = None,
    sheet_items: Annotated[int, typer.Option(min=1, help="Items on the contact sheet.")] = 12,
) -> None:
    """Draw the generated corpus (photos, texts, ground truth) to a folder that `load_corpus` reads."""
    import json
    from importlib.metadata import version

    from tqdm import tqdm

    from syncmask.processing.corpus import GENERATED, load_corpus
    from syncmask.processing.readers_folder import MADE, write_folder

    if output.exists() and any(output.iterdir()):
        typer.echo(f"{output} is not empty; name a new folder or remove its files first.", err=True)
        raise typer.Exit(2)
    asked = {"num_items": num_items, "image_size": image_size, "seed": seed}
    corpus = load_corpus(GENERATED, **asked)
    total = sum(map(len, corpus.values()))
    with tqdm(total=total, unit="photo", desc=str(output)) as bar:
        write_folder(corpus, output, on_photo=bar.update)
    note = {"corpus": GENERATED, **asked, "syncmask": version("syncmask")}
    (output / MADE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    for split, rows in corpus.items():
        typer.echo(f"{split:<10} {len(rows):>8,} photos {len(set(rows['item_id'])):>8,} items")
    if contact_sheet is not None:
        from .contact_sheet import contact_sheet as draw

        draw(corpus["train"], sheet_items).save(contact_sheet)
        typer.echo(f"contact sheet: {contact_sheet}")


@app.command()
def check(
    source: Source,
    split: Split = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    item_id_column: ItemColumn = None,
    where: Where = None,
    seed: Annotated[int, typer.Option(help="Of the item-wise split, where the source has none.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub name; by default one is trained here.")] = None,
    max_text_length: Annotated[int | None, typer.Option(help="Tokens of a text before it is cut.")] = None,
    photos: Annotated[bool, typer.Option(help="Open the photos (slow, thorough).")] = True,
    output: Annotated[Path, typer.Option(help="Folder for check.json, offenders.jsonl and offenders.png.")] = Path(
        "corpus_check"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Look for what is wrong with a corpus. Exit code 0: training may start; 1: it may not; 2: it cannot be read."""
    import json

    from tqdm import tqdm

    from .check import check_corpus
    from .check_report import as_json as plain
    from .check_report import save, table

    columns = {"image_column": image_column, "text_column": text_column, "item_id_column": item_id_column}
    with _explained(), tqdm(unit="row", desc=source, leave=False) as bar:
        report, found, streams = check_corpus(
            source,
            tokenizer=_tokenizer(tokenizer),
            max_text_length=max_text_length,
            photos=photos,
            seed=seed,
            split=split,
            where=_filters(where),
            on_row=bar.update,
            **columns,
        )
        written = save(report, found, streams, output)
    typer.echo(json.dumps(plain(report), ensure_ascii=False) if as_json else table(report))
    typer.echo(f"written: {', '.join(map(str, written))}", err=True)
    raise typer.Exit(0 if report.may_start else 1)


@app.command()
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="New folder, or that of the same conversion, to go on with it.")],
    split: Split = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    item_id_column: ItemColumn = None,
    where: Where = None,
    verify: Annotated[bool, typer.Option(help="Decode every photo and leave out the unreadable ones.")] = False,
    min_words: Annotated[int, typer.Option(min=1, help="Leave out rows whose text has fewer words.")] = 1,
    piece_rows: Annotated[int, typer.Option(min=1, help="Rows of a file.")] = 1000,
) -> None:
    """Write a corpus as parquet files, photos' bytes as they are. A stopped conversion goes on when called again."""
    from tqdm import tqdm

    from .convert import SKIPPED
    from .convert import convert as run

    columns = {"image_column": image_column, "text_column": text_column, "item_id_column": item_id_column}
    with _explained(), tqdm(unit="row", desc=str(output), leave=False) as bar:
        done = run(
            source,
            output,
            verify=verify,
            min_words=min_words,
            piece_rows=piece_rows,
            on_row=bar.update,
            split=split,
            where=_filters(where),
            **columns,
        )
    for name, rows in done.rows.items():
        typer.echo(f"{name:<20} {rows:>10,} rows")
    if done.resumed:
        typer.echo(f"{done.resumed} files were there already")
    if done.skipped:
        typer.echo(f"left out {len(done.skipped):,} rows, listed with their reasons in {output / SKIPPED}")


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of the input as one line and exit code 2."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, ValueError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _filters(where: list[str] | None) -> dict[str, str] | None:
    if not where:
        return None
    for entry in where:
        if "=" not in entry.lstrip("="):
            raise typer.BadParameter(f"{entry!r} must look like column=value", param_hint="--where")
    return dict(entry.split("=", 1) for entry in where)


def _tokenizer(name: str | None):
    if name is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
