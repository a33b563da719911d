"""Questions that people would ask, none of them twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import zip_longest

import polars as pl

from pluralprefs.data.ids import content_id
from pluralprefs.personas.passes import Passes
from pluralprefs.personas.tasks import Questions

SCHEMA = {"question_id": pl.Utf8, "question": pl.Utf8, "user_id": pl.Utf8}
NEAR = 0.7  # share of common words from which two questions are one


def question_tasks(people: pl.DataFrame, each: int, draws: int = 1) -> list[Questions]:
    """Return the tasks of `questions`: `draws` requests for `each` questions of every person."""
    return [
        Questions(description, each, draw) for description in people["description"] for draw in range(max(1, draws))
    ]


def questions(
    people: pl.DataFrame,
    passes: Passes,
    *,
    each: int = 10,
    draws: int = 1,
    most: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> pl.DataFrame:
    """Ask for `each` questions of every person, `draws` times, and keep up to `most` that differ.

    people: user_id, description. Returns question_id, question and user_id, whose question it was first; people take
    turns, so that `most` cuts off no one. A question of which `NEAR` of the words stand in an earlier one is dropped.
    Raises TeacherError, also where nobody asked anything.
    """
    tasks = question_tasks(people, each, draws)
    asked: dict[str, list[str]] = {name: [] for name in people["user_id"]}
    names = [name for name in people["user_id"] for _ in range(max(1, draws))]
    for name, answer in zip(names, passes.ask(tasks, len(tasks)), strict=True):
        asked[name] += (answer.text or "").splitlines()
    turns = [(name, text) for turn in zip_longest(*_named(asked)) for name, text in filter(None, turn)]
    kept = different(turns)
    if tell:
        tell(f"questions: {passes.tally}; {len(turns) - len(kept)} of {len(turns)} repeat another")
    rows = [(content_id(text), text, name) for name, text in kept[:most]]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def different(texts: Iterable[tuple[str, str]], near: float = NEAR) -> list[tuple[str, str]]:
    """Return the (name, text) whose texts are not near to an earlier one: common words / all words of both < `near`.

    >>> different([("ana", "Which tea is best?"), ("bo", "which tea is BEST"), ("bo", "Where is Rome?")])
    [('ana', 'Which tea is best?'), ('bo', 'Where is Rome?')]
    """
    kept: list[tuple[str, str]] = []
    seen: list[frozenset[str]] = []
    for name, text in texts:
        words = frozenset(re.findall(r"\w+", text.lower()))
        if words and all(len(words & other) < near * len(words | other) for other in seen):
            kept.append((name, text))
            seen.append(words)
    return kept


def _named(asked: dict[str, list[str]]) -> list[list[tuple[str, str]]]:
    return [[(name, text) for text in texts] for name, texts in asked.items()]
