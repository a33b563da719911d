"""One page about some runs: what they are, how well they predict, whom they serve, what communities like.

The page is one file: tables that sort, pictures as SVG, styles and script inside, and a policy by which it loads
nothing else. What comes from the data is escaped by the template; pictures are images, in which no script can run.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from pluralprefs import plots
from pluralprefs.registry import RunFolder, read_labels
from pluralprefs.registry.environment import package_versions
from pluralprefs.registry.files import RegistryError, write_bytes
from pluralprefs.results import ORDER, column_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("report.html.jinja")
BASELINES = ("majority of others (oracle)", "length only", "artefact probe")
SHOWN = (  # metric, factor, digits, column
    ("accuracy", 100, 1, "accuracy, %"),
    ("worst_decile_accuracy", 100, 1, "worst tenth of users, %"),
    ("nll", 1, 3, "NLL, nats"),
    ("ece", 100, 1, "ECE, %"),
)
MOST_RUNS = 7  # in one picture


class Cell(NamedTuple):
    """A field of a table: its text, and the number that it is sorted by."""

    text: str
    value: float | None = None


class Table(NamedTuple):
    """A table of the page."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


class Figure(NamedTuple):
    """A picture as base64 of SVG, and what it shows in words."""

    svg: str
    text: str


@dataclass
class Section:
    """A heading and what stands below it."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def draw(self, plot: Callable[..., Axes], *arguments: Any, text: str, **options: Any) -> None:
        """Add a picture as SVG; a note with the reason where the table does not have what it needs."""
        import matplotlib as mpl

        with mpl.rc_context({"svg.hashsalt": text, "svg.fonttype": "path"}):
            try:
                figure: Any = plot(*arguments, **options).figure
            except ValueError as error:
                self.notes.append(f"Not drawn: {text} ({error}).")
                return
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        self.figures.append(Figure(base64.b64encode(buffer.getvalue()).decode(), text))


def write_report(folders: Sequence[RunFolder], path: Path | str, title: str = "Runs") -> None:
    """Write the page about these runs, whole or not at all. Raises RegistryError where there are none."""
    if not folders:
        raise RegistryError("report: name at least one run")
    names = labels(folders)
    sections = [_overview(folders, names), _results(folders, names)]
    sections += [_profile(folder, name) for folder, name in zip(folders, names, strict=True)]
    page = _render(title, [section for section in sections if section.tables or section.figures or section.notes])
    write_bytes(Path(path), page.encode())


def labels(folders: Sequence[RunFolder]) -> list[str]:
    """Name each run by its model, and by the end of its folder's name too where models are not enough."""
    models = [str(folder.read().get("model")) for folder in folders]
    return [
        f"{model} {folder.name[-4:]}" if models.count(model) > 1 else model
        for model, folder in zip(models, folders, strict=True)
    ]


# Sections -------------------------------------------------------------------------------------------------------------


def _overview(folders: Sequence[RunFolder], names: Sequence[str]) -> Section:
    columns = ["label", "run", "status", "data", "seeds", "accuracy, %", "NLL, nats", "wall, s", "git", "tags", "note"]
    rows = []
    for folder, name in zip(folders, names, strict=True):
        content, said = folder.read(), read_labels(folder.path)
        summary, git = content.get("summary") or {}, content.get("git") or {}
        error = f": {content['error']}" if content.get("error") else ""
        rows.append(
            [
                Cell(name), Cell(folder.name), Cell(f"{folder.status}{error}"), Cell(str(content.get("data") or "")),
                Cell(", ".join(map(str, content.get("seeds") or ()))), number(summary.get("accuracy"), 100, 1),
                number(summary.get("nll"), 1, 3), number(content.get("wall_seconds"), 1, 0),
                Cell(f"{str(git.get('commit') or '')[:10]}{' with changes' if git.get('dirty') else ''}"),
                Cell(", ".join(said["tags"])), Cell(said["note"] or ""),
            ]
        )  # fmt: skip
    return Section("Runs", tables=[Table("Runs, as they were named", columns, rows)])


