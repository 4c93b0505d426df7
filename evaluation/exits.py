"""How a command ends when something is wrong that its user can mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

Answer = TypeVar("Answer")


def or_exit(action: Callable[..., Answer], *args, **kwargs) -> Answer:
    """Errors that tell the user how to mend them end the command in one line, not in a traceback."""
    try:
        return action(*args, **kwargs)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
