"""Several responses to every question, some as a person would like it, some from a point of view; and pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import polars as pl

from pluralprefs.attributes.teacher import Answer
from pluralprefs.data.ids import content_id, stable_hash
from pluralprefs.personas.passes import Passes
from pluralprefs.personas.tasks import Respond, Views

SCHEMA = {
    "question_id": pl.Utf8,
    "question": pl.Utf8,
    "response_id": pl.Utf8,
    "text": pl.Utf8,
    "kind": pl.Utf8,  # "person" or "view"
    "by": pl.Utf8,  # the user_id, or the point of view
    "draw": pl.Int64,
}
PAIRS = {
    "prompt_id": pl.Utf8,
    "first_id": pl.Utf8,
    "second_id": pl.Utf8,
    "prompt": pl.Utf8,
    "first": pl.Utf8,
    "second": pl.Utf8,
}


class Wanted(NamedTuple):
    """A response that is to be written: to which question, for whom or from where, and the task."""

    question_id: str
    kind: str
    by: str
    task: Respond


def view_tasks(questions: pl.DataFrame, views: int) -> list[Views]:
    """Return the first pass of `responses`: the points of view on every question."""
    return [Views(question, views) for question in questions["question"]] if views else []


def respond_tasks(
    questions: pl.DataFrame,
    people: pl.DataFrame,
    views: Sequence[Sequence[str]],
    *,
    steered: int = 3,
    draws: int = 1,
    seed: int = 0,
) -> list[Wanted]:
    """Return the second pass: `draws` responses for each of `steered` people a question draws, and from each view.

    views: those on every question, in its order.
    """
    known = dict(people.select("user_id", "description").iter_rows())
    wanted = []
    for (question_id, question), lines in zip(
        questions.select("question_id", "question").iter_rows(), views, strict=True
    ):
        drawn = sorted(known, key=lambda name: stable_hash(f"{seed}|{question_id}|{name}"))[:steered]
        for draw in range(draws):
            wanted += [
                Wanted(question_id, "person", name, Respond(question, person=known[name], draw=draw)) for name in drawn
            ]
            wanted += [Wanted(question_id, "view", view, Respond(question, view=view, draw=draw)) for view in lines]
    return wanted


def lines(answers: Sequence[Answer | None], questions: int, stand_in: Sequence[str] = ()) -> list[list[str]]:
    """Return the views that answers hold, for every question; `stand_in` where there is no answer yet."""
    if not answers:
        return [[] for _ in range(questions)]
    return [(answer.text or "").splitlines() if answer else list(stand_in) for answer in answers]


def responses(
    questions: pl.DataFrame,
    people: pl.DataFrame,
    passes: Passes,
    *,
    steered: int = 3,
    views: int = 3,
    draws: int = 1,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> pl.DataFrame:
    """Write responses to every question; columns of `SCHEMA`, one row a different text. Raises TeacherError.

    questions: question_id, question; people: user_id, description. Of one question equal texts count once.
    """
    first = view_tasks(questions, views)
    found = lines(list(passes.ask(first, len(first))), questions.height)
    wanted = respond_tasks(questions, people, found, steered=steered, draws=draws, seed=seed)
    rows = [
        (one.question_id, one.task.question, content_id(answer.text), answer.text, one.kind, one.by, one.task.draw)
        for one, answer in zip(wanted, passes.ask((one.task for one in wanted), len(wanted)), strict=True)
        if answer.text is not None
    ]
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    different = table.unique(["question_id", "response_id"], keep="first", maintain_order=True)
    if tell:
        tell(f"views and responses: {passes.tally}; {table.height - different.height} responses repeat another")
    return different


def pairs(responses: pl.DataFrame, each: int = 4, seed: int = 0) -> pl.DataFrame:
    """Draw up to `each` pairs of responses to every question: columns of `PAIRS`, by stable hash.

    Questions take turns, so that the first n pairs are of as many questions as there are. Which response comes first
    is drawn too.
    """
    drawn = []
    for _, part in responses.group_by("question_id", maintain_order=True):
        texts = dict(part.select("response_id", "text").iter_rows())
        number, question = part["question_id"][0], part["question"][0]
        order = sorted(
            combinations(sorted(texts), 2), key=lambda pair: stable_hash(f"{seed}|{number}|{'|'.join(pair)}")
        )
        for rank, pair in enumerate(order[:each]):
            first, second = pair if stable_hash(f"{seed}|side|{'|'.join(pair)}") % 2 else pair[::-1]
            place = (rank, stable_hash(f"{seed}|{number}"))
            drawn.append((place, (number, first, second, question, texts[first], texts[second])))
    return pl.DataFrame([row for _, row in sorted(drawn)], schema=PAIRS, orient="row")
