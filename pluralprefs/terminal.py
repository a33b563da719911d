"""What every command line of the package shares: a line out, a line of warning, and mistakes said in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import polars as pl

ALL = ("attribute", "user_id", "other_id")  # columns in which null stands for all


def say(text: str) -> None:
    """Write a line to standard output."""
    typer.echo(text)


def warn(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(f"pluralprefs: {text}", err=True)


def show(table: pl.DataFrame, title: str) -> None:
    """Print a small table; an attribute or a user that is null stands for all."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(title), title_justify="left")
    for name, dtype in table.schema.items():
        shown.add_column(escape(name), justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in table.iter_rows(named=True):
        shown.add_row(*(_cell(name, value) for name, value in row.items()))
    Console().print(shown)


def _cell(name: str, value: object) -> str:
    from rich.markup import escape

    if value is None:
        return "all" if name in ALL else "–"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistakes into one line and exit code 2; --debug on the command line keeps the traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            if "--debug" in sys.argv:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"pluralprefs: {message}", err=True)
            raise typer.Exit(2) from None

    return wrapped
