"""Who disagrees with whom, and a choice of people and pairs by it.

Two people disagree on a pair of answers where both have a consistent label and the labels differ. Synthetic people who
disagree with everybody on most pairs are noise or contrarians, and a pair on which all agree says nothing about who
somebody is: FSPO (arXiv 2502.19312) wants the structure in between. Intervals draw questions with replacement, since
pairs of one question share it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.intervals import bootstrap, percentile_interval, ratio
from pluralprefs.personas.labels import FIRST, SECOND

SCHEMA = {
    "user_id": pl.Utf8,
    "other_id": pl.Utf8,  # null: all others together
    "disagreement": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "pairs": pl.Int64,  # judged by both; with all others, judgements of theirs
}
PAIR = ["prompt_id", "first_id", "second_id"]


class Chosen(NamedTuple):
    """The labels that stay, the people left out for disagreeing too much, and how many pairs all agree on."""

    labels: pl.DataFrame
    people: tuple[str, ...]
    unanimous: int


def disagreement(labels: pl.DataFrame, draws: int = 1000, seed: int = 0) -> pl.DataFrame:
    """Return the share of pairs on which each two people differ, with 95 % intervals over questions (`SCHEMA`).

    Each two people stand in both orders. A person beside null is compared with all others together: the share of
    judgements of others, on pairs that the person judged, that differ. Null where nothing was judged by both.
    """
    names, votes, question = _votes(labels)
    rows = []
    for user, name in enumerate(names):
        both = np.abs(votes[user] * votes)
        differ = both * (votes != votes[user])
        sums = [_by_question(part, question) for part in (differ, both)]  # [questions, users] each
        for part in sums:
            part[:, user] = 0.0
        sums = [np.concatenate([part, part.sum(axis=1, keepdims=True)], axis=1) for part in sums]
        value = ratio(*(part.sum(axis=0) for part in sums))
        spread = None
        if len(sums[0]) > 1:
            spread = bootstrap(
                lambda counts, sums=sums: ratio(*(counts @ part for part in sums)), len(sums[0]), draws, seed
            )
        for other, other_name in enumerate([*names, None]):
            if other_name == name:
                continue
            low, high = (None, None) if spread is None else percentile_interval(spread[:, other])
            share = float(value[other]) if np.isfinite(value[other]) else None
            rows.append((name, other_name, share, low, high, int(sums[1][:, other].sum())))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def choose(labels: pl.DataFrame, table: pl.DataFrame, most: float | None = None, contested: bool = False) -> Chosen:
    """Leave out people who disagree with the others on more than `most` (0..1), and pairs on which all agree.

    table: as `disagreement` gives it. With `contested`, of the people who stay, pairs that two or more of them judged
    all alike are left out.
    """
    whole = table.filter(pl.col("other_id").is_null())
    odd = [] if most is None else whole.filter(pl.col("disagreement") > most)["user_id"].to_list()
    kept = labels.filter(~pl.col("user_id").is_in(odd))
    decided = kept.filter(pl.col("outcome").is_in([FIRST, SECOND]))
    alike = decided.group_by(PAIR).agg(pl.len().alias("n"), pl.col("outcome").n_unique().alias("different"))
    alike = alike.filter((pl.col("n") > 1) & (pl.col("different") == 1)).select(PAIR)
    if contested:
        kept = kept.join(alike, on=PAIR, how="anti", maintain_order="left")
    return Chosen(kept, tuple(odd), alike.height)


def _votes(labels: pl.DataFrame) -> tuple[list[str], Float[np.ndarray, "users pairs"], np.ndarray]:
    """Names, the votes of each (1 first, -1 second, 0 none), and the number of each pair's question."""
    names = labels["user_id"].unique(maintain_order=True).to_list()
    pairs = labels.select(PAIR).unique(maintain_order=True).with_row_index("pair")
    number = pl.DataFrame({"user_id": names, "user": range(len(names))}, schema_overrides={"user_id": pl.Utf8})
    said = labels.filter(pl.col("outcome").is_in([FIRST, SECOND])).join(pairs, on=PAIR).join(number, on="user_id")
    votes = np.zeros((len(names), pairs.height))
    votes[said["user"].to_numpy(), said["pair"].to_numpy()] = np.where(said["outcome"] == FIRST, 1.0, -1.0)
    return names, votes, (pairs["prompt_id"].rank("dense") - 1).to_numpy().astype(int)


def _by_question(
    values: Float[np.ndarray, "users pairs"], question: np.ndarray
) -> Float[np.ndarray, "questions users"]:
    sums = np.zeros((int(question.max(initial=-1)) + 1, len(values)))
    np.add.at(sums, question, values.T)
    return sums
