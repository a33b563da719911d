"""Question: what do debates, and workers of each stance, weigh in an argument, and do their written reasons agree?

Command: PLURALPREFS_DATA=... python experiments/ukp_palette.py [--community debate|worker_stance] [--folder palette]

The predictors are those of `make palette`, learned from rewrites by the lexicon: their scores on arguments that people
wrote are a guess at the attribute, tested here on rewrites of arguments in phrases that no head has met. Each vote came
with a reason in free text; `MENTIONS` finds the words by which a reason speaks of an attribute. A reason is evidence of
what a person weighed, though it names attributes that are easy to name.
Two models without attributes stand beside it: `w . h alone`, which is what is left of the same model where it has no
attributes, and `own weights`, where every debate and every worker departs in all 384 weights of the text.
Result (2026-11-23, debates, seeds 0 to 2, heads with topics held out, 38 minutes on one of 2 CPU cores beside other
jobs; LOG.md has more). The heads order 99.0 % of rewrites of 96 arguments two or more levels apart (assertiveness 93.4
%, all others 96.7 % and more). With attributes minus w . h alone: +5.5 points [+4.0, +6.8] and -0.110 nats on new
debates, +3.8 [+2.4, +5.1], -0.063 on known ones; new users +2.5 [+0.8, +4.6] to +2.8 (0 to 32 shots), -0.036 to
-0.044, on known debates, +4.0 [+0.2, +7.5] to +4.3, -0.10, on new ones: more in every cell. Minus own weights: +5.6
[+4.1, +6.9], -0.102 on new debates, -0.4 [-0.9, +0.2], +0.003 [-0.004, +0.010] on known ones; new users +4.2 [+0.5,
+7.5] to +4.7 on new debates, NEGATIVE on known ones: -0.9 [-1.8, -0.1] to -1.6 [-2.4, -0.6] points, +0.009 to +0.013
nats: 19 numbers say less of a debate than 384. All debates like verbosity (+2.0 [+1.6, +2.5] for the population) and
politeness (+0.9), and dislike what scores high on security (-1.2), which no reason explains. Reasons speak of length or
detail in 17.8 % of votes, the most of 12 attributes, of directness in 6.9 % (preference -0.2 [-0.4, +0.0]: the heads'
directness is not the reasons'), of security in 0.3 %. Over attributes the share of reasons and the size of the
preference hardly agree (Spearman +0.22, n = 12; over 13 debates -0.41 to +0.24).
With the heads of `make palette` itself (2026-11-23, seed 0, 10 minutes): minus w . h alone +4.0 points [+2.6, +5.5],
-0.094 nats on new debates, +3.2 [+1.8, +4.4], -0.052 on known ones; new users at 32 shots +3.3 [+1.4, +5.8] on known
debates, +1.8 [-1.4, +5.3], -0.072 [-0.108, -0.037] on new ones. Minus own weights +4.2 [+2.9, +5.7], -0.088 on new
debates and, NEGATIVE, -0.9 [-1.7, -0.0], +0.015 [+0.006, +0.024] on known ones; new users -0.9 [-1.8, +0.1], +0.021
there and +2.1 [-0.7, +5.2], -0.054 on new ones. Verbosity +1.8 [+1.6, +2.1], politeness +1.3, security -1.7.
Workers' stances (2026-11-23, --community worker_stance, seed 0, the same heads, 10 minutes; 21,624 votes): minus w . h
alone +5.1 points [+2.8, +6.9] and -0.071 nats on new debates, +2.8 [+0.8, +4.5], -0.047 on known ones; new users at 32
shots +1.6 [-1.9, +4.8], -0.031 [-0.062, -0.001] on known debates, +2.1 [-3.5, +7.7], -0.013 on new ones. Minus own
weights +4.7 [+2.5, +6.5], -0.071 and +2.1 [+0.7, +3.5], -0.033; new users +1.3 [-2.2, +4.3], -0.015 and +1.9 [-3.2,
+7.3], -0.001. The three stances weigh alike: verbosity +2.0 [+1.7, +2.4] to +2.2, politeness +0.5 to +0.7, security
-0.9 to -1.0; each stance's preferences lie within the others' intervals. Reasons and preferences over attributes:
Spearman -0.22 (n = 12; +0.33 with other heads: it says little).
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from pluralprefs import encoders
from pluralprefs.attributes import catalog
from pluralprefs.attributes.accuracy import accuracy
from pluralprefs.attributes.counterfactuals import rewrites, sample_responses
from pluralprefs.attributes.fitting import embedder
from pluralprefs.attributes.lexicon_teacher import LexiconTeacher
from pluralprefs.attributes.source import predicted
from pluralprefs.contrasts import paired_difference
from pluralprefs.data.sources import ukpconvarg1
from pluralprefs.experiment import FAMILIES, Experiment
from pluralprefs.launch import run, table_in_memory
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.profiles import over_seeds, profile_table
from pluralprefs.users import Pooled

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")
LEAST = 20  # votes of a worker, as in the fixed protocol
# Words of a reason, and the attribute they speak of.
MENTIONS = {
    "verbosity": r"\b(longer|length|lengthy|detail\w*|elaborat\w*|thorough|more (info\w*|reasons?|points?|words)"
    r"|in.?depth|short|shorter|brief|one.?liner|explain\w*|explanation)\b",
    "politeness": r"\b(rude|polite\w*|respect\w*|disrespect\w*|insult\w*|offensive|name.?calling|swear\w*|civil)\b",
    "formality": r"\b(grammar\w*|spelling|slang|formal|informal|professional|(well|poorly).written|capital\w*)\b",
    "sarcasm": r"\b(sarcas\w*|mock\w*|ironic\w*|irony|snark\w*)\b",
    "humor": r"\b(humou?r\w*|funny|joke\w*|joking|silly|laugh\w*)\b",
    "directness": r"\b(direct\w*|to the point|straight.?forward|concise|clear\w*|rambl\w*|off.?topic|vague)\b",
    "assertiveness": r"\b(confiden\w*|assert\w*|forceful\w*|aggress\w*|strong\w*|certain\w*)\b",
    "empathy": r"\b(empath\w*|compassion\w*|emotion\w*|caring|feelings?)\b",
    "supportiveness": r"\b(support\w* (others|people)|hostil\w*|hate\w*|hateful|attack\w*|kind)\b",
    "security": r"\b(safe|safety|secur\w*|danger\w*|protect\w*)\b",
    "tradition": r"\b(tradition\w*|religio\w*|bible|god)\b",
    "universalism": r"\b(equal\w*|rights|environment\w*|justice|fair\w*)\b",
}
console = Console(width=160, soft_wrap=True)


def table(community: str) -> pl.DataFrame:
    """Votes of workers with at least `LEAST` decided ones, without ties; null communities stay out."""
    rows = ukpconvarg1.load(DATA, community=community, ties=False, min_votes=LEAST)  # type: ignore[arg-type]
    return rows.filter(pl.col("community_id").is_not_null()).drop("reason", "worker_stance", "submitted", strict=False)


def predictors_on_arguments(folder: Path) -> None:
    """Accuracy of the heads on rewrites of arguments, in held-out phrases."""
    source = predicted(folder)
    arguments = sample_responses(ukpconvarg1.load(DATA, ties=False), per_community=6)
    chosen = {name: catalog.CATALOG[name] for name in source.names}
    levels = rewrites(arguments, chosen, LexiconTeacher("heldout"))
    sides = levels.select("response_id", "attribute", "level", "text")
    pairs = sides.join(sides, on=["response_id", "attribute"], suffix="_high").filter(
        pl.col("level") < pl.col("level_high")
    )
    pairs = pairs.select(
        "response_id", "attribute", low="level", high="level_high", low_text="text", high_text="text_high",
        gap=pl.col("level_high") - pl.col("level"), split=pl.lit("heldout_communities"),
    )  # fmt: skip
    found = accuracy(source.predictors, pairs, embedder(source.predictors.encoder))
    far = found.filter(pl.col("gap") == -2)
    shown = Table(title=f"Heads on {arguments.height} arguments, rewritten; pairs two or more levels apart",
                  title_justify="left")  # fmt: skip
    for head in ("attribute", "accuracy", "95 %", "pairs"):
        shown.add_column(head)
    for row in far.iter_rows(named=True):
        interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        shown.add_row(row["attribute"] or "all", f"{row['accuracy']:.3f}", interval, str(row["count"]))
    console.print(shown)


def reasons(community: str, weights: pl.DataFrame) -> None:
    """Put the share of reasons that speak of an attribute beside the size of its preference, over communities."""
    votes = ukpconvarg1.load(DATA, community=community, ties=False, min_votes=LEAST)  # type: ignore[arg-type]
    votes = votes.filter(pl.col("community_id").is_not_null() & pl.col("reason").is_not_null())
    said = {name: pl.col("reason").str.to_lowercase().str.contains(words) for name, words in MENTIONS.items()}
    share = votes.group_by("community_id").agg(**{name: found.mean() for name, found in said.items()}, votes=pl.len())
    whole = votes.select(**{name: found.mean() for name, found in said.items()}).row(0, named=True)
    liked = {(r["community"], r["attribute"]): r for r in weights.filter(kind="preference").iter_rows(named=True)}
    shown = Table(title=f"Reasons of {votes.height} votes: share that speaks of an attribute, and its preference",
                  title_justify="left")  # fmt: skip
    for head in (
        "attribute",
        "share of reasons",
        "preference, all [95 %]",
        "Spearman over communities: share, |preference|",
    ):
        shown.add_column(head)
    for name in sorted(whole, key=lambda one: -whole[one]):
        row = liked[("", name)]
        mentioned = {r["community_id"]: r[name] for r in share.iter_rows(named=True)}
        groups = sorted(group for group in mentioned if (group, name) in liked)
        rank = spearman([mentioned[g] for g in groups], [abs(liked[g, name]["mean"]) for g in groups])
        shown.add_row(name, f"{whole[name]:.1%}", f"{row['mean']:+.2f} [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]",
                      f"{rank:+.2f} (n = {len(groups)})")  # fmt: skip
    console.print(shown)
    sizes = [abs(liked["", name]["mean"]) for name in whole]
    both = spearman(list(whole.values()), sizes)
    console.print(f"Over attributes: Spearman of share and |preference| {both:+.2f} (n = {len(whole)})")


def difference(ours: pl.DataFrame, theirs: pl.DataFrame, without: str) -> None:
    """Print accuracy and NLL with attributes minus without, paired, with intervals over users, in every cell."""
    sides = [
        part.filter(pl.col("model") == name, pl.col("control").is_null())
        for part, name in ((ours, "attribute_attention"), (theirs, without))
    ]
    for cell, shots in sides[0].select("cell", "shots").unique().sort("cell", "shots").rows():
        one, other = (side.filter(pl.col("cell") == cell, pl.col("shots").eq_missing(shots)) for side in sides)
        for metric in ("accuracy", "nll"):
            d = paired_difference(one, other, metric)
            found = f"{metric} {d.value:+.4f} [{d.ci_low}, {d.ci_high}]"
            console.print(f"with attributes minus {without}, {cell}@{shots} {found}", highlight=False, markup=False)


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation; NaN where nothing varies."""
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1]) if len(set(one)) > 1 else float("nan")


