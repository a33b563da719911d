"""Question: with attribute dropout, can the predictors stay away at inference, and what are they worth?

Command: python experiments/attribute_dropout.py [--folder palette] [--fits "whole text; bradley_terry"] [--seeds 0]

One community of the palette's world, so that nothing is about users; frozen MiniLM reads the text. Attribute attention
with dropout, whose text branch reads the whole response alone or its sentences too, with or without a stand-in, and
Bradley-Terry, which sees no attributes; each is scored with the predictors and, where it has them, without.
Result (seed 0, 8,000 comparisons; LOG.md has the table and what heads). Without predictors a text branch that reads
the whole response loses 4.0 and 9.0 points (known and new prompts) with a stand-in, 13 without one; one that reads
sentences 1.4 and 2.9. Taught by 8,472 texts that nobody compared, those that taught the predictors among them, it
loses 0.9 [-0.2, 2.0] and -0.4 [-1.5, 0.7] on world 1, and on world 2, at which nobody had looked, -0.8 [-1.6, 0.1] and
0.1 [-1.1, 1.3]: within a point on both (2026-11-23). By 2,017 of known prompts alone, 1.0 and 3.1 (world 1). With
predictors it beats Bradley-Terry by 2.8 [0.5, 4.8] and 10.9 [8.2, 13.6] on world 1, 0.2 [-2.0, 2.3] and 10.6 [7.7,
13.3] on world 2: on new prompts.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from palette import predictors
from rich.console import Console

from pluralprefs import encoders
from pluralprefs.attributes.reading import SentenceEncoder
from pluralprefs.attributes.source import predicted
from pluralprefs.contrasts import paired_difference
from pluralprefs.data import splits
from pluralprefs.data.lexicon import palette
from pluralprefs.evaluate import evaluate
from pluralprefs.experiment import FAMILIES, FINAL, Experiment, Prepared, prepare, support
from pluralprefs.models.attribute_attention import AttributeAttention
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.seeds import fit_seed
from pluralprefs.users import Pooled

USERS, EACH, TEXTS, BOOTSTRAPS = 200, 40, 50, 2000  # texts of each of 42 prompts
WIDTH = 96  # of the attention, whatever the size of the embedding: MiniLM's / 4
WORLD = 0
SPLIT: dict[str, Any] = {"unseen_users": 0.0}
CELLS = ("seen/testpair", "seen/newprompt")
WITHOUT = "no_attributes"  # the control that hides the predictors
console = Console(width=140, soft_wrap=True)


def comparisons(seed: int = WORLD, texts: int = TEXTS) -> pl.DataFrame:
    """The comparisons of one community, about so many texts of each of 42 prompts."""
    return palette(
        communities=1, users_per_community=USERS, comparisons_per_user=EACH, seed=seed, texts_per_prompt=texts,
        phrases="all",
    )  # fmt: skip


def unjudged(seed: int = WORLD, texts: int = 60) -> list[str]:
    """Responses to prompts of training rows that nobody judged: another draw of such texts, none of which is tested."""
    table = splits.assign(comparisons(seed), **SPLIT).table
    known = table.filter(pl.col("cell").is_in(FINAL))["prompt"].unique()
    more = palette(
        communities=1, users_per_community=150, comparisons_per_user=EACH, seed=seed + 77, texts_per_prompt=texts,
        phrases="all",
    ).filter(pl.col("prompt").is_in(known.implode()))  # fmt: skip
    return sorted({*more["first"], *more["second"]} - {*table["first"], *table["second"]})


def taught(folder: Path, seed: int = WORLD) -> list[str]:
    """What predictors can be asked about without a judgement: four times `unjudged`, and the texts that taught them.

    Those are about all prompts, since the predictors are: that is how they know new ones. None is compared by anyone.
    """
    pairs = pl.read_parquet(folder / "pairs.parquet").filter(split="train")
    table = comparisons(seed)
    rewrites = {*pairs["low_text"], *pairs["high_text"]} - {*table["first"], *table["second"]}
    return sorted(rewrites | {*unjudged(seed, texts=240)})


def experiments(folder: Path, world: int = WORLD) -> dict[str, Experiment]:
    """The fits, by name: what the text branch reads, whether it has a stand-in, whether there is dropout."""
    shared: dict[str, Any] = {
        "data": partial(comparisons, world), "encoder": partial(encoders.load, "minilm"), "features": {},
        "data_name": "palette_one",
        "users": Pooled(levels=(), gain=False, cross_fit=None), "split": SPLIT, "shots": (0,),
        "draws": 1,
    }  # fmt: skip
    sentences = {"encoder": partial(SentenceEncoder.load, "minilm")}
    finely = {"encoder": partial(SentenceEncoder.load, "minilm", anchors=1024)}
    kernel = {"features": {"log_length": True, "anchors": 256}}
    attention = {**FAMILIES["attribute_attention"], **shared, "attributes": partial(predicted, str(folder)),
                 "model": partial(AttributeAttention.init, width=WIDTH)}  # fmt: skip
    stand_in = {"model": partial(AttributeAttention.init, width=WIDTH, stand_in=True)}
    parts = {
        "whole text": attention,
        "whole text, stand-in": {**attention, **stand_in},
        "sentences": {**attention, **sentences},
        "sentences, stand-in": {**attention, **sentences, **stand_in},
        "1,024 anchors, stand-in, unjudged": {
            **attention,
            **finely,
            **stand_in,
            "unlabelled": partial(unjudged, world),
        },
        "1,024 anchors, stand-in, unjudged and rewrites": {
            **attention,
            **finely,
            **stand_in,
            "unlabelled": partial(taught, folder, world),
        },
        "sentences, stand-in, no dropout": {**attention, **sentences, **stand_in, "transform": None},
        "bradley_terry": {**FAMILIES["bradley_terry"], **shared, **kernel},
        "bradley_terry, no item effects": {**shared, **kernel, "model": partial(BradleyTerry.init, item_effects=False)},
        "bradley_terry, sentences": {**FAMILIES["bradley_terry"], **shared, **sentences},
    }  # fmt: skip
    return {name: Experiment(name=name, **of) for name, of in parts.items()}


def predictions(asked: Experiment, prepared: Prepared, seed: int) -> pl.DataFrame:
    """Rows of `evaluate`, with and without attributes, under one model's name so that fits can be paired."""
    fitted = fit_seed(asked, prepared, seed)
    return evaluate(
        fitted, prepared.features, prepared.table, prepared.rows, support(asked, prepared.table), model="m", seed=seed,
        shots=asked.shots, adapter=asked.adapter, controls=True,
    )  # fmt: skip


