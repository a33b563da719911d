"""Counterfactuals: what a response would read like at each level of each attribute (arXiv 2507.13541, section 3).

A teacher rewrites every response at five levels of every attribute. Folds of responses may have a teacher of their own,
whose wordings the training rewrites lack (the lexicon keeps some phrases for validation and for held-out responses).
All answers come through `asking.ask_all` and its cache, so that a pass that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pluralprefs.attributes.asking import Price, ask_all, cost, summary
from pluralprefs.attributes.catalog import LEVELS, Attribute
from pluralprefs.attributes.teacher import NOTHING, Answer, Rewrite, Task, Teacher
from pluralprefs.data.ids import stable_hash

SCHEMA = {"response_id": pl.Utf8, "prompt": pl.Utf8, "attribute": pl.Utf8, "level": pl.Int64, "text": pl.Utf8}


def sample_responses(table: pl.DataFrame, per_community: int = 100, seed: int = 0) -> pl.DataFrame:
    """Take up to `per_community` unique responses of each community of a comparisons table, by stable hash.

    Returns response_id (the item key "prompt_id/item_id"), prompt, text and community_id, sorted by id. Messages
    become text. Equal texts count once, and a response of several communities belongs to the first by name. Without
    communities the whole table is one.
    """
    from pluralprefs.data.batches import item_table
    from pluralprefs.encoders.tokens import plain

    items = item_table(table)
    if items["text"].dtype != pl.Utf8 or items["prompt"].dtype != pl.Utf8:
        items = items.with_columns(
            pl.Series(name, [plain(value) for value in items[name].to_list()], dtype=pl.Utf8)
            for name in ("prompt", "text")
        )
    items = items.join(_communities(table), on=["prompt_id", "item_id"], how="left").rename({"item_key": "response_id"})
    places = [stable_hash(f"{seed}|response|{text}") for text in items["text"]]
    chosen = (
        items.with_columns(pl.Series("place", places, dtype=pl.UInt64))
        .sort("community_id", "response_id", nulls_last=True)
        .unique("text", keep="first", maintain_order=True)
        .filter(pl.col("place").rank("ordinal").over("community_id") <= per_community)
    )
    return chosen.select("response_id", "prompt", "text", "community_id").sort("response_id")


def _communities(table: pl.DataFrame) -> pl.DataFrame:
    """The first community by name of every item."""
    if "community_id" not in table.columns:
        table = table.with_columns(community_id=pl.lit(None, pl.Utf8))
    sides = [
        table.select("prompt_id", pl.col(side).alias("item_id"), pl.col("community_id").cast(pl.Utf8))
        for side in ("first_id", "second_id")
    ]
    return pl.concat(sides).group_by("prompt_id", "item_id").agg(pl.col("community_id").min())


def rewrites(
    responses: pl.DataFrame,
    attributes: Mapping[str, Attribute],
    teacher: Teacher,
    *,
    others: Mapping[str, Teacher] | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] | None = None,
    **asking: Any,
) -> pl.DataFrame:
    """Rewrite every response at five levels of every attribute: response_id, prompt, attribute, level, text.

    responses: response_id, prompt, text and, where there are `others`, `fold` (`folds.with_folds`): responses of a fold
    that `others` names are asked of that teacher. Rewrites that failed are left out; `tell` hears how many, and
    why the first. `asking` goes to `ask_all` (concurrency, max_cost, price, ...). Raises TeacherError.
    """
    tasks = rewrite_tasks(responses, attributes)
    each = teachers(responses, len(attributes) * LEVELS, teacher, others)
    answers = ask_each(tasks, each, cache=cache, **asking)
    if tell:
        tell(f"rewrites: {summary(answers)}")
    ids = [response for response in responses["response_id"] for _ in range(len(attributes) * LEVELS)]
    rows = [
        (response, task.prompt, task.attribute.name, task.level, answer.text)
        for response, task, answer in zip(ids, tasks, answers, strict=True)
        if answer.text is not None
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def rewrite_tasks(responses: pl.DataFrame, attributes: Mapping[str, Attribute]) -> list[Rewrite]:
    """Return the tasks of `rewrites`, a response after the other, then by attribute and level."""
    return [
        Rewrite(attribute, level, text, prompt or "")
        for prompt, text in responses.select("prompt", "text").iter_rows()
        for attribute in attributes.values()
        for level in range(LEVELS)
    ]


def teachers(
    responses: pl.DataFrame, each: int, teacher: Teacher, others: Mapping[str, Teacher] | None = None
) -> list[Teacher]:
    """Return the teacher of every task, `each` tasks a response; a fold may have its own."""
    if not others:
        return [teacher] * (responses.height * each)
    if "fold" not in responses.columns:
        raise ValueError("responses: column 'fold' is missing, so nobody is held out; add it with folds.with_folds")
    return [others.get(fold, teacher) for fold in responses["fold"] for _ in range(each)]


def ask_each(
    tasks: Sequence[Task],
    teachers: Sequence[Teacher],
    *,
    max_cost: float | None = None,
    price: Price | None = None,
    cache: Path | None = None,
    **asking: Any,
) -> list[Answer]:
    """Ask each task of its own teacher, in one pass a teacher; `max_cost` bounds the passes together."""
    answers: dict[int, Answer] = {}
    for name, teacher in {teacher.name: teacher for teacher in teachers}.items():
        rows = [row for row, other in enumerate(teachers) if other.name == name]
        wanted = [tasks[row] for row in rows]
        found = ask_all(teacher, wanted, cache=cache, max_cost=max_cost, price=price, **asking)
        answers |= zip(rows, found, strict=True)
        if max_cost is not None and price is not None:
            spent = sum((cost(answer.usage, price) for answer in found if not answer.cached), cost(NOTHING, price))
            max_cost = max(0.0, max_cost - spent)
    return [answers[row] for row in range(len(tasks))]
