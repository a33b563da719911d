"""Question: does the whole path work, from comparisons to a recorded, adaptable model, and how near does it come to the
best that any method could do?

Command: make demo                       (or: python experiments/demo.py [--root runs])

Two populations whose truth is known. The first is simulated: 60 users in 4 communities, hierarchical weights over eight
features. The second is text: a corpus written for this project, in which six communities prefer attributes to different
degrees, encoded with MiniLM. Both end in one table: families by cells, 95 % intervals over users, the baselines, and
the posterior predictive under the true prior given the same shots ("Bayes"), which no method can beat except by luck.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
from rich.console import Console

from pluralprefs import encoders
from pluralprefs.data import splits
from pluralprefs.data.comparisons import write
from pluralprefs.data.lexicon import corpus, corpus_world
from pluralprefs.data.simulate import World, attribute_table, bayes_predictions, hierarchical, posterior_predictive
from pluralprefs.experiment import FAMILIES, Experiment
from pluralprefs.launch import run
from pluralprefs.metrics import summarise
from pluralprefs.plots import shot_curve
from pluralprefs.results import results_table
from pluralprefs.run import Run
from pluralprefs.users import Pooled

FAMILY_NAMES = ("individual", "bradley_terry", "low_rank", "ideal_point")
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


def world_runs(name: str, families: tuple[str, ...], encoder: str, root: Path) -> list[Run]:
    """Fit the families to one world, a run each."""
    data = SIMULATED if name == "simulated" else partial(corpus, seed=0)
    runs = []
    for family in families:
        begin = time.time()
        parts = {**FAMILIES[family], "features": {}}
        pooled = parts.get("users", Pooled())
        if family == "bradley_terry":
            pooled = Pooled(levels=("community", "user"))
        parts["users"] = replace(pooled, rounds=3, folds=3)  # fewer than the defaults: minutes count here
        experiment = Experiment(
            data=data,
            encoder=partial(encoders.load, encoder),
            shots=SHOTS,
            draws=2,
            controls=False,
            name=family,
            data_name=name,
            **parts,
        )
        runs.append(run(experiment, root=root, progress=False))
        console.print(f"  {family:20s} {time.time() - begin:5.0f} s   {runs[-1].folder.path}")
    return runs


def show(title: str, runs: list[Run], reference: pl.DataFrame, figure: Path) -> None:
    """Print the table of a world and save its shot curve."""
    import matplotlib.pyplot as plt

    predictions = pl.concat([pl.read_parquet(run.folder.path / "predictions.parquet") for run in runs])
    predictions = predictions.filter(pl.col("control").is_null()).unique(
        ["model", "cell", "shots", "draw", "example_id", "control"], maintain_order=True
    )
    reference = reference.select([pl.col(n).cast(t) for n, t in predictions.schema.items() if n in reference.columns])
    rows = summarise(pl.concat([predictions, reference], how="diagonal"), pool_seeds=True, draws=500)
    console.print(f"\n[bold]{title}[/bold]: accuracy in % [95 % interval over users]; NLL in nats", highlight=False)
    console.print(results_table(rows, cells=CELLS), markup=False, highlight=False)
    families = [run.experiment.name for run in runs] + ["Bayes (true prior)", "length only"]
    axes = shot_curve(rows, cell="unseen/testpair", models=families)
    figure.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(figure, dpi=150, bbox_inches="tight")  # type: ignore[union-attr]
    plt.close("all")


def main(root: Path) -> None:
    """Run both worlds and say what to type next."""
    last: Run | None = None
    for name, title, maker, families, encoder in (
        ("simulated", "Simulated population", simulated, FAMILY_NAMES, "attributes"),
        ("text", "Text, MiniLM", text, FAMILY_NAMES[:3], "minilm"),
    ):  # fmt: skip
        console.print(f"\n{title}: fitting {', '.join(families)}")
        world, table = maker()
        runs = world_runs(name, families, encoder, root)
        show(title, runs, bayes(world, table), root / f"demo-{name}.png")
        last = runs[1]
        write(table.select("prompt", "first", "second", "target", "user_id", "community_id"), EXAMPLE.format(root))
    assert last is not None
    example = EXAMPLE.format(root)
    console.print(f"""
Shot curves: {root}/demo-simulated.png and {root}/demo-text.png
Next:
  pluralprefs runs --root {root}                          what was run
  pluralprefs data check {example}
  pluralprefs fit {example} --model bradley_terry    or your own comparisons
  pluralprefs score {last.folder.path} --input {example} --out scores.csv
""", markup=False, highlight=False)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--root") + 1]) if "--root" in sys.argv else Path("runs"))
