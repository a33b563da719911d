"""Differences between predictions on the same judgements: two models, a user against a stranger's state.

Two accuracies with overlapping intervals may still differ surely, because both saw the same easy and hard rows. So
the difference is taken row by row, averaged, and its interval is over users.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from pluralprefs.intervals import Estimate, Rows, estimate_mean
from pluralprefs.metrics import check_predictions, metric_rows, row_nats, row_scores

KEY = ("example_id", "cell", "shots", "draw")


def paired_difference(
    predictions_a: pl.DataFrame, predictions_b: pl.DataFrame, metric: str = "nll", draws: int = 2000, seed: int = 0
) -> Estimate:
    """Estimate metric(a) - metric(b), "nll" (nats) or "accuracy", on the same judgements, with interval and p-value.

    Each side holds one model and one control. Rows are matched on example_id, cell, shots and draw; several seeds of
    a model are averaged row by row first. Raises ValueError where the two sides do not hold the same judgements.
    """
    if metric not in ("nll", "accuracy"):
        raise ValueError(f"paired_difference: metric {metric!r} is unknown; use 'nll' or 'accuracy'")
    pairs = _matched(_one_model(predictions_a, "a"), _one_model(predictions_b, "b"))
    values = (pairs[metric] - pairs[f"{metric}_b"]).to_numpy()
    weight = pairs["weight"].to_numpy()
    if metric == "accuracy":
        weight = weight * pairs["decided"].to_numpy()
    return estimate_mean(values, pairs["user_id"], weight, draws, seed)


def _one_model(predictions: pl.DataFrame, side: str) -> pl.DataFrame:
    rows = check_predictions(predictions)
    for column in ("model", "control"):
        found = rows[column].unique().sort().to_list()
        if len(found) > 1:
            raise ValueError(f"predictions_{side} hold several values of {column} ({found}); filter them to one")
    scored = _scored(rows)
    twice = scored.filter(pl.struct(*KEY, "seed").is_duplicated())
    if not twice.is_empty():
        raise ValueError(f"predictions_{side}: example_id {twice['example_id'][0]!r} occurs twice; drop the duplicates")
    same = pl.col("user_id", "target", "weight", "decided").first()
    return scored.group_by(*KEY).agg(same, pl.col("nll", "accuracy").mean())


def _scored(rows: pl.DataFrame) -> pl.DataFrame:
    log_odds, target = rows["log_odds"].to_numpy(), rows["target"].to_numpy()
    return rows.with_columns(
        pl.Series("nll", row_nats(log_odds, target)),
        pl.Series("accuracy", row_scores(log_odds, target)),
        (~pl.col("tie") & (pl.col("target") != 0.5)).alias("decided"),
    )


def _matched(a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    for one, other, name in ((a, b, "b"), (b, a, "a")):
        absent = one.join(other, on=KEY, how="anti", nulls_equal=True).sort(KEY)
        if not absent.is_empty():
            row = absent.row(0, named=True)
            raise ValueError(
                f"predictions_{name} lack {len(absent)} rows of the other side, first example_id {row['example_id']!r}"
                f" (cell {row['cell']!r}, shots {row['shots']}, draw {row['draw']}); compare models on the same rows"
            )
    pairs = a.join(b, on=KEY, nulls_equal=True, suffix="_b").sort(KEY)
    differ = pairs.filter(pl.col("target") != pl.col("target_b"))
    if not differ.is_empty():
        raise ValueError(f"example_id {differ['example_id'][0]!r}: the two predictions disagree about its target")
    return pairs


GAINS = {"wrong_user": "wrong_user_gain", "no_attributes": "attribute_gain"}


def controls(predictions: pl.DataFrame, seed: int = 0, pool_seeds: bool = False, draws: int = 1000) -> pl.DataFrame:
    """Compute metric rows of the controls, for each model, seed, cell and number of shots that has them.

    `wrong_user_gain`: accuracy with the user's own state minus accuracy with another user's (control "wrong_user").
    `attribute_gain`: accuracy with attributes minus accuracy without them (control "no_attributes").
    `flip_rate`: share of rows whose predicted side reverses when the labels of the context are reversed (control
    "label_flip"); a side lost to exactly 0 counts one half. All have 95 % intervals over users.
    """
    scored = _scored(check_predictions(predictions))
    group = ["model", "cell", "shots"] if pool_seeds else ["model", "seed", "cell", "shots"]
    key = ["example_id", "model", "seed", "cell", "shots", "draw"]
    right = scored.filter(pl.col("control").is_null())
    rows: list[dict[str, Any]] = []
    for control in ("wrong_user", "no_attributes", "label_flip"):
        other = scored.filter(pl.col("control") == control).select(*key, "log_odds", "accuracy")
        pairs = right.join(other, on=key, nulls_equal=True, suffix="_control").sort(key)
        for values, part in pairs.group_by(group, maintain_order=True):
            labels = dict(zip(group, values, strict=True))
            rows.extend({**labels, **row} for row in _control_row(control, part, draws, seed))
    return metric_rows(rows).sort("model", "seed", "cell", "shots", "metric")


def _control_row(control: str, part: pl.DataFrame, draws: int, seed: int) -> Iterator[dict[str, Any]]:
    weight = part["weight"].to_numpy()
    if control in GAINS:
        metric, values = GAINS[control], (part["accuracy"] - part["accuracy_control"]).to_numpy()
        weight = weight * part["decided"].to_numpy()
    else:
        metric, values = "flip_rate", reversed_side(part["log_odds"].to_numpy(), part["log_odds_control"].to_numpy())
    if not weight.any():
        return
    estimate = estimate_mean(values, part["user_id"], weight, draws, seed)
    yield {
        "metric": metric,
        "value": estimate.value,
        "count": part.filter(pl.Series(weight > 0))["example_id"].n_unique(),
        "users": estimate.users,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
    }


def reversed_side(log_odds: Rows, flipped: Rows) -> Rows:
    """Say of each row whether its side reversed: 1, 0, or 1/2 where only one of the two has no side.

    >>> reversed_side(np.array([1.0, 1.0, 1.0, 0.0]), np.array([-1.0, 2.0, 0.0, 0.0])).tolist()
    [1.0, 0.0, 0.5, 0.0]
    """
    return 0.5 * np.abs(np.sign(log_odds) - np.sign(flipped))
