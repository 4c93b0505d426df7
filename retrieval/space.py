"""A folder that can be pushed as a Space: the page's entry file, a README with metadata, a catalogue, its model."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa

from .catalogue import Catalogue
from .store import Store

ENTRY = '''"""The entry of a Space: one page over the catalogue and the model beside it."""

from pathlib import Path

from syncmask.retrieval.app import serve
from syncmask.retrieval.catalogue import Catalogue
from syncmask.retrieval.encoder import Encoder

here = Path(__file__).parent
serve(Catalogue.open(here / "catalogue", Encoder.from_pretrained(here / "model")), host="0.0.0.0", port=7860)
'''
README = """---
title: {title}
emoji: 🧥
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {version}
python_version: "3.11"
app_file: app.py
pinned: false
---

# {title}

{photos:,} photos of {items:,} items, searched by words, by a photo, or by both, with a SyncMask model. A click on a hit
shows where each word looks. Made by `syncmask app CATALOGUE --space FOLDER`.
"""


def write_space(
    folder: str | Path, catalogue: Catalogue, *, title: str = "Catalogue search", package: str = ""
) -> Path:
    """Writes app.py, README.md, requirements.txt, catalogue/ and model/ to a new folder.

    Push it by `hf upload USER/NAME FOLDER --repo-type space`; photos and texts are then as public as the Space is.

    Args:
        folder: new, or empty.
        catalogue: on this machine, with its photos inside (`store_photos`).
        title: of the Space, one line.
        package: how the Space installs this package: what pip takes, or a wheel, which is copied along;
            "syncmask[app]" from the index when empty.

    Raises:
        FileExistsError: a folder with files in it.
        ValueError: photos that lie outside the catalogue, a catalogue in an object store, a title of several lines.
    """
    folder = Path(folder)
    about = catalogue.describe()
    _check(folder, catalogue, about["path"], title)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = catalogue.encoder
    _copy_without_places(catalogue, folder / "catalogue")
    encoder.model.save_pretrained(folder / "model")
    encoder.processor.save_pretrained(folder / "model")
    (folder / "app.py").write_text(ENTRY, encoding="utf-8")
    (folder / "requirements.txt").write_text(f"{_requirement(folder, package)}\n", encoding="utf-8")
    counts = {"photos": about["photos"], "items": about["items"]}
    readme = README.format(title=title, version=version("gradio"), **counts)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def _copy_without_places(catalogue: Catalogue, folder: Path) -> None:
    """The same rows in a new catalogue, which knows neither where photos and model lie here nor what was deleted."""
    snapshot = catalogue.snapshot()
    state = snapshot.state
    store = Store.create(str(folder.absolute()), snapshot.schema, state.revision, "", state.dim)
    rows = snapshot.table.search().to_batches(batch_size=256)
    place = snapshot.schema.get_field_index("photo_path")

    def without_places():
        for batch in rows:
            yield batch.set_column(place, snapshot.schema.field(place), pa.nulls(len(batch), pa.string()))

    store.table(state.table).add(pa.RecordBatchReader.from_batches(snapshot.schema, without_places()))
    Catalogue(store, exact_up_to=catalogue.exact_up_to).optimise()


def _check(folder: Path, catalogue: Catalogue, place: str, title: str) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder")
    if "://" in place:
        raise ValueError(f"{place} is in an object store; copy the catalogue to this machine first")
    if not title.strip() or any(sign in title for sign in "\n\r:#\"'"):
        raise ValueError(f"title {title!r} must be one line without quotes, colons and #")
    table = catalogue.snapshot().table
    outside = table.count_rows("photo_bytes IS NULL")
    if outside:
        raise ValueError(
            f"{outside} photos lie outside the catalogue, and a Space could not read them; index them again with "
            "their files: syncmask index PHOTOS CATALOGUE --store-photos"
        )


def _requirement(folder: Path, package: str) -> str:
    if not package.endswith(".whl"):
        return package or "syncmask[app]"
    shutil.copy(package, folder)
    return f"./{Path(package).name}[app]"
