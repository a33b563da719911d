"""The results table in text: models and cells, "accuracy [low, high]; NLL" in each field."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

ORDER = ("seen/testpair", "seen/newprompt", "unseen/testpair", "unseen/newprompt")


def results_table(rows: pl.DataFrame, models: Sequence[str] | None = None, cells: Sequence[str] | None = None) -> str:
    """Lay metric rows out as an aligned markdown table: accuracy in per cent, 95 % interval over users, then nats.

    Down go the models or the cells, whichever are more, so that a terminal shows it unbroken.

    `models` and `cells` ("unseen/testpair@8" for 8 shots) choose and order; without them all are shown. Raises
    ValueError where a field would hold several seeds: summarise with pool_seeds=True.

    >>> row = {"model": "a|b", "cell": "seen/testpair", "shots": None, "seed": 0, "control": None, "community": None}
    >>> row |= {"ci_low": 0.6, "ci_high": 0.8, "metric": "accuracy", "value": 0.7}
    >>> print(results_table(pl.DataFrame([row])))
    | cell@shots    | a\\|b              |
    |---------------|-------------------|
    | seen/testpair | 70.0 [60.0, 80.0] |
    """
    shown = rows.filter(
        pl.col("control").is_null(), pl.col("community").is_null(), pl.col("metric").is_in(["accuracy", "nll"])
    )
    shown = shown.with_columns(column_name(), pl.col("seed"))
    fields = _fields(shown)
    names = list(dict.fromkeys(shown["model"])) if models is None else list(models)
    lines = [["cell@shots", *names]]
    for cell in column_order(shown) if cells is None else cells:
        lines.append([cell, *(_field(fields, name, cell) for name in names)])
    lines = [list(line) for line in zip(*lines, strict=True)] if len(lines) - 1 < len(names) else lines
    text = [[_escaped(field) for field in line] for line in lines]
    width = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    drawn = ["| " + " | ".join(field.ljust(n) for field, n in zip(line, width, strict=True)) + " |" for line in text]
    return "\n".join([drawn[0], "|" + "|".join("-" * (n + 2) for n in width) + "|", *drawn[1:]])


def column_name() -> pl.Expr:
    """Name a cell with its number of shots, "unseen/testpair@8", as column `column`."""
    return (
        pl.when(pl.col("shots").is_null())
        .then(pl.col("cell"))
        .otherwise(pl.concat_str("cell", pl.lit("@"), pl.col("shots").cast(pl.String)))
        .alias("column")
    )


def _fields(shown: pl.DataFrame) -> dict[tuple[str, str], str]:
    """The text of each (model, column)."""
    fields: dict[tuple[str, str], str] = {}
    for (model, column), part in shown.group_by(["model", "column"]):
        values = {row["metric"]: row for row in part.iter_rows(named=True)}
        if len(values) < len(part):
            raise ValueError(
                f"results_table: {model}, {column} has {len(part)} rows for {len(values)} metrics"
                " (several seeds or runs); use summarise(..., pool_seeds=True) or filter to one seed"
            )
        fields[str(model), str(column)] = "; ".join(
            [
                _percent(values[name]) if name == "accuracy" else f"{values[name]['value']:.3f}"
                for name in sorted(values)
            ]
        )
    return fields


def _percent(row: dict[str, float | None]) -> str:
    value, low, high = (
        None if row[name] is None else 100 * (row[name] or 0.0) for name in ("value", "ci_low", "ci_high")
    )
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _field(fields: dict[tuple[str, str], str], model: str, column: str) -> str:
    """The text of a field; a model that does not look at the shots has the same in all columns of the cell."""
    return fields.get((model, column), fields.get((model, column.partition("@")[0]), ""))


def column_order(shown: pl.DataFrame) -> list[str]:
    """Return the columns to show: seen users first, then by shots; a cell with shots is not shown without."""
    order = {name: position for position, name in enumerate(ORDER)}
    shots_known = pl.col("shots").is_not_null()
    cells = (
        shown.filter(shots_known | ~shots_known.any().over("cell")).select("cell", "shots", "column").unique().rows()
    )
    cells.sort(key=lambda row: (order.get(row[0], len(order)), row[0], -1 if row[1] is None else row[1]))
    return [column for _, _, column in cells]


def _escaped(field: str) -> str:
    return " ".join(field.split()).replace("|", "\\|")
