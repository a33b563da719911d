"""Two runs on the judgements that both predicted: the difference of each metric in each cell, with its interval."""

from __future__ import annotations

from typing import Any

import polars as pl

from pluralprefs.contrasts import KEY, paired_difference
from pluralprefs.metrics import check_predictions, evaluate_arrays
from pluralprefs.registry.files import RegistryError
from pluralprefs.registry.folder import RunFolder
from pluralprefs.results import ORDER

COMPARED: dict[str, Any] = {
    "cell": pl.String,
    "shots": pl.Int64,
    "metric": pl.String,
    "a": pl.Float64,
    "b": pl.Float64,
    "difference": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "p": pl.Float64,
    "judgements": pl.Int64,
    "users": pl.Int64,
    "only_a": pl.Int64,
    "only_b": pl.Int64,
}
ROWS = pl.struct(*KEY)


def compare_runs(a: RunFolder, b: RunFolder, draws: int = 2000, seed: int = 0) -> pl.DataFrame:
    """Return metric(a) - metric(b) in every cell and at every number of shots that both runs were tested on.

    Metrics are accuracy and NLL (nats) of the runs' own models, without controls, on shared rows: those of the same
    example_id, cell, shots and draw. `only_a` and `only_b` count judgements of the cell that the other run lacks.
    Intervals (95 %) and p-values are over users (`contrasts.paired_difference`). Raises RegistryError where nothing is
    shared, ValueError where the runs disagree about a target.
    """
    side_a, side_b = _own(a), _own(b)
    order = {name: place for place, name in enumerate(ORDER)}
    cells = side_a.select("cell", "shots").unique().join(
        side_b.select("cell", "shots").unique(), on=["cell", "shots"], nulls_equal=True
    )  # fmt: skip
    found = []
    for cell, shots in sorted(cells.rows(), key=lambda row: (order.get(row[0], len(order)), row[0], row[1] or 0)):
        of_cell = pl.col("cell").eq_missing(pl.lit(cell)) & pl.col("shots").eq_missing(pl.lit(shots, pl.Int64))
        found += _cell(side_a.filter(of_cell), side_b.filter(of_cell), draws, seed)
    if not found:
        raise RegistryError(f"{a.path} and {b.path}: no judgement is predicted by both; compare runs on the same data")
    return pl.DataFrame(found, schema=COMPARED)


def _cell(a: pl.DataFrame, b: pl.DataFrame, draws: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one cell; none where it shares nothing."""
    shared_a = a.join(b, on=KEY, how="semi", nulls_equal=True)
    shared_b = b.join(a, on=KEY, how="semi", nulls_equal=True)
    if shared_a.is_empty():
        return []
    only = {"only_a": _judgements(a) - _judgements(shared_a), "only_b": _judgements(b) - _judgements(shared_b)}
    values_a, values_b = _values(shared_a), _values(shared_b)
    rows = []
    for metric in ("accuracy", "nll"):
        found = paired_difference(shared_a, shared_b, metric, draws, seed)
        decided = shared_a if metric == "nll" else shared_a.filter(~pl.col("tie"), pl.col("target") != 0.5)
        rows.append(
            {"cell": a["cell"][0], "shots": a["shots"][0], "metric": metric, "a": values_a[metric],
             "b": values_b[metric], "difference": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high,
             "p": found.p, "judgements": _judgements(decided), "users": found.users, **only}
        )  # fmt: skip
    return rows


def _own(run: RunFolder) -> pl.DataFrame:
    """The predictions of a run's own model, without controls and padding."""
    model = run.read().get("model")
    rows = check_predictions(run.table("predictions"))
    own = rows.filter(pl.col("control").is_null(), pl.col("model") == model)
    if own.is_empty():
        raise RegistryError(
            f"{run.path}: predictions.parquet holds none of model {model!r};"
            f" it has {', '.join(rows['model'].unique().sort()) or 'none'}"
        )
    return own


def _values(rows: pl.DataFrame) -> dict[str, float]:
    """Accuracy and NLL; every seed has the same rows, so that pooling them is averaging them."""
    return evaluate_arrays(*(rows[name].to_numpy() for name in ("log_odds", "target", "tie", "weight")))


def _judgements(rows: pl.DataFrame) -> int:
    return rows["example_id"].n_unique()


def comparison_table(compared: pl.DataFrame) -> str:
    """Lay a comparison out as aligned text: accuracy in per cent and points, NLL in nats; * where zero is excluded."""
    lines = [["cell@shots", "metric", "A", "B", "A - B [95 %]", "p", "judgements", "users"]]
    for row in compared.iter_rows(named=True):
        factor, digits = (100, 1) if row["metric"] == "accuracy" else (1, 3)
        ends = [row["difference"], row["ci_low"], row["ci_high"]]
        value, low, high = ("-" if end is None else f"{factor * end:+.{digits}f}" for end in ends)
        star = "*" if None not in ends and row["ci_low"] * row["ci_high"] > 0 else ""
        lines.append(
            [row["cell"] + ("" if row["shots"] is None else f"@{row['shots']}"),
             "accuracy, %" if row["metric"] == "accuracy" else "NLL, nats",
             *(f"{factor * row[side]:.{digits}f}" for side in "ab"),
             f"{value}{star} [{low}, {high}]", "-" if row["p"] is None else f"{row['p']:.3f}",
             str(row["judgements"]), str(row["users"])]
        )  # fmt: skip
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(field.ljust(n) for field, n in zip(line, width, strict=True)).rstrip() for line in lines)
