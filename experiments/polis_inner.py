"""Question: which parts of the polis model predict statements that nobody has judged, told without a test row?

The protocol has 718 validation rows, too few to tell models apart that differ by 0.005 nats. So its split is made again
within its training rows (by statement, users and conversations too, by another hash each time), every variant is fitted
as experiments/polis.py would be, and the variants are compared, paired, with intervals over users. No row that the
protocol tests on is read.
Command: PLURALPREFS_DATA=... python experiments/polis_inner.py [--variants plain,length] [--splits 3] [--keep FOLDER]
Result (2026-11-23, three splits): 160 leading components minus all 384 columns, nats and points of accuracy:

    seen/testpair          -0.0216 [-0.0270, -0.0162], +2.1 [+1.1, +2.9]
    unseen/testpair        -0.0235 [-0.0341, -0.0118], +1.0 [-1.7, +3.5] at 0 shots
                           -0.0165 [-0.0261, -0.0059], +2.1 [+0.0, +4.2] at 32
    unseen/newprompt       -0.0073 [-0.0153, +0.0009], +3.5 [+1.3, +5.7] at 0
                           -0.0038 [-0.0131, +0.0057], +1.9 [+0.0, +3.9] at 32

so experiments/polis.py has them. Of log length (2026-11-22, two splits, all columns): +0.0009 [-0.0039, +0.0056] on
seen/testpair, so it goes without; LOG.md has the rest. Other numbers of components were not run to the end.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import polars as pl
from new_users import written
from polis import DATA, experiments, pooled
from rich.console import Console

from pluralprefs.contrasts import paired_difference
from pluralprefs.data import splits
from pluralprefs.data.sources import protocol
from pluralprefs.evaluate import evaluate
from pluralprefs.experiment import Experiment, prepare, support
from pluralprefs.metrics import summarise
from pluralprefs.registry.files import write_parquet
from pluralprefs.results import results_table
from pluralprefs.seeds import fit_seed

CELLS = {"seen/testpair": (None,), "unseen/testpair": (0, 16, 32), "unseen/newprompt": (0, 32)}
leading = replace(experiments["bradley_terry"], support=None, draws=2, shots=(0, 16, 32))
plain = replace(leading, features={})
length = replace(plain, features={"log_length": True})
VARIANTS: dict[str, Experiment] = {
    "plain": plain,
    "leading": leading,
    **{f"leading{n}": replace(leading, features={"log_length": False, "components": n}) for n in (64, 96, 256)},
    "leading_length": replace(leading, features={"log_length": True, "components": 160}),
    "length": length,
    "tempered": replace(plain, users=replace(pooled, temper=(0.5,))),
    "length_tempered": replace(length, users=replace(pooled, temper=(0.5,))),
    "length_linear": replace(length, users=replace(pooled, parts=("linear",))),
}
console = Console(width=160, soft_wrap=True)


def inner(number: int) -> pl.DataFrame:
    """The protocol's training rows, split again as the protocol splits all."""
    rows = protocol.load(DATA, "polis").filter(pl.col("cell").is_in(splits.TRAINING)).drop("cell", "fold")
    return splits.split(rows, by="item", seed=f"inner{number}").drop_nulls("cell")


def predictions(variant: str, number: int, keep: Path) -> pl.DataFrame:
    """Predictions of a variant on one inner split: read where they were made before."""
    path = keep / f"{variant}-{number}.parquet"
    if path.exists():
        return pl.read_parquet(path)
    experiment, table = VARIANTS[variant], inner(number)
    prepared = prepare(experiment, table)
    fitted = fit_seed(experiment, prepared, 0)
    rows = evaluate(fitted, prepared.features, table, prepared.rows, support(experiment, table), model=variant,
                    shots=experiment.shots, controls=False)  # fmt: skip
    rows = rows.with_columns(example_id=pl.format("{}|{}", pl.lit(number), "example_id"))
    keep.mkdir(parents=True, exist_ok=True)
    write_parquet(path, rows)
    return rows


def main(variants: list[str], count: int, keep: Path) -> None:
    """Fit what is missing and print the cells of every variant, and its nats minus those of the first."""
    found = {name: pl.concat([predictions(name, number, keep) for number in range(count)]) for name in variants}
    console.print(results_table(summarise(pl.concat(list(found.values())))), highlight=False, markup=False)
    first, *others = variants
    for variant in others:
        for cell, counts in CELLS.items():
            for shots in counts:
                pick = (pl.col("cell") == cell) & pl.col("shots").eq_missing(shots)
                nats = written(paired_difference(found[variant].filter(pick), found[first].filter(pick)), digits=4)
                at = cell if shots is None else f"{cell}@{shots}"
                console.print(f"{variant} minus {first}, {at}: {nats} nats", highlight=False, markup=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; the first is compared with")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("runs/polis_inner"), help="folder of predictions")
    given = parser.parse_args()
    asked = given.variants.split(",")
    if unknown := [name for name in asked if name not in VARIANTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    main(asked, given.splits, given.keep)
