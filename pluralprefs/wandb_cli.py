"""`pluralprefs wandb push`, and what `--wandb` of other commands does when their run has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pluralprefs.terminal import plainly, say, warn

if TYPE_CHECKING:
    from pluralprefs.registry import RunFolder

wandb_app = typer.Typer(no_args_is_help=True, help="Mirror runs to Weights & Biases.")
Mirror = Annotated[
    str | None, typer.Option("--wandb", help="Mirror the run: online, offline (default; sends nothing) or off.")
]
DEFAULT = "PLURALPREFS_WANDB"


@wandb_app.callback()
def group() -> None:
    """Mirror runs to Weights & Biases."""


@wandb_app.command(epilog="Example: pluralprefs wandb push runs/2026-... --mode offline")
@plainly
def push(
    runs: Annotated[list[str], typer.Argument(help="Run folders, their names, or parts that no other name has.")],
    mode: Annotated[str, typer.Option(help="online, or offline for `wandb sync` later.")] = "online",
    project: Annotated[str, typer.Option(help="Project of W&B.")] = "pluralprefs",
    with_users: Annotated[bool, typer.Option(help="Send states of users too, where the run kept them.")] = False,
    root: Annotated[Path, typer.Option("--root", help="Folder of run folders.")] = Path("runs"),
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Replay runs that have ended. Again is no harm: what is there is not sent twice."""
    from pluralprefs.registry import find_run
    from pluralprefs.registry.wandb_mirror import holds_users, mirror

    folders = [find_run(run, root) for run in runs]
    for folder in folders:
        say(str(mirror(folder, possible(mode), project=project, with_users=with_users)))
        if holds_users(folder) and not with_users:
            warn(
                f"{folder.name}: its parameters hold the states of its users and were not sent; --with-users sends them"
            )


def chosen(mode: str | None) -> str:
    """Return the mode that was asked for, else that of PLURALPREFS_WANDB, else offline; ValueError for another word.

    WANDB_MODE=disabled is off for all that is not asked for on the command line.
    """
    from pluralprefs.registry.wandb_mirror import MODES

    if mode is None and os.environ.get("WANDB_MODE") == "disabled":
        return "off"
    asked = mode or os.environ.get(DEFAULT) or "offline"
    if asked not in MODES:
        raise ValueError(f"{'--wandb' if mode else DEFAULT} {asked!r}: one of {', '.join(MODES)}")
    return asked


def possible(mode: str) -> str:
    """Return offline for online where there is no login."""
    from pluralprefs.registry.wandb_mirror import logged_in

    if mode == "online" and not logged_in():
        warn("W&B: no login (wandb login, or WANDB_API_KEY), so the mirror is written offline; `wandb sync` sends it")
        return "offline"
    return mode


def after(folder: RunFolder, mode: str) -> None:
    """Mirror a run that has just ended; a mirror that fails is a warning, for the run itself is whole."""
    from pluralprefs.registry.wandb_mirror import mirror

    if mode == "off":
        return
    try:
        mirror(folder, possible(mode))
    except Exception as error:
        reason = " ".join(str(error).split())
        warn(f"W&B: not mirrored ({reason}); the run is whole, `pluralprefs wandb push {folder.name}` tries again")
