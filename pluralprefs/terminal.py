"""What every command line of the package shares: a line out, a line of warning, and mistakes said in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer


def say(text: str) -> None:
    """Write a line to standard output."""
    typer.echo(text)


def warn(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(f"pluralprefs: {text}", err=True)


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
