"""Question: does the whole path work, from comparisons to a recorded, adaptable model, and how near does it come to the
best that any method could do?

Command: make demo                       (or: python experiments/demo.py [--root runs] [--small])

Two populations whose truth is known. The first is simulated: 60 users in 4 communities, hierarchical weights over eight
features. The second is text: a corpus written for this project, in which six communities prefer attributes to different
degrees, encoded with MiniLM. Both end in one table: families by cells, 95 % intervals over users, the baselines, and
the posterior predictive under the true prior given the same shots ("Bayes"), which no method can beat except by luck.
The communities of the corpus are then profiled from their comparisons and the scores of the texts on nine attributes,
and drawn beside the truth. --small makes the runs that the notebooks read, without text encoder and tables.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from shutil import which

import polars as pl
from matplotlib.figure import Figure
from rich.console import Console

from pluralprefs import encoders, plots
from pluralprefs.data import splits
from pluralprefs.data.comparisons import write
from pluralprefs.data.lexicon import corpus, corpus_world
from pluralprefs.data.lexicon.corpus import NAMES
from pluralprefs.data.simulate import World, attribute_table, bayes_predictions, hierarchical, posterior_predictive
from pluralprefs.experiment import FAMILIES, Experiment
from pluralprefs.launch import run
from pluralprefs.metrics import summarise
from pluralprefs.profiles import SCHEMA, over_seeds
from pluralprefs.registry.files import write_parquet
from pluralprefs.results import results_table
from pluralprefs.run import Run, load
from pluralprefs.users import Pooled

FEW = ("bradley_terry", "low_rank")
FAMILY_NAMES = (*FEW, "individual")  # the few first: bradley_terry has one colour in both pictures
ON_TEXT = ("bradley_terry",)
DRAWN = ("comedy_corner", "engineers", "listening_room")  # communities of the dot plot: more would hide each other
SHOTS = (0, 4, 16)
EXAMPLE = "{}/demo-comparisons.jsonl"
CELLS = ("seen/testpair", "seen/newprompt", "unseen/testpair@0", "unseen/testpair@4", "unseen/testpair@16")
SIMULATED = partial(attribute_table, "hierarchical", users=60, comparisons_per_user=60, seed=0)
console = Console(width=140, soft_wrap=True)


def simulated() -> tuple[World, pl.DataFrame]:
    """Sixty users in four communities; rows carry the features as attribute columns."""
    world = hierarchical(users=60, comparisons_per_user=60, seed=0)
    return world, world.attribute_table()


def text() -> tuple[World, pl.DataFrame]:
    """The project's own small corpus: 420 texts, 60 users, six communities."""
    world = corpus_world(seed=0)
    return world, splits.split(world.table)


def bayes(world: World, table: pl.DataFrame) -> pl.DataFrame:
    """Predictions under the true prior given the same comparisons: of seen users their training rows."""
    draws = splits.support_draws(table, shots=SHOTS, draws=1)
    curve = bayes_predictions(world, draws, table=table, shots=SHOTS, samples=4096).with_columns(draw=pl.lit(0))
    support = table.filter(pl.col("cell").is_in(["train", "validation", "train_only_final"]))
    query = table.filter(pl.col("cell").is_in(["seen/testpair", "seen/newprompt"]))
    known = posterior_predictive(world, support, query, samples=4096)
    columns = [name for name in curve.columns if name in known.columns]
    seen = known.select(columns)
    both = pl.concat([curve, seen], how="diagonal").with_columns(
        model=pl.lit("Bayes (true prior)"), seed=pl.lit(0, pl.Int64), control=pl.lit(None, pl.Utf8)
    )
    return both