def data_labels(folders: Sequence[RunFolder]) -> list[str]:
    """Name the data of each run, by their fingerprint too where one name stands for several; "" where all are one."""
    contents = [folder.read() for folder in folders]
    fingerprints = [str(content.get("data_fingerprint")) for content in contents]
    names: dict[str, str] = {}
    for content, fingerprint in zip(contents, fingerprints, strict=True):
        names.setdefault(fingerprint, str(content.get("data")))
    if len(names) == 1:
        return [""] * len(contents)
    often = {name for name in names.values() if list(names.values()).count(name) > 1}
    labels = {key: f"{name} {key[:8]}" if name in often else name for key, name in names.items()}
    return [labels[fingerprint] for fingerprint in fingerprints]


def _results(folders: Sequence[RunFolder], names: Sequence[str]) -> Section:
    """The metrics of all runs under their labels, apart for each data set: no number of one compares with another's."""
    section, of_data = Section("Results"), data_labels(folders)
    if len(set(of_data)) > 1:
        section.notes.append(f"The runs are on different data ({', '.join(dict.fromkeys(of_data))}), each in its own "
                             "table and pictures: numbers of one do not compare with numbers of another.")  # fmt: skip
    if len(names) > MOST_RUNS:
        section.notes.append(f"Pictures show the first {MOST_RUNS} runs.")
    shown = list(names[:MOST_RUNS])
    for data in dict.fromkeys(of_data):
        runs = [run for run, label in zip(zip(folders, names, strict=True), of_data, strict=True) if label == data]
        rows = _metric_rows(section, runs)
        if rows.height:
            section.tables.append(_metric_table(rows, data))
            _draw_metrics(section, rows, [name for name in shown if name in set(rows["model"])], data)
    for folder, name in zip(folders[:MOST_RUNS], shown, strict=True):
        _draw_own(section, folder, name)
    return section


def _metric_rows(section: Section, runs: Sequence[tuple[RunFolder, str]]) -> pl.DataFrame:
    """The metrics of runs on the same data; baselines come from the first run that has them."""
    parts, seen = [pl.DataFrame()], set()
    for folder, name in runs:
        if "metrics" not in folder.tables():
            section.notes.append(f"{name}: has no metrics ({folder.status}).")
            continue
        rows, own = folder.table("metrics"), folder.read().get("model")
        if not rows.height:
            section.notes.append(f"{name}: no comparison was held out, so there are no metrics.")
            continue
        others = [m for m in rows["model"].unique(maintain_order=True) if m != own and m not in seen]
        seen |= set(others)
        parts.append(rows.filter(pl.col("model") == own).with_columns(model=pl.lit(name)))
        parts.append(rows.filter(pl.col("model").is_in(others)))
    return pl.concat(parts, how="diagonal_relaxed")


def _metric_table(rows: pl.DataFrame, data: str) -> Table:
    plain = rows.filter(pl.col("control").is_null(), pl.col("community").is_null()).with_columns(column_name())
    order = {name: place for place, name in enumerate(ORDER)}
    keys = plain.select("model", "cell", "shots", "column").unique(maintain_order=True).rows()
    keys.sort(key=lambda key: (order.get(key[1], len(order)), key[1], -1 if key[2] is None else key[2]))
    table = []
    for model, _, _, column in keys:
        own = plain.filter(pl.col("model") == model, pl.col("column") == column)
        values = {row["metric"]: row for row in own.iter_rows(named=True)}
        size = values.get("nll") or {}
        table.append(
            [Cell(model), Cell(column), *(_estimate(values.get(name), *how) for name, *how, _ in SHOWN),
             number(size.get("users"), 1, 0), number(size.get("count"), 1, 0)]
        )  # fmt: skip
    columns = ["model", "cell@shots", *(name for *_, name in SHOWN), "users", "judgements"]
    return Table(f"Every model in every cell{_on(data)}", columns, table)