def main(folder: Path, root: Path, community: str, seeds: tuple[int, ...]) -> None:
    """Fit, print profiles with intervals, accuracy with and without attributes, and the reasons."""
    predictors_on_arguments(folder)
    shared: dict[str, Any] = {
        "data": table_in_memory, "encoder": partial(encoders.load, "minilm"),
        "data_name": f"ukpconvarg1 by {community}",
    }  # fmt: skip
    attention = {**FAMILIES["attribute_attention"], "attributes": partial(predicted, str(folder))}
    votes = table(community)
    found = run(Experiment(name="attribute_attention", seeds=seeds, **{**attention, **shared}), root=root, table=votes)
    weights = over_seeds(found.folder.table("attribute_weights"))
    console.print(profile_table(weights), markup=False, highlight=False)
    metrics = found.folder.table("metrics").filter(pl.col("metric").is_in(["accuracy", "nll", "attribute_gain"]))
    own = metrics.filter(pl.col("model") == "attribute_attention", pl.col("community").is_null())
    for row in own.sort("cell", "shots").iter_rows(named=True):
        console.print(f"{row['cell']}@{row['shots']} {row['control'] or ''} {row['metric']} {row['value']:.4f} "
                      f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]", highlight=False)  # fmt: skip
    for name, users in (("w . h alone", Pooled(levels=(), cross_fit=None)), ("own weights", attention["users"])):
        without = {"model": partial(BradleyTerry.init, item_effects=False), "users": users}
        plain = run(Experiment(name=name, controls=False, seeds=seeds[:1], **{**without, **shared}), root=root,
                    table=votes)  # fmt: skip
        difference(found.folder.table("predictions"), plain.folder.table("predictions"), name)
    reasons(community, weights)
    spread = np.abs(weights.filter(kind="preference")["mean"].to_numpy()).mean()
    console.print(f"Mean |preference| {spread:.2f}. Next: pluralprefs profile {found.folder.path}", markup=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("palette"), help="of the predictors (`make palette`)")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="of run folders")
    parser.add_argument("--community", default="debate", choices=("debate", "worker_stance"))
    parser.add_argument("--seeds", default="0", help="comma-separated")
    given = parser.parse_args()
    main(given.folder, given.root, given.community, tuple(int(seed) for seed in given.seeds.split(",")))
