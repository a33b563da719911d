"""How often attribute predictors order two rewrites rightly, by attribute, gap and split, with 95 % intervals."""

from __future__ import annotations

from math import sqrt

import numpy as np
import polars as pl

from pluralprefs.attributes.pairs import SPLITS
from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.attributes.sentences import Embed

Z = 1.959964  # of a 95 % interval


def accuracy(predictors: AttributePredictors, pairs: pl.DataFrame, embed: Embed) -> pl.DataFrame:
    """Return accuracy for every attribute, gap and split of `pairs.ordered_pairs`; equal scores count one half.

    Columns: attribute (null: over all), gap (null: over all; -2: two or more), split, count, responses, accuracy,
    ci_low, ci_high: Wilson's interval as if pairs were independent. The ten pairs of a response are not, so it is too
    narrow where `responses` is far below `count`.
    """
    judged = _judged(predictors, pairs.filter(pl.col("attribute").is_in(predictors.names)), embed)
    far = judged.filter(pl.col("gap") >= 2).with_columns(gap=pl.lit(-2, pl.Int64))
    anywhere = judged.with_columns(gap=pl.lit(None, pl.Int64))
    by_gap = pl.concat([judged, far, anywhere])
    both = pl.concat([by_gap, by_gap.with_columns(attribute=pl.lit(None, pl.Utf8))])
    table = both.group_by("attribute", "gap", "split").agg(
        count=pl.len().cast(pl.Int64),
        responses=pl.col("response_id").n_unique().cast(pl.Int64),
        accuracy=pl.col("right").mean(),
    )
    bounds = [wilson(share, count) for share, count in table.select("accuracy", "count").iter_rows()]
    low, high = zip(*bounds, strict=True) if bounds else ((), ())
    table = table.with_columns(pl.Series("ci_low", low, dtype=pl.Float64), pl.Series("ci_high", high, dtype=pl.Float64))
    return table.sort(pl.col("split").cast(pl.Enum(SPLITS)), "attribute", "gap", nulls_last=True)


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