def fit_family(name: str, family: str, encoder: str, root: Path, rounds: int = 3) -> Path:
    """Fit a family to one world and return the folder of the run."""
    parts = {**FAMILIES[family], "features": {}}
    pooled = parts.get("users", Pooled())
    if family == "bradley_terry":
        pooled = Pooled(levels=("community", "user"))
    parts["users"] = replace(pooled, rounds=rounds, folds=2)  # fewer than the defaults: minutes count here
    asked = Experiment(
        data=SIMULATED if name == "simulated" else partial(corpus, seed=0), encoder=partial(encoders.load, encoder),
        shots=SHOTS, draws=2, refit=False, name=family, data_name=name,
        controls=name == "simulated" and family in FEW, **parts,  # what the notebooks show
    )  # fmt: skip
    return timed(asked, root)


def timed(experiment: Experiment, root: Path) -> Path:
    """Run an experiment and print its seconds and its folder."""
    begin = time.time()
    folder = run(experiment, root=root, progress=False).folder.path
    console.print(f"  {experiment.name:20s} {experiment.data_name:12s} {time.time() - begin:5.0f} s   {folder}")
    return folder


def all_done(jobs: Sequence[Callable[[], Path]]) -> list[Run]:
    """Do the jobs in two processes, most of a small fit being compiling, and return their runs in the order asked.

    The last, which takes longest, is begun first.
    """
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        begun = [pool.submit(job) for job in reversed(jobs)]
        folders = [job.result() for job in reversed(begun)]
    return [load(folder) for folder in folders]


def communities(root: Path) -> Path:
    """Profile the communities of the corpus: the attributes that its texts express are columns of its table."""
    parts = dict(FAMILIES["attribute_attention"])
    # Only what they like may tell users apart, and nothing is cross-fitted: minutes count here.
    parts["users"] = replace(parts["users"], rounds=8, parts=("preference",), cross_fit=None)
    asked = Experiment(
        data=partial(corpus, seed=0), encoder=partial(encoders.load, "attributes"), shots=(0,), draws=1, refit=False,
        split={"unseen_users": 0.0}, controls=False, save_users=True, epochs=40, name="attribute_attention",
        data_name="communities", **parts,
    )  # fmt: skip
    return timed(asked, root)


def true_weights(world: World, found: Run) -> pl.DataFrame:
    """What a member of each community, and of all, truly weighs on average, as profile rows per unit of the scores."""
    rows = []
    for number, community in enumerate(("", *world.community_ids)):
        own = world.truth["population"] + (world.truth["community"][number - 1] if number else 0.0)
        for attribute, unit in zip(found.attributes.names, found.attributes.std, strict=True):
            value = float(own[NAMES.index(attribute)] * unit)
            rows.append({"community": community, "attribute": attribute, "kind": "preference", "mean": value,
                         "ci_low": value, "ci_high": value})  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA)


def show_communities(found: Run, world: World, root: Path) -> None:
    """Draw the profiles beside the truth, and say how near they come to it."""
    learned, truth = over_seeds(found.folder.table("attribute_weights")), true_weights(world, found)
    write_parquet(root / "demo-truth.parquet", truth)
    beside(learned, truth).savefig(root / "demo-communities.png")
    dots = plots.profile_dots(learned, communities=DRAWN, truth=truth)
    dots.figure.savefig(root / "demo-profiles.png")  # type: ignore[union-attr]
    own = learned.filter(pl.col("kind") == "preference", pl.col("community") != "")
    both = own.join(truth.select("community", "attribute", truth="mean"), on=["community", "attribute"])
    inside = both.select(pl.col("truth").is_between("ci_low", "ci_high").mean()).item()
    near = both.select(pl.corr("mean", "truth")).item()
    console.print(f"{own.height} preferences of communities: correlation with the truth {near:.2f}; 95 % intervals "
                  f"hold it in {inside:.0%}", markup=False, highlight=False)  # fmt: skip


