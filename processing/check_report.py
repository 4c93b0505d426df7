"""The corpus check's report: a table to read, JSON, the offending rows in a file, their photos on a sheet."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw

from .check import Finding, Report, Survey
from .check_photos import BROKEN, HUGE
from .collator import UnreadablePhoto, read_photo
from .processing_syncmask import to_rgb
from .streams import RowStream

OFFENDERS, SHEET, RESULT = "offenders.jsonl", "offenders.png", "check.json"
SHOWN = 12  # offenders of one finding on the sheet
SIDE, TEXT = 112, 44
CLASSES_SHOWN = 12


def as_json(report: Report) -> dict:
    """The report as plain values; of each finding the first five rows."""
    found = asdict(report)
    for finding in found["findings"]:
        finding["rows"] = [_public(row) for row in finding["rows"][:5]]
    return {"may_start": report.may_start, **found}


def _public(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("place", "other")}


def table(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [f"{report.source}", "", f"{'split':<12}{'photos':>10}{'items':>10}{'texts':>10}"]
    for name, sizes in report.splits.items():
        lines.append(f"{name:<12}{sizes['rows']:>10,}{sizes['items']:>10,}{sizes['texts']:>10,}")
    photos = ", ".join(f"{items:,} with {number}" for number, items in sorted(report.photos_an_item.items())[:8])
    more = len(report.photos_an_item) - 8
    lines += ["", f"items by photos: {photos}{f', and {more} sizes more' if more > 0 else ''}"]
    if report.tokens:
        lines.append("tokens of a text: {median} median, {p99} 99th percentile, {longest} longest; "
                     "limit {limit}, {cut} texts cut".format(**report.tokens))  # fmt: skip
    for name, counts in report.classes.items():
        shown = ", ".join(f"{value} {sum(splits.values()):,}" for value, splits in list(counts.items())[:CLASSES_SHOWN])
        rest = len(counts) - CLASSES_SHOWN
        lines.append(f"{name}, {len(counts)} classes: {shown}{f', and {rest} more' if rest > 0 else ''}")
    lines.append("")
    lines += [line for finding in report.findings for line in _finding_lines(finding)]
    lines += ["", "Training may start." if report.may_start else "Training may NOT start: mend the errors first."]
    return "\n".join(lines)


def _finding_lines(finding: Finding) -> list[str]:
    head = f"{finding.level:<8}{finding.count:>8,}  {finding.name}: "
    return textwrap.wrap(head + finding.message, 118, subsequent_indent=" " * 18, break_long_words=False)


def save(report: Report, found: Survey, streams: dict[str, RowStream], folder: Path) -> list[Path]:
    """Write check.json, offenders.jsonl and, where photos offend, offenders.png; files of an earlier check go."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (OFFENDERS, SHEET, RESULT):
        (folder / name).unlink(missing_ok=True)
    (folder / RESULT).write_text(json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / OFFENDERS, "w", encoding="utf-8") as lines:
        for finding in report.findings:
            for row in finding.rows:
                line = {"finding": finding.name, "level": finding.level, **_public(row)}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    written = [folder / RESULT, folder / OFFENDERS]
    if found.photos and (picture := sheet(report, found, streams)):
        picture.save(folder / SHEET)
        written.append(folder / SHEET)
    return written


def sheet(report: Report, found: Survey, streams: dict[str, RowStream]) -> Image.Image | None:
    """A picture of the offenders, a line a finding, a twin beside each near duplicate; None where no row offends."""
    shown = [finding for finding in report.findings if finding.rows]
    if not shown:
        return None
    tiles = [_tiles(finding) for finding in shown]
    thumbnails = _thumbnails({row for line in tiles for row, _ in line}, found, streams)
    width = max(3, *map(len, tiles)) * (SIDE + 6) + 6  # Three at least: a heading is that long.
    picture = Image.new("RGB", (width, len(shown) * (SIDE + TEXT + 22)), "white")
    draw = ImageDraw.Draw(picture)
    for line, (finding, row_of_tiles) in enumerate(zip(shown, tiles, strict=True)):
        top = line * (SIDE + TEXT + 22)
        draw.text((6, top + 4), f"{finding.level}: {finding.name} ({finding.count:,})", fill="black")
        for column, (row, caption) in enumerate(row_of_tiles):
            left = 6 + column * (SIDE + 6)
            picture.paste(thumbnails.get(row) or _grey("not shown"), (left, top + 20))
            short = "\n".join(textwrap.wrap(caption, SIDE // 6)[:3])
            draw.multiline_text((left, top + 20 + SIDE), short, fill="black")
    return picture


def _tiles(finding: Finding) -> list[tuple[int, str]]:
    """(row of the survey, caption) of what the sheet shows of one finding."""
    tiles: list[tuple[int, str]] = []
    for row in finding.rows:
        tiles.append((row["place"], f"{row['source_split']} {row['row']} {row['item_id']} {row['why']}"))
        if "other" in row:
            tiles.append((row["other"], "<- its twin in train"))
        if len(tiles) >= SHOWN:
            break
    return tiles


def _thumbnails(wanted: set[int], found: Survey, streams: dict[str, RowStream]) -> dict[int, Image.Image]:
    """Small pictures of some rows; only the pieces that hold them are read again."""
    places = {(found.source_split[row], found.piece[row]) for row in wanted}
    row_of = {(found.source_split[row], found.row[row]): row for row in wanted}
    first = {}
    for row in range(len(found) - 1, -1, -1):
        first[found.source_split[row], found.piece[row]] = found.row[row]
    thumbnails = {}
    for split, piece in sorted(places):
        stream = streams[split]
        for number, cells in enumerate(stream.read(*stream.pieces[piece]), start=first[split, piece]):
            if (split, number) in row_of:
                row = row_of[split, number]
                thumbnails[row] = _thumbnail(cells["image"], found.photos[row])
    return thumbnails


def _thumbnail(photo, facts) -> Image.Image:
    if facts.problem in ("missing", "huge", "unreadable") or facts.width * facts.height > HUGE:
        return _grey(facts.problem or "huge")
    try:
        image = to_rgb(photo).copy() if isinstance(photo, Image.Image) else read_photo(photo, 0)
    except (UnreadablePhoto, *BROKEN):
        return _grey("unreadable")
    image.thumbnail((SIDE, SIDE))
    tile = Image.new("RGB", (SIDE, SIDE), "#eeeeee")
    tile.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return tile


def _grey(word: str) -> Image.Image:
    tile = Image.new("RGB", (SIDE, SIDE), "#bbbbbb")
    ImageDraw.Draw(tile).text((8, SIDE // 2 - 6), word, fill="black")
    return tile
