"""Predictors that know nothing of meaning, and one that knows too much: the rows every results table carries.

Length only: log-odds = a * (difference of log(1 + characters)), a fitted on the training rows. It reaches 69 % on
UKPConvArg1, so a reward model that does not beat it has learned length.

Artefact probe: logistic regression on what is visible without reading (length, line breaks, bullets, code fences,
share of capitals, phrases of refusal). It has no intercept, so that swapping the sides negates the log-odds.

Majority of others (an oracle): log((wins + 1) / (losses + 1)) over what all OTHER users judged about the same pair of
responses to the same prompt, whatever fold their rows are in. It bounds what a model without users could know about
pairs that were judged by many, and is 0 where nobody else judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.intervals import Rows
from pluralprefs.metrics import PREDICTIONS, sigmoid, summarise

Features = Float[np.ndarray, "rows features"]

ARTEFACTS = ("length", "log_length", "line_breaks", "bullets", "code_fences", "capitals", "refusal")
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
REFUSAL = re.compile(
    r"\b(?:I['’]?\s?a?m (?:sorry|unable|not able)|I (?:cannot|can['’]t|won['’]t|must decline)"
    r"|as an AI|as a language model)\b",
    re.IGNORECASE,
)


def majority_of_others(table: pl.DataFrame) -> Rows:
    """Return the leave-one-user-out majority as log-odds [rows]; a tie or graded target is a part of a win.

    Rows without a user count as one user each. Responses are matched by prompt_id and ids, whatever their sides.
    """
    swapped = pl.col("first_id") > pl.col("second_id")
    row = pl.int_range(pl.len())
    votes = table.select(
        "prompt_id",
        low=pl.min_horizontal("first_id", "second_id"),
        high=pl.max_horizontal("first_id", "second_id"),
        user=pl.struct("user_id", pl.when(pl.col("user_id").is_null()).then(row).alias("row")),
        win=pl.when(swapped).then(1.0 - pl.col("target")).otherwise("target"),
        side=pl.when(swapped).then(-1.0).otherwise(1.0) * (pl.col("first_id") != pl.col("second_id")),
    )
    pair = ["prompt_id", "low", "high"]
    wins = pl.col("win").sum().over(pair) - pl.col("win").sum().over([*pair, "user"])
    judged = pl.len().over(pair).cast(pl.Float64) - pl.len().over([*pair, "user"]).cast(pl.Float64)
    log_odds = ((wins + 1.0) / (judged - wins + 1.0)).log()
    return votes.select(pl.col("side") * log_odds).to_series().to_numpy()


def length_only(train: pl.DataFrame, test: pl.DataFrame) -> Rows:
    """Return log-odds [test rows] from the difference of log lengths, the slope fitted on `train`."""
    slope = fit_logistic(_length_difference(train), _targets(train), _weights(train))
    return _length_difference(test) @ slope


def artefact_log_odds(train: pl.DataFrame, test: pl.DataFrame) -> Rows:
    """Return log-odds [test rows] of the logistic regression on artefacts fitted on `train`."""
    features = artefact_differences(train)
    scale = np.sqrt((features**2).mean(axis=0)) if len(features) else np.ones(len(ARTEFACTS))
    scale[scale == 0] = 1.0
    slopes = fit_logistic(features / scale, _targets(train), _weights(train))
    return (artefact_differences(test) / scale) @ slopes


def artefact_probe(train: pl.DataFrame, test: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Score `test` (rows of the comparisons table with `cell`) by artefacts and by length; return metric rows."""
    models = {"artefact probe": artefact_log_odds(train, test), "length only": length_only(train, test)}
    tables = [prediction_rows(test, log_odds, model) for model, log_odds in models.items()]
    return summarise(pl.concat(tables), seed=seed)


def prediction_rows(table: pl.DataFrame, log_odds: Rows, model: str, **columns: Any) -> pl.DataFrame:
    """Lay log-odds beside the rows of a comparisons table as predictions; `columns` sets shots, draw, seed, control."""
    constants = {"model": model, **columns}
    table = table.with_columns(pl.Series("log_odds", log_odds, dtype=pl.Float64))
    return table.select(
        pl.lit(constants[name], dtype=kind).alias(name)
        if name in constants
        else (pl.col(name) if name in table.columns else pl.lit(None)).cast(kind).alias(name)
        for name, kind in PREDICTIONS.items()
    )


def fit_logistic(
    features: Features, target: Rows, weight: Rows, ridge: float = 1e-3, steps: int = 50
) -> Float[np.ndarray, " features"]:
    """Fit slopes without intercept by damped Newton on mean nats + ridge |slopes|^2 / 2; soft targets are welcome."""
    slopes = np.zeros(features.shape[1])
    total = max(float(weight.sum()), 1e-12)
    for _ in range(steps):
        probability = sigmoid(features @ slopes)
        gradient = features.T @ (weight * (probability - target)) / total + ridge * slopes
        curvature = features.T @ (features * (weight * probability * (1 - probability))[:, None]) / total
        step = np.linalg.solve(curvature + ridge * np.eye(len(slopes)), gradient)
        size = np.abs(step).max(initial=0.0)
        slopes = slopes - step * min(1.0, 2.0 / max(size, 1e-12))  # at most 2 units of log-odds per feature a step
        if size < 1e-8:
            break
    return slopes


def artefact_differences(table: pl.DataFrame) -> Features:
    """Return features of the first minus features of the second response [rows, 7], in the order of `ARTEFACTS`."""
    return _of_texts(table, lambda rows: _artefacts(texts(rows, "first")) - _artefacts(texts(rows, "second")))


def texts(table: pl.DataFrame, side: str) -> list[str]:
    """Return the responses of one side as plain strings; the messages of a chat are joined by line breaks."""
    column = table[side]
    if isinstance(column.dtype, pl.List):
        column = column.list.eval(pl.element().struct.field("content").fill_null("")).list.join("\n")
    return column.fill_null("").to_list()


def _artefacts(responses: Sequence[str]) -> Features:
    known = {text: _artefacts_of(text) for text in set(responses)}
    return np.array([known[text] for text in responses], dtype=float).reshape(-1, len(ARTEFACTS))


def _artefacts_of(text: str) -> tuple[float, ...]:
    letters = sum(character.isalpha() for character in text)
    return (
        len(text) / 1000,
        float(np.log1p(len(text))),
        np.log1p(text.count("\n")),
        np.log1p(len(BULLET.findall(text))),
        np.log1p(text.count("```")),
        sum(character.isupper() for character in text) / max(letters, 1),
        float(bool(REFUSAL.search(text))),
    )


def _length_difference(table: pl.DataFrame) -> Features:
    def differences(rows: pl.DataFrame) -> Features:
        first, second = (np.log1p([len(text) for text in texts(rows, side)]) for side in ("first", "second"))
        return (first - second).reshape(-1, 1)

    return _of_texts(table, differences)


def _of_texts(table: pl.DataFrame, compute: Callable[[pl.DataFrame], Features]) -> Features:
    """A row of features a row, of several processes each made by one that has its texts (`data.parts`)."""
    from pluralprefs.hosts import divided  # JAX, which a table of results does not need

    return divided(table["first"].is_not_null().to_numpy(), lambda own: compute(table[own]))


def _targets(table: pl.DataFrame) -> Rows:
    return table["target"].cast(pl.Float64).to_numpy()


def _weights(table: pl.DataFrame) -> Rows:
    return table["weight"].to_numpy() if "weight" in table.columns else np.ones(len(table))
