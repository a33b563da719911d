"""Which of a teacher's rewrites can be believed: every pair of levels is judged eight times, and filtered by it.

A pair of levels of one response and attribute is asked in two phrasings of "which is higher" and two of "which is
lower", each in both orders. Its agreement is the share of readable judgements that confirm the order of the levels;
a teacher that answers by position gets one half. Beside it stands how far the rewrites keep what the response said.
PrefPalette (arXiv 2507.13541) verifies norms alone, and its released code never uses the verdicts; here `kept` decides
which pairs `pairs.ordered_pairs` trains on, for norms and values alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int

from pluralprefs.attributes.asking import Tally, ask_in_order
from pluralprefs.attributes.catalog import Attribute
from pluralprefs.attributes.teacher import QUESTIONS, Judge, Preserved, Task, Teacher

AGREEMENT = 0.75  # six of eight judgements
PRESERVED = (
    0.1  # above "it says something else", 0; one sentence of many, which is what the lexicon calls concise, passes
)
READABLE = 4  # half of the eight judgements of a pair
PAIR = ["response_id", "attribute", "low", "high"]
VERDICTS, ORDERS = pl.Enum(["first", "second"]), pl.Enum(["low_first", "high_first"])
NUMBER = {None: -1, "first": 0, "second": 1}  # of a verdict
QUESTION = {"direction": pl.Enum(["higher", "lower"]), "phrasing": pl.Int64, "order": ORDERS}
ASKED = [(*question, order) for question in QUESTIONS for order in ORDERS.categories]  # of every pair of levels


class Judged(NamedTuple):
    """The rewrites with their column `preserved` (0..1, null where unreadable), and the table of judgements.

    Columns of the latter: those of `PAIR`, direction, phrasing and order of the question, verdict, and agrees: whether
    the verdict confirms the order of the levels. Both are null where the answer could not be read.
    """

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
    are not asked about: no order is to be seen. `asking` goes to `ask_in_order`. Raises TeacherError.

    Tasks and answers are held a block at a time; of all judgements one byte each, until the table is made.
    """
    pairs = _different(rewrites)
    tasks = chain(_judge_tasks(pairs, attributes), _preserved_tasks(responses, rewrites))
    total = pairs.height * len(ASKED) + rewrites.height
    judgements, checks = Tally(), Tally()
    verdicts = np.full(pairs.height * len(ASKED), -1, np.int8)
    scores = []
    with closing(ask_in_order(teacher, tasks, total, cache=cache, **asking)) as answers:  # it holds a lock and a file
        for place, answer in enumerate(islice(answers, len(verdicts))):
            judgements.add(answer)
            verdicts[place] = NUMBER[answer.verdict]
        for answer in answers:
            checks.add(answer)
            scores.append(answer.score)
    if tell:
        tell(f"judgements: {judgements}")
        tell(f"kept meaning: {checks}")
    preserved = pl.Series("preserved", scores, dtype=pl.Float64)
    return Judged(rewrites.with_columns(preserved), _judgements(pairs.select(PAIR), verdicts))


def judging_tasks(
    responses: pl.DataFrame, rewrites: pl.DataFrame, attributes: Mapping[str, Attribute]
) -> Iterator[Task]:
    """Yield all that `judge` would ask, to estimate its cost."""
    yield from _judge_tasks(_different(rewrites), attributes)
    yield from _preserved_tasks(responses, rewrites)


def _different(rewrites: pl.DataFrame) -> pl.DataFrame:
    """Pairs of levels of one response and attribute with different texts: `PAIR`, low_text, high_text, prompt.

    In the order in which responses and attributes first occur, then by levels.
    """
    group = ["response_id", "attribute"]
    number = rewrites.select(group).unique(maintain_order=True).with_row_index("group")
    side = rewrites.select(*group, "level", "text", pl.col("prompt").first().over(group))
    side = side.unique([*group, "level"], keep="last").join(number, on=group)
    high = side.select("group", high="level", high_text="text")
    pairs = side.rename({"level": "low", "text": "low_text"}).join(high, on="group")
    pairs = pairs.filter((pl.col("low") < pl.col("high")) & (pl.col("low_text") != pl.col("high_text")))
    return pairs.sort("group", "low", "high").select(*PAIR, "low_text", "high_text", "prompt")


def _judge_tasks(pairs: pl.DataFrame, attributes: Mapping[str, Attribute]) -> Iterator[Judge]:
    for _, name, _, _, low, high, prompt in pairs.iter_rows():
        for direction, phrasing, order in ASKED:
            texts = (low, high) if order == "low_first" else (high, low)
            yield Judge(attributes[name], direction, phrasing, *texts, prompt or "")  # pyright: ignore[reportArgumentType]


def _preserved_tasks(responses: pl.DataFrame, rewrites: pl.DataFrame) -> Iterator[Preserved]:
    originals = dict(responses.select("response_id", "text").iter_rows())
    for response, text, prompt in rewrites.select("response_id", "text", "prompt").iter_rows():
        yield Preserved(originals[response], text, prompt or "")


def _judgements(pairs: pl.DataFrame, verdicts: Int[np.ndarray, " judgements"]) -> pl.DataFrame:
    """The table of judgements, from the number of each verdict, -1 for none."""
    table = pairs[np.repeat(np.arange(pairs.height), len(ASKED))]
    asked = pl.DataFrame(ASKED, schema=QUESTION, orient="row")[np.tile(np.arange(len(ASKED)), pairs.height)]
    words = dict(enumerate(VERDICTS.categories))
    verdict = pl.Series("verdict", verdicts).replace_strict(words, default=None, return_dtype=VERDICTS)
    chose_high = (pl.col("verdict") == "first") == (pl.col("order") == "high_first")
    return pl.concat([table, asked, verdict.to_frame()], how="horizontal").with_columns(
        agrees=chose_high == (pl.col("direction") == "higher")
    )


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
