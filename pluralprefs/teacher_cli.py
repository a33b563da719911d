"""What commands that ask a teacher share: who is asked, and within which limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pluralprefs.terminal import say

if TYPE_CHECKING:
    from pluralprefs.attributes.teacher import Task, Teacher

CACHE = "answers.jsonl"
TeacherName = Annotated[
    str,
    typer.Option("--teacher", envvar="PLURALPREFS_TEACHER", help='"lexicon" (offline) or address of a chat server.'),
]
Model = Annotated[str | None, typer.Option(envvar="PLURALPREFS_TEACHER_MODEL", help="Model of the chat server.")]
Prices = Annotated[str | None, typer.Option("--price", help="Of a million prompt and completion tokens: 0.5,1.5")]
MaxCost = Annotated[float | None, typer.Option(help="Stop before this pass could cost more; needs --price.")]
Concurrency = Annotated[int, typer.Option(help="Calls at once.")]
Rate = Annotated[float | None, typer.Option(help="New calls a second, at most.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be asked and what it costs; ask nothing.")]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]


class Asking(NamedTuple):
    """Who is asked, and within which limits."""

    teacher: str
    model: str | None
    price: str | None
    max_cost: float | None
    concurrency: int
    rate: float | None

    def options(self, folder: Path) -> dict[str, Any]:
        """Return what `ask_all` is told; make the folder of the cache."""
        folder.mkdir(parents=True, exist_ok=True)
        return {
            "cache": folder / CACHE, "concurrency": self.concurrency, "requests_per_second": self.rate,
            "max_cost": self.max_cost, "price": self.prices(),
        }  # fmt: skip

    def prices(self) -> tuple[float, float] | None:
        """Return the two prices of --price."""
        if self.price is None:
            return None
        try:
            prompt, completion = (float(part) for part in self.price.split(","))
        except ValueError:
            raise ValueError(f"--price {self.price!r}: give two numbers, as 0.5,1.5") from None
        return prompt, completion

    def open(self, offline: Callable[[], Teacher]) -> Any:
        """Return a context that gives the teacher; `offline` makes the one called lexicon."""
        if self.teacher == "lexicon":
            return nullcontext(offline())
        if not self.teacher.startswith(("http://", "https://")):
            raise ValueError(f"--teacher {self.teacher!r}: use lexicon, or an address such as http://localhost:8000/v1")
        if not self.model:
            raise ValueError(f"--teacher {self.teacher}: name its model with --model")
        from pluralprefs.attributes.chat import ChatTeacher

        return closing(ChatTeacher(self.teacher, self.model))

    def tell_estimate(self, teacher: Teacher, tasks: Iterable[Task], folder: Path) -> None:
        """Say what asking would cost; ask nothing."""
        from pluralprefs.attributes.asking import estimate

        say(f"{teacher.name}: {estimate(teacher, tasks, cache=folder / CACHE, price=self.prices())}")
