"""Markdown made of data: the templates' environment, tables, and text that stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")


def environment() -> Environment:
    """Return what fills the templates; a name that a template asks for in vain is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False
    )
    made.filters |= {"plain": plain, "table": table}
    return made


def plain(text: object) -> str:
    r"""Text from data as text in Markdown: no cell, code or tag ends or begins in it.

    Example:
        >>> plain("a|b <i>")
        'a\\\\|b &lt;i&gt;'
    """
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", escape(" ".join(str(text).split()), quote=False))


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """A Markdown table; cells are taken as they are.

    Example:
        >>> print(table([("a", "1")], ("x", "y")))
        | x | y |
        |---|---|
        | a | 1 |
    """
    lines = [head, ["---"] * len(head), *rows]
    drawn = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([drawn[0], drawn[1].replace(" ", ""), *drawn[2:]])