def main(folder: Path, names: tuple[str, ...], seeds: tuple[int, ...], world: int) -> None:
    """Fit them and print accuracies and paired differences."""
    predictors(folder)
    found: dict[str, pl.DataFrame] = {}
    for name, asked in experiments(folder, world).items():
        if names and name not in names:
            continue
        begin, prepared = time.time(), prepare(asked, progress=False)
        found[name] = pl.concat([predictions(asked, prepared, seed) for seed in seeds])
        console.print(f"{name}: {time.time() - begin:.0f} s")
        for cell in CELLS:
            report(found, name, cell)


def report(found: dict[str, pl.DataFrame], name: str, cell: str) -> None:
    """Print accuracy of a fit, what it loses without predictors, and what it gains on each Bradley-Terry."""

    def of(name: str, *, hidden: bool = False) -> pl.DataFrame:
        control = pl.col("control") == WITHOUT if hidden else pl.col("control").is_null()
        return found[name].filter(control, pl.col("cell") == cell).with_columns(control=pl.lit(None, pl.String))

    plain, without = of(name), of(name, hidden=True)
    right = (plain["log_odds"] > 0).to_numpy() == (plain["target"] > 0.5).to_numpy()
    console.print(f"  {cell}: {100 * right.mean():.1f}")
    if without.height:
        console.print(f"    predictors minus none: {_difference(plain, without)}")
    for other in found:
        if name.startswith("bradley_terry") and not other.startswith("bradley_terry"):
            console.print(f"    {other} minus it: {_difference(of(other), plain)}")
            console.print(f"    {other} without predictors minus it: {_difference(of(other, hidden=True), plain)}")


def _difference(one: pl.DataFrame, other: pl.DataFrame) -> str:
    d = paired_difference(one, other, "accuracy", BOOTSTRAPS, 0)
    low, high = (float("nan") if end is None else 100 * end for end in (d.ci_low, d.ci_high))
    return f"{100 * d.value:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("palette"))
    parser.add_argument("--fits", default="", help="some of the fits, separated by semicolons; all by default")
    parser.add_argument("--seeds", default="0", help="of the fits, comma-separated")
    parser.add_argument("--world", type=int, default=WORLD, help="seed of the texts and comparisons")
    given = parser.parse_args()
    names = tuple(name.strip() for name in given.fits.split(";") if name)
    main(given.folder, names, tuple(int(seed) for seed in given.seeds.split(",")), given.world)
