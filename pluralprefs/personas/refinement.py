"""Descriptions that decide: what is left open is put to the teacher, round by round, while it helps.

A description is tried on a few pairs, asked in both orders. Where too many contradict themselves, the teacher is shown
some of them and writes a fuller description, which replaces the old one only if it decides more of the same pairs. A
person's rounds end when the description decides enough, when a round brought nothing, or at their number. That a
description decides more of these few pairs may be chance: the labels of many more pairs say how far it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import polars as pl

from pluralprefs.personas.labels import INCONSISTENT, UNREADABLE, ask_both, both_orders, label_tasks, outcomes
from pluralprefs.personas.passes import Passes
from pluralprefs.personas.tasks import Pair, Prefer, Refine

SCHEMA = {
    "user_id": pl.Utf8,
    "round": pl.Int64,
    "description": pl.Utf8,
    "pairs": pl.Int64,
    "readable": pl.Int64,
    "decided": pl.Float64,
    "taken": pl.Boolean,
}
DISPUTES = 4  # pairs shown to the teacher


class Refined(NamedTuple):
    """People with their last descriptions, and every description that was tried (`SCHEMA`)."""

    people: pl.DataFrame
    rounds: pl.DataFrame


class _Tried(NamedTuple):
    description: str
    readable: int
    decided: float | None  # null where nothing could be read
    disputes: tuple[Pair, ...]

    @property
    def settled(self) -> int:
        """Pairs that it decides: of those that it makes unreadable, none."""
        return self.readable - len(self.disputes)


def refine(
    people: pl.DataFrame,
    pairs: pl.DataFrame,
    passes: Passes,
    *,
    rounds: int = 3,
    enough: float = 0.9,
    tell: Callable[[str], None] | None = None,
) -> Refined:
    """Refine each description up to `rounds` times, until it decides `enough` (0..1) of the pairs.

    people: user_id, description; pairs: those to try on. Raises TeacherError; what was asked by then is in the cache.
    """
    best = dict(zip(people["user_id"], _tried(people["description"].to_list(), pairs, passes), strict=True))
    rows = [_row(name, 0, tried, pairs, True) for name, tried in best.items()]
    open_ = list(best)
    for number in range(1, rounds + 1):
        open_ = [name for name in open_ if best[name].disputes and best[name].settled < enough * pairs.height]
        tasks = [Refine(best[name].description, best[name].disputes[:DISPUTES]) for name in open_]
        answers = list(passes.ask(tasks, len(tasks)))
        new = {name: answer.text for name, answer in zip(open_, answers, strict=True) if answer.text}
        found = dict(zip(new, _tried(list(new.values()), pairs, passes), strict=True))
        better = {name: tried for name, tried in found.items() if tried.settled > best[name].settled}
        rows += [_row(name, number, tried, pairs, name in better) for name, tried in found.items()]
        best |= better
        open_ = list(better)
    if tell:
        tell(f"refinement: {passes.tally}")
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row").sort("user_id", "round", maintain_order=True)
    last = [best[name].description for name in people["user_id"]]
    return Refined(people.with_columns(pl.Series("description", last, dtype=pl.Utf8)), table)


def refining_tasks(people: pl.DataFrame, pairs: pl.DataFrame, rounds: int) -> Iterator[Prefer | Refine]:
    """Yield what `refine` would ask at most: all rounds for everybody, with descriptions that stand in for new ones."""
    for number in range(rounds + 1):
        stand_in = people.with_columns(pl.col("description") + " " + "x" * 200 * number)
        yield from both_orders(label_tasks(stand_in, pairs))
        if number < rounds:
            texts = list(pairs.select("prompt", "first", "second").iter_rows())[:DISPUTES]
            for description in stand_in["description"]:
                yield Refine(description, tuple(Pair(*row) for row in texts))


def _tried(descriptions: list[str], pairs: pl.DataFrame, passes: Passes) -> list[_Tried]:
    """Ask all pairs for each description."""
    people = pl.DataFrame({"description": descriptions}, schema={"description": pl.Utf8})
    said = outcomes(ask_both(label_tasks(people, pairs), len(descriptions) * pairs.height, passes)).to_list()
    texts = [Pair(*row) for row in pairs.select("prompt", "first", "second").iter_rows()]
    found = []
    for place, description in enumerate(descriptions):
        mine = said[place * pairs.height : (place + 1) * pairs.height]
        disputes = tuple(pair for pair, outcome in zip(texts, mine, strict=True) if outcome == INCONSISTENT)
        readable = sum(outcome != UNREADABLE for outcome in mine)
        found.append(_Tried(description, readable, 1 - len(disputes) / readable if readable else None, disputes))
    return found


def _row(name: str, number: int, tried: _Tried, pairs: pl.DataFrame, taken: bool) -> tuple[object, ...]:
    return name, number, tried.description, pairs.height, tried.readable, tried.decided, taken