def beside(learned: pl.DataFrame, truth: pl.DataFrame) -> Figure:
    """Two heat maps, what was learned and the truth, in one order and one scale of colours."""
    figure = Figure(figsize=(11.5, 3.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    plots.heat_map(learned, ax=left, against="communities")
    plots.heat_map(truth, ax=right, against="communities", like=learned)
    left.images[0].colorbar.remove()  # that of the right holds for both, as do the names of the left
    right.set_yticklabels([])
    left.set_title("learned from comparisons; grey: the 95 % interval crosses zero", loc="left", fontsize=9)
    right.set_title("simulated truth", loc="left", fontsize=9)
    return figure


def show(title: str, runs: list[Run], reference: pl.DataFrame, figure: Path) -> None:
    """Print the table of a world and save its shot curve."""
    predictions = pl.concat([pl.read_parquet(run.folder.path / "predictions.parquet") for run in runs])
    predictions = predictions.filter(pl.col("control").is_null()).unique(
        ["model", "cell", "shots", "draw", "example_id", "control"], maintain_order=True
    )
    reference = reference.select([pl.col(n).cast(t) for n, t in predictions.schema.items() if n in reference.columns])
    rows = summarise(pl.concat([predictions, reference], how="diagonal"), pool_seeds=True, draws=500)
    console.print(f"\n[bold]{title}[/bold]: accuracy in % [95 % interval over users]; NLL in nats", highlight=False)
    console.print(results_table(rows, cells=CELLS), markup=False, highlight=False)
    families = [run.experiment.name for run in runs] + ["Bayes (true prior)", "length only"]
    axes = plots.shot_curve(rows, cell="unseen/testpair", models=families)
    axes.figure.savefig(figure, dpi=150, bbox_inches="tight")  # type: ignore[union-attr]


def main(root: Path) -> None:
    """Run both worlds and the communities, and say what to type next."""
    worlds = (
        ("simulated", "Simulated population", simulated, FAMILY_NAMES, "attributes"),
        ("text", "Text, MiniLM", text, ON_TEXT, "minilm"),
    )
    console.print(f"Fitting {', '.join(FAMILY_NAMES)}, and the attributes of communities")
    jobs = [
        partial(fit_family, name, family, encoder, root) for name, _, _, names, encoder in worlds for family in names
    ]
    *runs, profiled = all_done([*jobs, partial(communities, root)])
    last, example = runs[len(FAMILY_NAMES)], EXAMPLE.format(root)
    for name, title, maker, families, _ in worlds:
        own, runs = runs[: len(families)], runs[len(families) :]
        show(title, own, bayes(*maker()), root / f"demo-{name}.png")
    console.print("\n[bold]Communities of the corpus[/bold], by the attributes of its texts", highlight=False)
    show_communities(profiled, leave_example(root), root)
    # The environment that make made is on nobody's path.
    program = "pluralprefs" if which("pluralprefs") else os.path.relpath(Path(sys.executable).with_name("pluralprefs"))
    console.print(f"""
Shot curves: {root}/demo-simulated.png and {root}/demo-text.png
Communities beside the truth: {root}/demo-communities.png and {root}/demo-profiles.png
Next:
  {program} runs --root {root}      # what was run
  {program} data check {example}
  {program} fit {example} --model bradley_terry    # or your own comparisons
  {program} score {last.folder.path} --input {example} --out scores.csv
""", markup=False, highlight=False)  # fmt: skip


def small(root: Path) -> None:
    """Make what the notebooks read: two families on the simulated population, and the communities."""
    console.print(f"A small registry in {root}")
    jobs = [partial(fit_family, "simulated", family, "attributes", root, rounds=2) for family in FEW]
    *_, profiled = all_done([*jobs, partial(communities, root)])
    show_communities(profiled, leave_example(root), root)


def leave_example(root: Path) -> World:
    """Write the corpus as a file of comparisons to try the commands on, and return it."""
    world, table = text()
    write(table.select("prompt", "first", "second", "target", "user_id", "community_id"), EXAMPLE.format(root))
    return world


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="of run folders")
    parser.add_argument("--small", action="store_true", help="make only what the notebooks read")
    given = parser.parse_args()
    (small if given.small else main)(given.root)
