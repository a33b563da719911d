"""Several passes over one teacher within one cache and one limit on cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pluralprefs.attributes.asking import Price, Tally, ask_in_order, cost
from pluralprefs.attributes.kept import Kept
from pluralprefs.attributes.teacher import NOTHING, Answer, Task, Teacher, task_key


@dataclass
class Passes:
    """Ask `teacher`; `max_cost` bounds all passes together, and `tally` counts their answers.

    options: further ones of `ask_in_order` (concurrency, requests_per_second, progress).
    """

    teacher: Teacher
    cache: Path | None = None
    max_cost: float | None = None
    price: Price | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def ask(self, tasks: Iterable[Task], total: int) -> Iterator[Answer]:
        """Yield the answers in the order of the tasks, of which there are `total`. Raises TeacherError."""
        limits = {"max_cost": self.max_cost, "price": self.price}
        spent = NOTHING
        with closing(ask_in_order(self.teacher, tasks, total, cache=self.cache, **limits, **self.options)) as answers:
            for answer in answers:
                self.tally.add(answer)
                spent = spent if answer.cached else spent.plus(answer.usage)
                yield answer
        if self.max_cost is not None and self.price is not None:
            self.max_cost = max(0.0, self.max_cost - cost(spent, self.price))

    def known(self, tasks: Sequence[Task]) -> list[Answer | None]:
        """Return the answers that the cache has; ask nothing."""
        keys = [task_key(self.teacher.name, task) for task in tasks]
        with closing(Kept(self.cache)) as kept:
            found = kept.find(keys)
        return [found.get(key) for key in keys]
