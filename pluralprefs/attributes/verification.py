"""Which of a teacher's rewrites can be believed: every pair of levels is judged eight times, and filtered by it.

A pair of levels of one response and attribute is asked in two phrasings of "which is higher" and two of "which is
lower", each in both orders. Its agreement is the share of readable judgements that confirm the order of the levels;
a teacher that answers by position gets one half. Beside it stands how far the rewrites keep what the response said.
PrefPalette (arXiv 2507.13541) verifies norms alone, and its released code never uses the verdicts; here `kept` decides
which pairs `pairs.ordered_pairs` trains on, for norms and values alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from pluralprefs.attributes.asking import ask_all, summary
from pluralprefs.attributes.catalog import Attribute
from pluralprefs.attributes.teacher import QUESTIONS, Judge, Preserved, Task, Teacher

AGREEMENT = 0.75  # six of eight judgements
PRESERVED = (
    0.1  # above "it says something else", 0; one sentence of many, which is what the lexicon calls concise, passes
)
READABLE = 4  # half of the eight judgements of a pair
PAIR = ["response_id", "attribute", "low", "high"]
JUDGEMENTS = {
    "response_id": pl.Utf8, "attribute": pl.Utf8, "low": pl.Int64, "high": pl.Int64, "direction": pl.Utf8,
    "phrasing": pl.Int64, "order": pl.Utf8, "verdict": pl.Utf8, "agrees": pl.Boolean,
}  # fmt: skip


class Judged(NamedTuple):
    """The rewrites with their column `preserved` (0..1, null where unreadable), and the table of judgements."""

    rewrites: pl.DataFrame
    judgements: pl.DataFrame


def judge(
    responses: pl.DataFrame,
    rewrites: pl.DataFrame,
    attributes: Mapping[str, Attribute],
    teacher: Teacher,
    *,
    cache: Path | None = None,
    tell: Callable[[str], None] | None = None,
    **asking: Any,
) -> Judged:
    """Ask a teacher for eight judgements of every pair of levels, and how far every rewrite keeps the response.

    responses: response_id, text; rewrites: as `counterfactuals.rewrites` returns them. Two rewrites that are equal
    are not asked about: no order is to be seen. `asking` goes to `ask_all`. Raises TeacherError.
    """
    places, judges = _judge_tasks(rewrites, attributes)
    checks = _preserved_tasks(responses, rewrites)
    answers = ask_all(teacher, [*judges, *checks], cache=cache, **asking)
    if tell:
        tell(f"judgements: {summary(answers[: len(judges)])}")
        tell(f"kept meaning: {summary(answers[len(judges) :])}")
    rows = [
        (*place, answer.verdict, _agrees(answer.verdict, place))
        for place, answer in zip(places, answers[: len(judges)], strict=True)
    ]
    scores = pl.Series("preserved", [answer.score for answer in answers[len(judges) :]], dtype=pl.Float64)
    return Judged(rewrites.with_columns(scores), pl.DataFrame(rows, schema=JUDGEMENTS, orient="row"))


def judging_tasks(responses: pl.DataFrame, rewrites: pl.DataFrame, attributes: Mapping[str, Attribute]) -> list[Task]:
    """Return all that `judge` would ask, to estimate its cost."""
    return [*_judge_tasks(rewrites, attributes)[1], *_preserved_tasks(responses, rewrites)]


def _judge_tasks(rewrites: pl.DataFrame, attributes: Mapping[str, Attribute]) -> tuple[list[tuple], list[Judge]]:
    """The places (the first seven columns of JUDGEMENTS) and tasks of all judgements."""
    places, tasks = [], []
    for (response, name), group in rewrites.group_by("response_id", "attribute", maintain_order=True):
        said = dict(group.select("level", "text").iter_rows())
        prompt = group["prompt"][0] or ""
        for low, high in combinations(sorted(said), 2):
            if said[low] == said[high]:
                continue
            for direction, phrasing in QUESTIONS:
                for order, first, second in (("low_first", low, high), ("high_first", high, low)):
                    places.append((response, name, low, high, direction, phrasing, order))
                    texts = said[first], said[second]
                    tasks.append(Judge(attributes[str(name)], direction, phrasing, *texts, prompt))  # pyright: ignore[reportArgumentType]
    return places, tasks


def _preserved_tasks(responses: pl.DataFrame, rewrites: pl.DataFrame) -> list[Preserved]:
    originals = dict(responses.select("response_id", "text").iter_rows())
    asked = rewrites.select("response_id", "text", "prompt").iter_rows()
    return [Preserved(originals[response], text, prompt or "") for response, text, prompt in asked]


def _agrees(verdict: str | None, place: tuple) -> bool | None:
    """Whether a verdict puts the higher level above the lower; None for none."""
    *_, direction, _, order = place
    if verdict is None:
        return None
    chose_high = (verdict == "first") == (order == "high_first")
    return chose_high == (direction == "higher")


def verified(
    rewrites: pl.DataFrame, judgements: pl.DataFrame, threshold: float = AGREEMENT, preserved: float = PRESERVED
) -> pl.DataFrame:
    """Return every ordered pair of levels with its evidence and whether it is kept.

    Columns: response_id, attribute, low, high, low_text, high_text, agreement (share of readable judgements that
    confirm the order, null where none is readable), readable (0..8), preserved (the lesser of the two rewrites), kept:
    agreement and preserved reach their thresholds and four judgements or more are readable. What was not judged is not
    kept.
    """
    side = rewrites.select("response_id", "attribute", "level", "text", "preserved")
    both = side.join(side, on=["response_id", "attribute"], suffix="_high").filter(
        pl.col("level") < pl.col("level_high")
    )
    votes = judgements.group_by(PAIR).agg(agreement=pl.col("agrees").mean(), readable=pl.col("agrees").count())
    pairs = both.select(
        "response_id",
        "attribute",
        low="level",
        high="level_high",
        low_text="text",
        high_text="text_high",
        # min_horizontal would pass over a null, which stands for a score that nobody could read
        preserved=pl.when(pl.col("preserved") < pl.col("preserved_high"))
        .then("preserved")
        .when(pl.col("preserved").is_not_null())
        .then("preserved_high"),
    ).join(votes, on=PAIR, how="left")
    enough = pl.col("readable") >= READABLE
    kept = enough & (pl.col("agreement") >= threshold) & (pl.col("preserved") >= preserved)
    table = pairs.with_columns(pl.col("readable").fill_null(0).cast(pl.Int64)).with_columns(kept=kept.fill_null(False))
    columns = [*PAIR, "low_text", "high_text", "agreement", "readable", "preserved", "kept"]
    return table.select(columns).sort(PAIR)


def report(pairs: pl.DataFrame, judgements: pl.DataFrame) -> pl.DataFrame:
    """Sum `verified` up, one row per attribute and gap (high - low), and one per attribute over all gaps (gap null).

    agreement: share of readable judgements that confirm the order. monotone: share of responses whose pairs of this
    gap (over all gaps: whose five levels) all have a majority for the order. order_bias: share of questions, readable
    in both orders, that got opposite verdicts. preserved: mean. pairs, kept, judgements, readable: counts.
    """
    pairs = pairs.with_columns(gap=pl.col("high") - pl.col("low"))
    judgements = judgements.with_columns(gap=pl.col("high") - pl.col("low"))
    parts = [_summed(pairs, judgements, ["attribute", "gap"]), _summed(pairs, judgements, ["attribute"])]
    return pl.concat(parts, how="diagonal").select(parts[0].columns).sort("attribute", "gap", nulls_last=True)


def _summed(pairs: pl.DataFrame, judgements: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    ordered = (pl.col("agreement") > 0.5).fill_null(False).all().alias("monotone")
    monotone = pairs.group_by("response_id", *by).agg(ordered).group_by(by).agg(pl.col("monotone").mean())
    votes = judgements.group_by(by).agg(
        agreement=pl.col("agrees").mean(), judgements=pl.len(), readable=pl.col("agrees").count()
    )
    question = [*PAIR, "direction", "phrasing"]
    asked = judgements.group_by(list(dict.fromkeys([*question, *by]))).agg(
        both=pl.col("agrees").count() == 2, differ=pl.col("agrees").n_unique() == 2
    )
    bias = asked.filter("both").group_by(by).agg(order_bias=pl.col("differ").mean())
    counts = pairs.group_by(by).agg(pairs=pl.len(), kept=pl.col("kept").sum(), preserved=pl.col("preserved").mean())
    table = counts
    for other in (votes, monotone, bias):
        table = table.join(other, on=by, how="left")
    values = ["agreement", "monotone", "order_bias", "preserved", "pairs", "kept", "judgements", "readable"]
    counted = [pl.col(name).fill_null(0).cast(pl.Int64) for name in values[4:]]
    return table.select(*by, *values[:4], *counted)
