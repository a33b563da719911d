"""Ordered pairs that attribute predictors learn from and are tested on, each in one named split.

train, validation     pairs of training responses
heldout_responses     responses that training never saw, in wordings of their own where the teacher has such
heldout_communities   responses of communities that training never saw
heldout_levels        one pair of levels that training leaves out; its texts were seen in other pairs
"""

from __future__ import annotations

import polars as pl

from pluralprefs.attributes.folds import HELDOUT_COMMUNITIES, HELDOUT_RESPONSES, TRAIN, VALIDATION

HELDOUT_LEVELS = "heldout_levels"
SPLITS = (TRAIN, VALIDATION, HELDOUT_RESPONSES, HELDOUT_COMMUNITIES, HELDOUT_LEVELS)


def ordered_pairs(
    verified: pl.DataFrame, responses: pl.DataFrame, heldout_levels: tuple[int, int] | None = (1, 3)
) -> pl.DataFrame:
    """Return the kept pairs of `verification.verified` with their split and gap (high - low), in a fixed order.

    responses: response_id and `fold` (`folds.with_folds`). heldout_levels: (low, high) of the pair that training leaves
    out, None for none. Raises ValueError where levels are no such pair, or where no pair is kept.
    """
    if heldout_levels is not None and not 0 <= heldout_levels[0] < heldout_levels[1] <= 4:
        raise ValueError(f"heldout_levels={heldout_levels}: give two levels of 0 to 4, the lower one first")
    low, high = heldout_levels or (-1, -1)
    apart = pl.col("fold").is_in([TRAIN, VALIDATION]) & (pl.col("low") == low) & (pl.col("high") == high)
    pairs = (
        verified.filter("kept")
        .join(responses.select("response_id", "fold"), on="response_id", how="inner")
        .with_columns(split=pl.when(apart).then(pl.lit(HELDOUT_LEVELS)).otherwise("fold"))
        .with_columns(gap=pl.col("high") - pl.col("low"))
    )
    if not pairs.height:
        raise ValueError(f"no pair of {verified.height} is kept: lower the threshold, or look at the report")
    columns = ["response_id", "attribute", "low", "high", "low_text", "high_text", "gap", "split"]
    return pairs.select(columns).sort("attribute", "response_id", "low", "high")


def shared_texts(pairs: pl.DataFrame) -> set[str]:
    """Return the texts that stand both in training pairs and in those of held-out responses or communities."""

    def texts(*splits: str) -> set[str]:
        rows = pairs.filter(pl.col("split").is_in(splits))
        return {*rows["low_text"], *rows["high_text"]}

    return texts(TRAIN, VALIDATION, HELDOUT_LEVELS) & texts(HELDOUT_RESPONSES, HELDOUT_COMMUNITIES)
