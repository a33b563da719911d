"""Question: with attribute dropout, can the predictors stay away at inference, and what are they worth?

Command: python experiments/attribute_dropout.py [--folder palette] [--anchors 256]    (heads as in palette.py)

One community of the palette's world, so that nothing is about users; the text is read by frozen MiniLM. Three fits on
the same rows: attribute attention with dropout, the same without, and Bradley-Terry, which sees no attributes. Each
is scored with the predictors and, where it has them, without.
Result (2026-11-21, seed 0, LOG.md has the table): attributes are worth 6.0 points [1.8, 9.9] on new prompts and 2.9
[-0.3, 6.0] on new pairs of known ones; without the predictors the model loses 12.7 [8.8, 16.4] and 13.2 [9.1, 17.8]
points, 14.9 and 17.1 where it was trained without dropout. "Within 1 point" is not met on frozen features.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from palette import predictors
from rich.console import Console
from rich.table import Table

from pluralprefs import encoders
from pluralprefs.attributes.source import predicted
from pluralprefs.contrasts import paired_difference
from pluralprefs.data.lexicon import palette
from pluralprefs.evaluate import evaluate
from pluralprefs.experiment import FAMILIES, Experiment, Prepared, fit_seed, prepare, support
from pluralprefs.users import Pooled

USERS, EACH, BOOTSTRAPS = 100, 40, 2000
CELLS = ("seen/testpair", "seen/newprompt")
WITHOUT = "no_attributes"  # the control that hides the predictors
console = Console(width=140, soft_wrap=True)


def experiments(folder: Path, anchors: int) -> dict[str, Experiment]:
    """The three fits, by name."""
    shared: dict[str, Any] = {
        "data": partial(palette, communities=1, users_per_community=USERS, comparisons_per_user=EACH, seed=0,
                        phrases="all"),
        "encoder": partial(encoders.load, "minilm"), "data_name": "palette_one",
        "features": {"log_length": True, "anchors": anchors} if anchors else {},
        "users": Pooled(levels=(), gain=False, cross_fit=None), "split": {"unseen_users": 0.0}, "shots": (0,),
        "draws": 1,
    }  # fmt: skip
    attention = {**FAMILIES["attribute_attention"], **shared, "attributes": partial(predicted, str(folder))}
    parts = {
        "with dropout": attention,
        "without dropout": {**attention, "transform": None},
        "bradley_terry": {**FAMILIES["bradley_terry"], **shared},
    }
    return {name: Experiment(name=name, **of) for name, of in parts.items()}


def predictions(asked: Experiment, prepared: Prepared, seed: int) -> pl.DataFrame:
    """Rows of `evaluate`, with and without attributes, under one model's name so that fits can be paired."""
    fitted = fit_seed(asked, prepared, seed)
    return evaluate(
        fitted, prepared.features, prepared.table, prepared.rows, support(asked, prepared.table), model="m", seed=seed,
        shots=asked.shots, adapter=asked.adapter, controls=True,
    )  # fmt: skip


def main(folder: Path, anchors: int, seed: int) -> None:
    """Fit the three and print accuracies and paired differences."""
    predictors(folder)
    found = {}
    for name, asked in experiments(folder, anchors).items():
        console.print(f"fitting: {name}")
        found[name] = predictions(asked, prepare(asked, progress=False), seed)

    def of(name: str, cell: str, *, hidden: bool = False) -> pl.DataFrame:
        control = pl.col("control") == WITHOUT if hidden else pl.col("control").is_null()
        return found[name].filter(control, pl.col("cell") == cell).with_columns(control=pl.lit(None, pl.String))

    table = Table(title="Accuracy in points, 95 % intervals over users", title_justify="left")
    for head in ("cell", "what", "points"):
        table.add_column(head)
    for cell in CELLS:
        for name, rows in found.items():
            plain = of(name, cell)
            right = (plain["log_odds"] > 0).to_numpy() == (plain["target"] > 0.5).to_numpy()
            table.add_row(cell, name, f"{100 * right.mean():.1f}")
            if (rows["control"] == WITHOUT).any():
                table.add_row(cell, f"{name}: predictors minus none", _difference(plain, of(name, cell, hidden=True)))
        for other in ("without dropout", "bradley_terry"):
            table.add_row(cell, f"with dropout minus {other}", _difference(of("with dropout", cell), of(other, cell)))
    console.print(table)


def _difference(one: pl.DataFrame, other: pl.DataFrame) -> str:
    d = paired_difference(one, other, "accuracy", BOOTSTRAPS, 0)
    low, high = (float("nan") if end is None else 100 * end for end in (d.ci_low, d.ci_high))
    return f"{100 * d.value:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("palette"))
    parser.add_argument("--anchors", type=int, default=0, help="anchors of a kernel beside the embedding")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    main(asked.folder, asked.anchors, asked.seed)
