"""`syncmask corpus ...`: commands about corpora. Heavy imports wait for the command, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make corpora.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `make` a command of a group while it is the only one."""


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
    from tqdm import tqdm

    from syncmask.processing.corpus import GENERATED, load_corpus
    from syncmask.processing.readers_folder import write_folder

    if output.exists() and any(output.iterdir()):
        typer.echo(f"{output} is not empty; name a new folder or remove its files first.", err=True)
        raise typer.Exit(2)
    corpus = load_corpus(GENERATED, num_items=num_items, image_size=image_size, seed=seed)
    total = sum(map(len, corpus.values()))
    with tqdm(total=total, unit="photo", desc=str(output)) as bar:
        write_folder(corpus, output, on_photo=bar.update)
    for split, rows in corpus.items():
        typer.echo(f"{split:<10} {len(rows):>8,} photos {len(set(rows['item_id'])):>8,} items")
    if contact_sheet is not None:
        _draw_sheet(corpus["train"], sheet_items).save(contact_sheet)
        typer.echo(f"contact sheet: {contact_sheet}")


def _draw_sheet(rows, num_items: int, side: int = 128):
    """A picture with one line an item: its text, then its photos, `side` pixels each."""
    import textwrap

    from PIL import Image, ImageDraw

    from syncmask.processing.processing_syncmask import to_rgb

    photos: dict[str, list[int]] = {}
    for row, item in enumerate(rows["item_id"]):
        photos.setdefault(item, []).append(row)
    items = list(photos.values())[:num_items]
    text_width = 3 * side
    sheet = Image.new("RGB", (text_width + max(map(len, items)) * side, len(items) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for line, members in enumerate(items):
        text = textwrap.fill(rows[members[0]]["text"], text_width // 7)
        draw.multiline_text((6, line * side + 6), text, fill="black")
        for column, row in enumerate(members):
            photo = to_rgb(rows[row]["image"]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(photo, (text_width + column * side, line * side))
    return sheet
