"""A big source into one catalogue, sharded over processes and machines; started again, it goes on where it was.

    accelerate launch -m syncmask.retrieval.embed PHOTOS CATALOGUE --model RUN

Each process takes its share of the source and writes it to the one table. With one process it is `syncmask index`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from tqdm import tqdm

from syncmask.processing.corpus import open_streams
from syncmask.processing.readers_folder import holds_metadata

from .catalogue import Catalogue, NoCatalogue, Report
from .encoder import Encoder

logger = logging.getLogger(__name__)

# A folder with one of these is a corpus of some format, not just photos.
TABLES = {".parquet", ".arrow", ".h5", ".hdf5", ".tar", ".json", ".jsonl", ".csv"}
# Rows of a piece, the unit that is dealt out to processes.
PIECE = 256


@dataclass(frozen=True)
class Source:
    """Rows to be indexed.

    Attributes:
        pieces: calls that each give some of the rows.
        total: how many there are, or None where only reading tells.
    """

    pieces: Sequence[Callable[[], Iterator[dict]]]
    total: int | None

    def share(self, number: int, of: int) -> Source:
        """Every `of`-th piece, from the one with this number."""
        pieces = self.pieces[number::of]
        return Source(pieces, self.total and round(self.total * len(pieces) / max(1, len(self.pieces))))

    def __iter__(self) -> Iterator[dict]:
        for piece in self.pieces:
            yield from piece()


def open_source(source: str | os.PathLike, **columns) -> Source:
    """Rows of whatever `load_corpus` reads (all splits), or of a folder that holds nothing but photos.

    In such a folder each photo is an item, called by its path in it, and its folder's name is the column `folder`.

    Args:
        source: see `syncmask.processing.corpus.load_corpus`.
        columns: `split`, `image_column`, `text_column`, `item_id_column`, `where` of it.

    Raises:
        FileNotFoundError, ValueError: those of `load_corpus`; a folder without photos.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not holds_metadata(path):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        if not any(file.suffix.lower() in TABLES for file in files):
            return _photo_folder(path, files)
    streams = open_streams(source, piece_rows=PIECE, **columns)
    pieces = []
    for stream in streams.values():
        dropped = [name for name, kind in stream.features.items() if _is_photo(kind) and name != "image"]
        pieces += [_rows_of(stream, piece, dropped) for piece in stream.pieces]
    counts = [stream.rows for stream in streams.values()]
    return Source(pieces, None if None in counts else sum(counts))


def _rows_of(stream, piece: tuple, dropped: list[str]) -> Callable[[], Iterator[dict]]:
    return lambda: ({k: v for k, v in row.items() if k not in dropped} for row in stream.read(*piece))


def _is_photo(kind) -> bool:
    return isinstance(kind, datasets.Image)


def _photo_folder(root: Path, files: list[Path]) -> Source:
    known = set(Image.registered_extensions())
    photos = [file for file in files if file.suffix.lower() in known]
    if not photos:
        raise ValueError(f"{root} holds no photos ({', '.join(sorted(known)[:5])}, ...) and no corpus.")

    def rows(start: int) -> Iterator[dict]:
        for file in photos[start : start + PIECE]:
            name = file.relative_to(root).as_posix()
            folder = file.relative_to(root).parent.as_posix()
            yield {"image": file, "photo_id": name, "item_id": name, "folder": None if folder == "." else folder}

    starts = range(0, len(photos), PIECE)
    return Source([lambda start=start: rows(start) for start in starts], len(photos))


# -------------------------------------------------------------------------------------------------------- indexing
def index(
    source: str | os.PathLike,
    place: str | os.PathLike,
    model: str | os.PathLike | None = None,
    *,
    batch_size: int = 32,
    store_photos: bool = False,
    prune: bool = False,
    re_embed: bool = False,
    columns: Mapping[str, object] | None = None,
) -> tuple[Report, Catalogue]:
    """Bring a catalogue to what a source holds, over all processes that were launched.

    Args:
        source: see `open_source`, which also takes `columns`.
        place: of the catalogue, made if there is none.
        model: run, folder or Hub name; None = the one that the catalogue names.
        batch_size: photos a pass.
        store_photos: copy photos that are files into the catalogue.
        prune: delete what is in the catalogue and not in the source, and when re-embedding what cannot be read.
        re_embed: first replace the vectors there by those of `model`.

    Returns:
        What became of the rows, of all processes together, and the catalogue.

    Raises:
        ValueError, FileNotFoundError: those of `Catalogue.open`, `Catalogue.add` and `open_source`.
    """
    # Without `cpu` and without a GPU it would take each process for the only one.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    _share_threads(state)
    rows = open_source(source, **(columns or {})).share(state.process_index, state.num_processes)
    encoder = Encoder.from_pretrained(model, state.device) if model is not None else None
    catalogue = _open(state, place, encoder)
    if re_embed:
        _re_embed(state, catalogue, encoder, batch_size, drop_unreadable=prune)
    seen: set[str] = set()
    bar = tqdm(rows, total=rows.total, unit="photo", desc="index", disable=not state.is_main_process)
    report = catalogue.add(bar, batch_size=batch_size, store_photos=store_photos, on_commit=seen.update)
    seen.update(photo_id for photo_id, _ in report.skipped)
    reports = gather_object([report]) if state.num_processes > 1 else [report]
    if prune:
        _prune(state, catalogue, seen)
    if state.is_main_process:
        catalogue.optimise()
    state.wait_for_everyone()
    return sum(reports, Report()), catalogue


def _open(state: PartialState, place: str | os.PathLike, encoder: Encoder | None) -> Catalogue:
    """The first process makes the catalogue, the others find it."""
    with state.main_process_first():
        try:
            catalogue = Catalogue.open(place, encoder)
        except NoCatalogue:
            if encoder is None:
                raise ValueError(
                    f"{place} is to be made; name the model whose vectors it will hold (--model)."
                ) from None
            catalogue = Catalogue.open(place, encoder, create=True)
    return catalogue


def _re_embed(
    state: PartialState, catalogue: Catalogue, encoder: Encoder | None, batch_size: int, drop_unreadable: bool
) -> None:
    """Each process embeds its share; then the first one sees to what is left, and switches."""
    if encoder is None:
        raise ValueError("re-embedding needs the model whose vectors are wanted (--model).")
    total = len(catalogue) // state.num_processes
    with tqdm(total=total, unit="photo", desc="re-embed", disable=not state.is_main_process) as bar:

        def done(ids: list[str]) -> None:
            bar.update(len(ids))

        share = (state.process_index, state.num_processes)
        catalogue.prepare(encoder, batch_size=batch_size, on_commit=done, share=share)
        state.wait_for_everyone()
        with state.main_process_first():
            catalogue.reembed(encoder, batch_size=batch_size, on_commit=done, drop_unreadable=drop_unreadable)


def _prune(state: PartialState, catalogue: Catalogue, seen: set[str]) -> None:
    everywhere = set().union(*gather_object([seen])) if state.num_processes > 1 else seen
    if state.is_main_process:
        gone = [photo_id for photo_id in catalogue.photo_ids() if photo_id not in everywhere]
        logger.warning("%d photos that the source no longer has are deleted", catalogue.delete(gone))


def _share_threads(state: PartialState) -> None:
    """`accelerate launch` gives each process one thread; on the CPU they share the cores instead."""
    if state.num_processes > 1 and state.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, cores // local))


if __name__ == "__main__":
    import typer

    from syncmask.retrieval.cli import index as command

    typer.run(command)