def _draw_metrics(section: Section, rows: pl.DataFrame, models: list[str], data: str) -> None:
    """The pictures that compare models: shot curves, the worst tenth, the user's own state."""
    found = rows.filter(pl.col("metric") == "accuracy", pl.col("shots").is_not_null(), pl.col("model").is_in(models))
    both = [*models, *(name for name in BASELINES if name in set(rows["model"]))]
    for cell in sorted(found["cell"].unique()):
        text = f"Accuracy in {cell} by the number of comparisons that a new user has given{_on(data)}"
        section.draw(plots.shot_curve, rows, cell=cell, models=both, text=text)
        last = found.filter(pl.col("cell") == cell)["shots"].max()
        text = f"Accuracy for the worst tenth of users against all, in {cell} at {last} shots{_on(data)}"
        section.draw(plots.worst_group_frontier, rows, f"{cell}@{last}", models=models, text=text)
    if "wrong_user_gain" in set(rows["metric"]):
        text = f"Accuracy gained by the user's own state over a stranger's{_on(data)}"
        section.draw(plots.wrong_user_gap, rows, models=models, text=text)


def _draw_own(section: Section, folder: RunFolder, name: str) -> None:
    """Calibration and training of one run."""
    tables = folder.tables()
    if "predictions" in tables:
        rows = folder.table("predictions").filter(
            pl.col("model") == folder.read().get("model"), pl.col("control").is_null()
        )
        cells = rows["cell"].unique().sort().to_list()
        cell = next((cell for cell in (*ORDER, *cells) if cell in cells), None)
        part = rows.filter(
            pl.col("cell").eq_missing(pl.lit(cell)), pl.col("seed").eq_missing(pl.lit(rows["seed"].min()))
        )
        most = part.filter(pl.col("shots").eq_missing(pl.lit(part["shots"].max())))
        section.draw(plots.calibration, most, draws=200, text=f"{name}: is a probability as good as it says, in {cell}")
    if "training" in tables:
        section.draw(plots.training_curves, folder.table("training"), text=f"{name}: loss by epoch")


def _profile(folder: RunFolder, name: str) -> Section:
    """What communities like, where the run has a profile."""
    section = Section(f"Profiles: {name}")
    if "attribute_weights" not in folder.tables():
        return section
    from pluralprefs.profiles import over_seeds

    weights = over_seeds(folder.table("attribute_weights"))
    for kind in weights["kind"].unique(maintain_order=True):
        rows = weights.filter(pl.col("kind") == kind)
        communities = [community for community in rows["community"].unique(maintain_order=True) if community]
        if communities:
            section.draw(plots.heat_map, weights, kind, text=f"{kind}: each community minus the population")
        if len(communities) <= 6:
            section.draw(plots.profile_dots, weights, kind, text=f"{kind}, with intervals")
    columns = ["community", "attribute", "kind", "mean", "low", "high", "n"]
    cells = [
        [Cell(row["community"] or "population"), Cell(row["attribute"]), Cell(row["kind"]),
         *(number(row[end], 1, 3) for end in ("mean", "ci_low", "ci_high")), number(row["n"], 1, 0)]
        for row in weights.iter_rows(named=True)
    ]  # fmt: skip
    section.tables.append(Table(f"Attribute weights of {name}, averaged over seeds", columns, cells))
    return section


# Parts ----------------------------------------------------------------------------------------------------------------


def number(value: float | None, factor: float, digits: int) -> Cell:
    """Return a number as a field; an empty one where there is none.

    >>> number(0.7512, 100, 1), number(None, 1, 0)
    (Cell(text='75.1', value=75.12), Cell(text='', value=None))
    """
    if value is None or not math.isfinite(value):
        return Cell("")
    return Cell(f"{factor * value:,.{digits}f}", factor * value)


def _on(data: str) -> str:
    return f", on {data}" if data else ""


def _estimate(row: dict[str, Any] | None, factor: float, digits: int) -> Cell:
    """A value with its interval, sorted by the value."""
    if row is None:
        return Cell("")
    value, low, high = (number(row[name], factor, digits) for name in ("value", "ci_low", "ci_high"))
    return Cell(f"{value.text} [{low.text}, {high.text}]" if low.text else value.text, value.value)


def _render(title: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text("utf8"))
    version = package_versions().get("pluralprefs", "")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return template.render(title=title, sections=sections, written=written, version=version)
