"""The fields that settings are made of: help text, bounds, and the reading of text into a field's type."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import field
from typing import Any, Literal

NONE_WORDS = ("none", "null")
BOOL_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def setting(default: Any, help: str, *, low=None, high=None, above=None) -> Any:
    """Make a dataclass field with its help text and bounds (`low` and `high` included, `above` excluded)."""
    metadata = {"help": help, "low": low, "high": high, "above": above}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def share(default: float, help: str) -> Any:
    """Make a field for a number from 0 to 1."""
    return setting(default, help, low=0, high=1)


class Checked:
    """Dataclasses whose numbers are held to the bounds of their fields on construction."""

    def __post_init__(self):
        for item in dataclasses.fields(self):
            check_bounds(item, getattr(self, item.name))


def check_bounds(item: dataclasses.Field, value: Any) -> None:
    """Raise ValueError where a number lies outside its field's bounds; None and other types pass."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high, above = (item.metadata.get(name) for name in ("low", "high", "above"))
    too_low = (low is not None and value < low) or (above is not None and value <= above)
    if too_low or (high is not None and value > high) or value != value:
        lower = f"above {above}" if above is not None else f"at least {low}"
        upper = f" and at most {high}" if high is not None else ""
        raise ValueError(f"{item.name} is {value}, but must be {lower}{upper}")


def nearest(word: str, known: list[str]) -> str:
    """Return `, did you mean X?`, or nothing where no known name is near.

    Example:
        >>> nearest("learning_rat", ["learning_rate", "epochs"])
        ', did you mean learning_rate?'
    """
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {matches[0]}?" if matches else ""


def metavar(kind: Any) -> str:
    """Return how `--help` shows a value of this type: its choices, or the type's name."""
    inner, _ = without_none(kind)
    if typing.get_origin(inner) is Literal:
        return "|".join(typing.get_args(inner))
    return "JSON" if typing.get_origin(inner) is dict else inner.__name__.upper()


def default_of(item: dataclasses.Field) -> Any:
    """Return a field's default, made anew for lists and mappings."""
    return item.default if item.default is not dataclasses.MISSING else item.default_factory()


def without_none(kind: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); any other type gives (type, False)."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    return next(inner for inner in typing.get_args(kind) if inner is not type(None)), True


def convert(name: str, kind: Any, raw: Any) -> Any:
    """Turn a YAML value or a word of the command line into a field's type; ValueError where it is not one.

    YAML reads `1e-5` as text and `no` as false, so both are taken for what is meant.

    Example:
        >>> convert("learning_rate", float, "1e-5"), convert("mixed_precision", Literal["no", "bf16"], False)
        (1e-05, 'no')
    """
    inner, optional = without_none(kind)
    if raw is None or (isinstance(raw, str) and raw.lower() in NONE_WORDS):
        if optional:
            return None
        raw = [] if typing.get_origin(inner) is list else raw
    try:
        return CONVERTERS[typing.get_origin(inner) or inner](inner, raw)
    except (ValueError, TypeError, KeyError, OverflowError) as problem:
        plain = {list: "a list of texts", dict: "a mapping (JSON)", Literal: metavar(kind)}
        wanted = plain.get(typing.get_origin(inner), inner.__name__)
        raise ValueError(f"{name} is {raw!r}, but must be {wanted}{' or none' if optional else ''}") from problem


def to_bool(_: Any, raw: Any) -> bool:
    """Read true, false, yes, no, 1 and 0."""
    return BOOL_WORDS[str(raw).lower()]


def to_int(_: Any, raw: Any) -> int:
    """Read a whole number, `1e4` too; refuse true, false and 1.5."""
    if isinstance(raw, bool) or float(raw) != int(float(raw)):
        raise ValueError
    return int(raw) if not isinstance(raw, str) or raw.lstrip("+-").isdigit() else int(float(raw))


def to_float(_: Any, raw: Any) -> float:
    """Read a number, also where YAML took it for text; refuse true and false."""
    if isinstance(raw, bool):
        raise TypeError
    return float(raw)


def to_str(_: Any, raw: Any) -> str:
    """Take text; a number or a date in YAML must be quoted."""
    if not isinstance(raw, str):
        raise TypeError
    return raw


def to_choice(kind: Any, raw: Any) -> str:
    """Take one of the choices."""
    raw = "no" if raw is False else raw
    if raw not in typing.get_args(kind):
        raise ValueError
    return raw


def to_list(_: Any, raw: Any) -> list[str]:
    """Take a list of texts; `none` alone is the empty list."""
    raw = [] if isinstance(raw, list) and [str(entry).lower() for entry in raw] == ["none"] else raw
    if not isinstance(raw, list) or not all(isinstance(entry, str) for entry in raw):
        raise TypeError
    return raw


def to_dict(_: Any, raw: Any) -> dict[str, Any]:
    """Take a mapping, or its JSON."""
    raw = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(raw, dict):
        raise TypeError
    return raw


CONVERTERS = {
    bool: to_bool,
    int: to_int,
    float: to_float,
    str: to_str,
    Literal: to_choice,
    list: to_list,
    dict: to_dict,
}
