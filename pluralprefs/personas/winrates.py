"""How often the text of one system is preferred to another's, by a judge who is asked in both orders.

A judge who contradicts itself when the answers change places has not decided: that is a tie, one half, and counted, as
are equal texts, which are not asked about. What could not be read is left out and counted. Intervals draw users with
replacement; those of one user draw that user's prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from pluralprefs.data.files import DataError, read_frame, shown
from pluralprefs.data.validation import as_column
from pluralprefs.intervals import estimate_mean
from pluralprefs.personas.labels import FIRST, INCONSISTENT, SECOND, UNREADABLE, VERDICTS, ask_both, outcomes
from pluralprefs.personas.passes import Passes
from pluralprefs.personas.tasks import Prefer

TEXTS = ("prompt", "response")
KEY = ["user_id", "prompt", "number"]
SCHEMA = {
    "user_id": pl.Utf8,  # null: everybody
    "win_rate": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "wins": pl.Int64,
    "losses": pl.Int64,
    "inconsistent": pl.Int64,
    "equal": pl.Int64,
    "unreadable": pl.Int64,
}
EQUAL = "equal"


def read_generated(path: str | Path) -> pl.DataFrame:
    """Read generated text: prompt and response, user_id and description where the file has them (else null).

    Raises DataError, naming file, row and column, for a missing column or text.
    """
    table = read_frame(path, ids=("user_id",))
    for column in TEXTS:
        if column not in table.columns:
            raise DataError(f"{path}: no column {column!r} among {shown(table.columns)}; write one response a row")
    if not table.height:
        raise DataError(f"{path}: holds no responses; write one a row")
    absent = [pl.lit(None, pl.Utf8).alias(name) for name in ("user_id", "description") if name not in table.columns]
    table = table.with_columns(absent).select("user_id", "description", *TEXTS)
    for column, values in zip(table.columns, table.get_columns(), strict=True):
        table = table.with_columns(as_column(values, pl.Utf8, str(path)))
        missing = table[column].is_null().arg_true() if column in TEXTS else []
        if len(missing):
            raise DataError(f"{path}: row {missing[0] + 1}, column {column!r}: is missing; write a text")
    return table


def matched(a: pl.DataFrame, b: pl.DataFrame, a_name: str = "A", b_name: str = "B") -> pl.DataFrame:
    """Put the responses of two tables to the same prompt of the same user side by side, in the order of `a`.

    Columns: user_id, description (of `a`, else of `b`), prompt, first (of `a`), second (of `b`). Several responses to
    one prompt are matched in their order. DataError names the first row without a counterpart, or with a description
    that the other table contradicts.
    """
    left, right = (table.with_columns(pl.int_range(pl.len()).over("user_id", "prompt").alias("number"),
                                      pl.int_range(1, pl.len() + 1).alias("row")) for table in (a, b))  # fmt: skip
    for table, other, name, other_name in ((left, right, a_name, b_name), (right, left, b_name, a_name)):
        alone = table.join(other, on=KEY, how="anti", nulls_equal=True).sort("row")
        if alone.height:
            who, prompt = alone["user_id"][0], shown(alone["prompt"][0])
            raise DataError(f"{name}: row {alone['row'][0]}: {other_name} has no response of user {shown(who)} to "
                            f"{prompt} for it; give both the same prompts and users")  # fmt: skip
    both = left.join(right, on=KEY, nulls_equal=True, maintain_order="left", suffix="_b")
    differ = both.filter(pl.col("description") != pl.col("description_b"))
    if differ.height:
        row, who = differ["row"][0], shown(differ["user_id"][0])
        raise DataError(f"{a_name}: row {row}: user {who} is described otherwise in {b_name}; give one description")
    return both.select(
        "user_id",
        pl.coalesce("description", "description_b").alias("description"),
        "prompt",
        first="response",
        second="response_b",
    )


def judging_tasks(pairs: pl.DataFrame) -> list[Prefer]:
    """Return a task for each pair of different texts; `labels.both_orders` of them is what `judged` asks."""
    apart = pairs.filter(pl.col("first") != pl.col("second"))
    return [
        Prefer(description or "", prompt, first, second)
        for description, prompt, first, second in apart.select("description", "prompt", "first", "second").iter_rows()
    ]


def judged(pairs: pl.DataFrame, passes: Passes, *, tell: Callable[[str], None] | None = None) -> pl.DataFrame:
    """Judge each pair in both orders: `matched` with forward, backward, outcome and score.

    The judge goes by the description; where there is none, by which answer is better. score: 1 where the first is
    preferred in both orders, 0 where the second is, 1/2 where they contradict each other (inconsistent) or are equal,
    null where a verdict could not be read. Raises TeacherError.
    """
    tasks = judging_tasks(pairs)
    verdicts = ask_both(tasks, len(tasks), passes)
    if tell:
        tell(f"judgements: {passes.tally}")
    apart = (pairs["first"] != pairs["second"]).to_numpy()
    whole = np.full((pairs.height, 2), -1, np.int8)
    whole[apart] = verdicts
    words = {number: word for word, number in VERDICTS.items()}
    said = [pl.Series(name, whole[:, column]).replace_strict(words, return_dtype=pl.Utf8)
            for column, name in enumerate(("forward", "backward"))]  # fmt: skip
    outcome = pl.Series("outcome", [str(word) for word in outcomes(whole)]).zip_with(
        pl.Series(apart), pl.Series("outcome", [EQUAL] * pairs.height, dtype=pl.Utf8)
    )
    score = {FIRST: 1.0, SECOND: 0.0, INCONSISTENT: 0.5, EQUAL: 0.5, UNREADABLE: None}
    rows = pl.concat([pairs, pl.DataFrame([*said, outcome])], how="horizontal")
    return rows.with_columns(score=pl.col("outcome").replace_strict(score, return_dtype=pl.Float64))


def win_rates(rows: pl.DataFrame, draws: int = 1000, seed: int = 0) -> pl.DataFrame:
    """Return the share that the first wins, ties one half, for everybody and for each user (`SCHEMA`).

    rows: as `judged` gives them. Everybody's interval is over users (rows without a user count as one each), a user's
    is over that user's prompts; null where there is but one to draw, or nothing could be read.
    """
    whole = [_rate(rows, None, "user_id", draws, seed)]
    known = rows.filter(pl.col("user_id").is_not_null())
    each = [
        _rate(part, str(name), "prompt", draws, seed)
        for (name,), part in known.group_by(["user_id"], maintain_order=True)
    ]
    return pl.DataFrame(whole + each, schema=SCHEMA)


def _rate(rows: pl.DataFrame, name: str | None, cluster: str, draws: int, seed: int) -> dict[str, object]:
    counts = dict(rows["outcome"].value_counts().iter_rows())
    read = rows.filter(pl.col("score").is_not_null())
    values = {"win_rate": None, "ci_low": None, "ci_high": None}
    if read.height:
        found = estimate_mean(read["score"].to_numpy(), read[cluster], draws=draws, seed=seed)
        values = {"win_rate": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high}
    numbers = {"wins": FIRST, "losses": SECOND, "inconsistent": INCONSISTENT, "equal": EQUAL, "unreadable": UNREADABLE}
    return {"user_id": name, **values, **{column: counts.get(outcome, 0) for column, outcome in numbers.items()}}
