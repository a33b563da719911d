"""How often attribute predictors order two rewrites rightly, by attribute, gap and split, with 95 % intervals.

The ten pairs of a response are not independent, responses are: intervals are a cluster bootstrap over responses
(`intervals.bootstrap`). Where all responses are equally often right, as where all pairs are, every resample is the same
and would give an interval without width: there it is Wilson's, as if each response were one trial.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import polars as pl

from pluralprefs.attributes.pairs import SPLITS
from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.attributes.sentences import Embed
from pluralprefs.intervals import bootstrap, number_clusters, percentile_interval, ratio

Z = 1.959964  # of a 95 % interval


def accuracy(predictors: AttributePredictors, pairs: pl.DataFrame, embed: Embed) -> pl.DataFrame:
    """Return accuracy for every attribute, gap and split of `pairs.ordered_pairs`; equal scores count one half.

    Columns: attribute (null: over all), gap (null: over all; -2: two or more), split, count, responses, accuracy,
    ci_low, ci_high (see the module). count: pairs; responses: how many different ones they are of.
    """
    judged = _judged(predictors, pairs.filter(pl.col("attribute").is_in(predictors.names)), embed)
    far = judged.filter(pl.col("gap") >= 2).with_columns(gap=pl.lit(-2, pl.Int64))
    anywhere = judged.with_columns(gap=pl.lit(None, pl.Int64))
    by_gap = pl.concat([judged, far, anywhere])
    both = pl.concat([by_gap, by_gap.with_columns(attribute=pl.lit(None, pl.Utf8))])
    parts = [_summed(part) for _, part in both.group_by("split", maintain_order=True)] or [_summed(both)]
    return pl.concat(parts).sort(pl.col("split").cast(pl.Enum(SPLITS)), "attribute", "gap", nulls_last=True)


def _summed(rows: pl.DataFrame) -> pl.DataFrame:
    """One row for each attribute and gap of a split, their intervals from the same resamples of its responses."""
    cell = ["attribute", "gap", "split"]
    table = rows.group_by(cell, maintain_order=True).agg(
        count=pl.len().cast(pl.Int64),
        responses=pl.col("response_id").n_unique().cast(pl.Int64),
        accuracy=pl.col("right").mean(),
    )
    place = rows.join(table.with_row_index("cell"), on=cell, nulls_equal=True)
    cluster, known = number_clusters(place["response_id"])
    at, shape = cluster * table.height + place["cell"].to_numpy(), (len(known), table.height)
    right, pairs = (
        np.bincount(at, weight, minlength=shape[0] * shape[1]).reshape(shape)
        for weight in (place["right"].to_numpy(), np.ones(place.height))
    )
    shares = bootstrap(lambda counts: ratio(counts @ right, counts @ pairs), len(known)) if len(known) else right
    bounds = [percentile_interval(column) for column in shares.T]
    bounds = [
        wilson(share, responses) if low == high else (low, high)
        for (low, high), share, responses in zip(bounds, table["accuracy"], table["responses"], strict=True)
    ]
    return table.with_columns(
        pl.Series(name, [bound[end] for bound in bounds], dtype=pl.Float64)
        for end, name in enumerate(("ci_low", "ci_high"))
    )


def _judged(predictors: AttributePredictors, pairs: pl.DataFrame, embed: Embed) -> pl.DataFrame:
    """The pairs with a column `right`: 1, 0, or one half where the scores are equal."""
    texts = sorted({*pairs["low_text"], *pairs["high_text"]})
    scores = predictors.scores(predictors.read(texts, embed))
    place = {text: row for row, text in enumerate(texts)}
    column = {name: position for position, name in enumerate(predictors.names)}
    attribute = np.array([column[name] for name in pairs["attribute"]], np.int64)
    low, high = (
        scores[np.array([place[text] for text in pairs[side]], np.int64), attribute]
        for side in ("low_text", "high_text")
    )
    right = pl.Series("right", 0.5 + 0.5 * np.sign(high.astype(np.float64) - low), dtype=pl.Float64)
    return pairs.select("response_id", "attribute", "gap", "split").with_columns(right)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` trials; (0, 1) for none.

    >>> [round(bound, 3) for bound in wilson(0.9, 100)]
    [0.826, 0.945]
    """
    if not count:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
