"""Which run does a command mean? The options by which commands name one, and the run that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pluralprefs.run import Run

RUNS = Path("runs")
Root = Annotated[Path, typer.Option("--root", help="Folder of run folders.")]
Named = Annotated[str, typer.Argument(help="Run folder, its name, or a part that no other name in --root has.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Which of the run's fits; the first by default.")]
New = Annotated[
    Path | None,
    typer.Option("--communities", help="Comparisons of communities the run has not met, fitted first."),
]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]


def opened(name: str, root: Path, seed: int | None = None, communities: Path | None = None) -> Run:
    """A run, with the communities of a file that it has not met."""
    from pluralprefs.registry import find_run
    from pluralprefs.run import load

    loaded = load(find_run(name, root).path, seed=seed)
    return loaded if communities is None else loaded.with_communities(loaded.read(communities))
