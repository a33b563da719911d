"""Question: which parts of a model predict what nobody has judged, told without a test row of the protocol?

The protocol has few validation rows, 718 on polis, too few to tell models apart that differ by 0.005 nats. So its split
is made again within its training rows (as the protocol splits all, by another hash each time), every variant is fitted
as the experiment file would, and the variants are compared, paired, with intervals over users. No row that the protocol
tests on is read.
Command: PLURALPREFS_DATA=... python experiments/inner_splits.py polis [--variants plain,length] [--splits 3]
Result (2026-11-23, three splits), nats and points of accuracy.

polis, bradley_terry, 160 leading components minus all 384 columns:

    seen/testpair          -0.0216 [-0.0270, -0.0162], +2.1 [+1.1, +2.9]
    unseen/testpair        -0.0235 [-0.0341, -0.0118], +1.0 [-1.7, +3.5] at 0 shots
                           -0.0165 [-0.0261, -0.0059], +2.1 [+0.0, +4.2] at 32
    unseen/newprompt       -0.0073 [-0.0153, +0.0009], +3.5 [+1.3, +5.7] at 0
                           -0.0038 [-0.0131, +0.0057], +1.9 [+0.0, +3.9] at 32

so experiments/polis.py has them. Of log length (2026-11-22, two splits, all columns): +0.0009 [-0.0039, +0.0056] on
seen/testpair, so it goes without; LOG.md has the rest. Other numbers of components were not run to the end.

ukpconvarg1, ideal_point, a linear projector, length and smaller steps minus what the family has by default:

    seen/testpair          -0.0165 [-0.0208, -0.0125], +0.9 [+0.4, +1.5]
    seen/newprompt         -0.0746 [-0.0837, -0.0644], +3.9 [+3.2, +4.6]
    unseen/testpair        -0.0167 [-0.0238, -0.0099], +0.8 [-0.2, +1.8] at 32 shots
    unseen/newprompt       -0.0615 [-0.0789, -0.0384], +3.6 [+2.1, +5.2] at 32

so experiments/ukpconvarg1.py has them. On seen/newprompt 69.6; 0.579, for 65.7; 0.654 by default, 66.6; 0.613 by a
linear projector alone, 68.7; 0.607 by length alone and 68.8; 0.583 by 160 components and both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optax
import polars as pl
import polis
import ukpconvarg1
from new_users import written
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

CELLS = {"seen/testpair": (None,), "seen/newprompt": (None,), "unseen/testpair": (0, 16, 32),
         "unseen/newprompt": (0, 32)}  # fmt: skip
SPLIT_BY: dict[str, Any] = {"polis": "item", "ukpconvarg1": "pair"}  # as the protocol does
console = Console(width=160, soft_wrap=True)


def of_polis() -> dict[str, Experiment]:
    """Features and users of bradley_terry."""
    leading = replace(polis.experiments["bradley_terry"], support=None, draws=2, shots=(0, 16, 32))
    plain = replace(leading, features={})
    length = replace(plain, features={"log_length": True})
    components = {
        f"leading{n}": replace(leading, features={"log_length": False, "components": n}) for n in (64, 96, 256)
    }
    return {
        "plain": plain,
        "leading": leading,
        **components,
        "leading_length": replace(leading, features={"log_length": True, "components": 160}),
        "length": length,
        "tempered": replace(plain, users=replace(polis.pooled, temper=(0.5,))),
        "length_tempered": replace(length, users=replace(polis.pooled, temper=(0.5,))),
        "length_linear": replace(length, users=replace(polis.pooled, parts=("linear",))),
    }


def of_ukpconvarg1() -> dict[str, Experiment]:
    """Projector, features and steps of ideal points."""
    linear_length = replace(ukpconvarg1.experiments["ideal_point"], support=None, draws=2, shots=(0, 32))
    plain = replace(ukpconvarg1.base["ideal_point"], support=None, draws=2, shots=(0, 32))
    steps = {"optimizer": partial(optax.adamw, learning_rate=1e-3, weight_decay=1e-2)}
    return {
        "plain": plain,
        "linear_length": linear_length,
        "steps": replace(plain, **steps),
        "linear": replace(linear_length, features={}),
        "length": replace(plain, features={"log_length": True}, **steps),
        "linear_components": replace(linear_length, features={"log_length": True, "components": 160}),
    }


VARIANTS: dict[str, Callable[[], dict[str, Experiment]]] = {"polis": of_polis, "ukpconvarg1": of_ukpconvarg1}


def inner(name: str, number: int) -> pl.DataFrame:
    """The protocol's training rows of a set, split again as the protocol splits all."""
    rows = protocol.load(polis.DATA, name).filter(pl.col("cell").is_in(splits.TRAINING)).drop("cell", "fold")
    return splits.split(rows, by=SPLIT_BY[name], seed=f"inner{number}").drop_nulls("cell")


def predictions(name: str, variant: str, number: int, keep: Path) -> pl.DataFrame:
    """Predictions of a variant on one inner split: read where they were made before."""
    path = keep / name / f"{variant}-{number}.parquet"
    if path.exists():
        return pl.read_parquet(path)
    experiment, table = VARIANTS[name]()[variant], inner(name, number)
    prepared = prepare(experiment, table)
    fitted = fit_seed(experiment, prepared, 0)
    rows = evaluate(fitted, prepared.features, table, prepared.rows, support(experiment, table), model=variant,
                    shots=experiment.shots, controls=False)  # fmt: skip
    rows = rows.with_columns(example_id=pl.format("{}|{}", pl.lit(number), "example_id"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, rows)
    return rows


def main(name: str, variants: list[str], count: int, keep: Path) -> None:
    """Fit what is missing and print the cells of every variant, and its nats and points minus those of the first."""
    found = {variant: pl.concat([predictions(name, variant, number, keep) for number in range(count)])
             for variant in variants}  # fmt: skip
    console.print(results_table(summarise(pl.concat(list(found.values())))), highlight=False, markup=False)
    first, *others = variants
    for variant in others:
        for cell, counts in CELLS.items():
            for shots in counts:
                pick = (pl.col("cell") == cell) & pl.col("shots").eq_missing(shots)
                if not (found[first].select(pick.any()).item()):
                    continue
                both = found[variant].filter(pick), found[first].filter(pick)
                nats = written(paired_difference(*both), digits=4)
                points = written(paired_difference(*both, "accuracy"), scale=100, digits=1)
                at = cell if shots is None else f"{cell}@{shots}"
                console.print(
                    f"{variant} minus {first}, {at}: {nats} nats, {points} points", highlight=False, markup=False
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(VARIANTS))
    parser.add_argument("--variants", help="comma-separated; the first is compared with (all by default)")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("runs/inner_splits"), help="folder of predictions")
    given = parser.parse_args()
    known = VARIANTS[given.set]()
    asked = list(known) if given.variants is None else given.variants.split(",")
    if unknown := [name for name in asked if name not in known]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    main(given.set, asked, given.splits, given.keep)
