"""`pluralprefs attributes rewrite | verify | pairs | train | embed`: from texts to attribute scores of responses.

Each command reads what the one before it left in one folder and adds its own plain tables; the teacher's answers are
kept there as they come, so that a command that was stopped is run again and goes on. In the folder:

    attributes.json, responses.parquet, rewrites.parquet      rewrite (and answers.jsonl, the cache)
    judgements.parquet, verified.parquet, report.parquet      verify
    pairs.parquet                                             pairs
    predictors.safetensors, accuracy.parquet                  train
    store/                                                    embed
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pluralprefs.teacher_cli import Asking, Concurrency, Debug, DryRun, MaxCost, Model, Prices, Rate, TeacherName
from pluralprefs.terminal import plainly, say, show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl

    from pluralprefs.attributes.catalog import Attribute
    from pluralprefs.attributes.teacher import Teacher

attributes_app = typer.Typer(
    no_args_is_help=True, help="Latent attributes of texts: counterfactuals, their verification, predictors, scores."
)

Folder = Annotated[Path, typer.Option(help="Folder of all tables.")]
Named = Annotated[str | None, typer.Option("--attributes", help="Some of the attributes: politeness,security")]


@attributes_app.command(
    epilog="Examples: pluralprefs attributes rewrite my.jsonl --attributes politeness,verbosity · "
    "pluralprefs attributes rewrite my.jsonl --teacher http://localhost:8000/v1 --model my-model --price 0.5,1.5 "
    "--max-cost 20 --dry-run"
)
@plainly
def rewrite(
    data: Annotated[Path | None, typer.Argument(help="Comparisons; without a file, the lexicon's answers.")] = None,
    folder: Folder = Path("palette"),
    attributes: Named = None,
    catalog: Annotated[Path | None, typer.Option(help="Your own attributes (.toml, .json) for the nineteen.")] = None,
    per_community: Annotated[int, typer.Option(help="Responses of a community.")] = 100,
    communities_out: Annotated[
        float, typer.Option(help="Share of the communities that predictors are only tested on.", min=0, max=0.9)
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the sample and of the lexicon.")] = 0,
    teacher: TeacherName = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Rewrite responses at five levels of each attribute."""
    from pluralprefs.attributes import catalog as known
    from pluralprefs.attributes.counterfactuals import rewrite_tasks, rewrites, teachers
    from pluralprefs.attributes.folds import with_folds

    whole = known.load(catalog) if catalog else known.CATALOG
    chosen = known.choose(attributes.split(","), whole) if attributes else whole
    responses = with_folds(_responses(data, per_community, seed), communities_out=communities_out)
    asking = Asking(teacher, model, price, max_cost, concurrency, rate)
    with asking.open(lambda: _lexicon("fit", seed)) as first:
        others = _phrases_apart(seed) if teacher == "lexicon" else None
        if dry_run:
            tasks = rewrite_tasks(responses, chosen)
            each = teachers(responses, len(chosen) * known.LEVELS, first, others)
            for name, one in {one.name: one for one in each}.items():
                mine = (task for task, other in zip(tasks, each, strict=True) if other.name == name)
                asking.tell_estimate(one, mine, folder)
            return
        table = rewrites(responses, chosen, first, others=others, tell=say, **asking.options(folder))
    _write(folder, responses=responses, rewrites=table)
    _write_attributes(folder, chosen)
    show(table.group_by("attribute").len("rewrites").sort("attribute"), "Rewrites")
    say(f"{table.height} rewrites of {responses.height} responses written to {folder}")


@attributes_app.command(
    epilog="Example: pluralprefs attributes verify --teacher http://localhost:8000/v1 --model my-judge --threshold 0.8"
)
@plainly
def verify(
    folder: Folder = Path("palette"),
    threshold: Annotated[float, typer.Option(help="Least share of judgements for the order, 0 to 1.")] = 0.75,
    preserved: Annotated[float, typer.Option(help="Least score of kept meaning, 0 to 1.")] = 0.1,
    teacher: TeacherName = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Judge every pair of levels eight times and keep the pairs that hold."""
    from pluralprefs.attributes import catalog as known
    from pluralprefs.attributes.verification import judge, judging_tasks, report, verified

    responses, table = _read(folder, "responses", "rewrite"), _read(folder, "rewrites", "rewrite")
    chosen = known.load(folder / "attributes.json")
    asking = Asking(teacher, model, price, max_cost, concurrency, rate)
    with asking.open(lambda: _lexicon("all")) as one:
        if dry_run:
            asking.tell_estimate(one, judging_tasks(responses, table, chosen), folder)
            return
        judged = judge(responses, table, chosen, one, tell=say, **asking.options(folder))
    pairs = verified(judged.rewrites, judged.judgements, threshold, preserved)
    rows = report(pairs, judged.judgements)
    _write(folder, judgements=judged.judgements, verified=pairs, report=rows)
    show(rows.filter(rows["gap"].is_null()).drop("gap", "judgements", "readable"), "Verification, over all gaps")
    say(f"{pairs['kept'].sum()} of {pairs.height} pairs kept; gap by gap in {folder / 'report.parquet'}")


@attributes_app.command(epilog="Example: pluralprefs attributes pairs --levels 1,3")
@plainly
def pairs(
    folder: Folder = Path("palette"),
    levels: Annotated[str, typer.Option(help='Pair of levels that training leaves out, or "none".')] = "1,3",
    debug: Debug = False,
) -> None:
    """Put the kept pairs into training and held-out splits."""
    import polars as pl

    from pluralprefs.attributes.pairs import ordered_pairs

    apart = _levels(levels)
    table = ordered_pairs(_read(folder, "verified", "verify"), _read(folder, "responses", "rewrite"), apart)
    _write(folder, pairs=table)
    show(table.group_by("split").agg(pl.len().alias("pairs"), responses=pl.col("response_id").n_unique()), "Pairs")
    say(f"{table.height} pairs written to {folder / 'pairs.parquet'}")


@attributes_app.command(epilog="Example: pluralprefs attributes train --encoder minilm --hidden 64")
@plainly
def train(
    folder: Folder = Path("palette"),
    attributes: Named = None,
    encoder: Annotated[str, typer.Option(help='"minilm", a folder or a Hugging Face id.')] = "minilm",
    hidden: Annotated[int, typer.Option(help="Units of a hidden layer; 0 for linear heads.")] = 0,
    width: Annotated[int, typer.Option(help="Size of an attribute's embedding.")] = 8,
    neutral: Annotated[
        bool, typer.Option("--neutral", help="The responses themselves say nothing on any attribute (the lexicon's).")
    ] = False,
    adapters: Annotated[
        int, typer.Option(help="Rank of an adapter of each attribute, trained first; 0 for none. Wants an accelerator.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Of training adapters, 8 pairs of every attribute each.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the start of hidden layers, and of adapters.")] = 0,
    debug: Debug = False,
) -> None:
    """Fit a head per attribute on the encoder's features, and test it on what was held out.

    With adapters the features are their rewards of the whole text, one an attribute; without, means over its sentences.
    """
    import polars as pl

    from pluralprefs.attributes.accuracy import accuracy
    from pluralprefs.attributes.fitting import WIDTHS, embedder, fit_predictors
    from pluralprefs.encoders.cache import progress_bar

    table = _read(folder, "pairs", "pairs")
    names = attributes.split(",") if attributes else None
    if adapters:
        encoder = _adapted(folder, table, names, encoder, adapters, steps, seed)
    embed = embedder(encoder)
    layers, widths = (hidden,) if hidden else (), () if adapters else WIDTHS
    with progress_bar(1, "always" if sys.stderr.isatty() else False) as bar:
        task = bar.add_task("fitting heads")
        found = fit_predictors(
            table, embed, encoder=encoder, names=names, hidden=layers, widths=widths, width=width, neutral=neutral,
            seed=seed, report=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    rows = accuracy(found, table, embed)
    found.save(folder / "predictors.safetensors")
    _write(folder, accuracy=rows)
    tested = rows.filter(~pl.col("split").is_in(["train", "validation"]))
    far = tested.filter(pl.col("gap") == -2)
    show(_by_split(far, "attribute"), "Accuracy on held-out pairs two or more levels apart [95 %]")
    gaps = tested.filter(pl.col("attribute").is_null() & (pl.col("gap") > 0)).sort("gap")
    show(_by_split(gaps, "gap"), "All attributes, by levels apart")
    say(f"{len(found.names)} predictors written to {folder / 'predictors.safetensors'}; every gap in accuracy.parquet")


def _adapted(
    folder: Path, pairs: pl.DataFrame, names: Sequence[str] | None, encoder: str, rank: int, steps: int, seed: int
) -> str:
    """Train an adapter of each attribute on its training pairs, and name the folder that they are in."""
    import polars as pl

    from pluralprefs import encoders
    from pluralprefs.adapters import train_adapters
    from pluralprefs.attributes.folds import TRAIN
    from pluralprefs.data.comparisons import check
    from pluralprefs.encoders.cache import progress_bar
    from pluralprefs.encoders.lora import Lora

    known = pairs.filter(split=TRAIN) if names is None else pairs.filter(pl.col("attribute").is_in(names), split=TRAIN)
    table = check(known.select("attribute", first="high_text", second="low_text", target=1.0), name="pairs").table
    with progress_bar(len(known["attribute"].unique()) * steps, progress=True) as bar:
        task = bar.add_task("training adapters")

        def report(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done, total=total, description=f"training adapters, loss {loss:.3f}")

        found = train_adapters(encoders.load(encoder), table, "attribute", lora=Lora(rank=rank), steps=steps, seed=seed,
                               report=report)  # fmt: skip
    place = (folder / f"adapters-{found.digest[:12]}").resolve()  # those that a run was fitted with stay
    found.save(place, encoder)
    say(f"{len(found.names)} adapters written to {place}")
    return str(place)


@attributes_app.command(epilog="Example: pluralprefs attributes embed my.jsonl")
@plainly
def embed(
    data: Annotated[Path | None, typer.Argument(help="Comparisons; without a file, the folder's responses.")] = None,
    folder: Folder = Path("palette"),
    debug: Debug = False,
) -> None:
    """Store embeddings and scores of all responses by id and attribute name."""
    import polars as pl

    from pluralprefs.attributes.fitting import embedder
    from pluralprefs.attributes.predictors import AttributePredictors
    from pluralprefs.attributes.store import write_store

    found = AttributePredictors.load(folder / "predictors.safetensors")
    responses = _all_responses(data) if data else _read(folder, "responses", "rewrite")
    features = found.read(responses["text"].to_list(), embedder(found.encoder))
    write_store(folder / "store", responses["response_id"].to_list(), features, found)
    scores = pl.DataFrame(found.scores(features), schema=list(found.names))
    spread = [(name, scores[name].mean(), scores[name].std()) for name in found.names]
    show(pl.DataFrame(spread, schema=["attribute", "mean", "deviation"], orient="row"), "Scores, -1 (low) to 1 (high)")
    say(f"{responses.height} responses by {len(found.names)} attributes written to {folder / 'store'}")


def _lexicon(phrases: Any, seed: int = 0) -> Teacher:
    from pluralprefs.attributes.lexicon_teacher import LexiconTeacher

    return LexiconTeacher(phrases, seed)


def _phrases_apart(seed: int) -> Mapping[str, Teacher]:
    """Teachers of the folds that the lexicon answers in phrases of their own."""
    from pluralprefs.attributes.folds import HELDOUT, VALIDATION

    return {VALIDATION: _lexicon("validation", seed)} | {fold: _lexicon("heldout", seed) for fold in HELDOUT}


def _responses(data: Path | None, per_community: int, seed: int) -> pl.DataFrame:
    """A sample of a comparisons file, or the plain answers of the lexicon, whose communities are their topics."""
    import polars as pl

    if data is None:
        from pluralprefs.data.ids import content_id
        from pluralprefs.data.lexicon import base_answers

        rows = [
            (f"{content_id(one.prompt)}/{content_id(one.answer)}", one.prompt, one.answer, one.topic)
            for one in base_answers()
        ]
        columns = ["response_id", "prompt", "text", "community_id"]
        table = pl.DataFrame(rows, schema=columns, orient="row")
        few = pl.int_range(pl.len()).over("community_id") < per_community
        return table.filter(few).sort("response_id")
    from pluralprefs.attributes.counterfactuals import sample_responses
    from pluralprefs.data.comparisons import read

    return sample_responses(read(data, labelled=False), per_community, seed)


def _all_responses(data: Path) -> pl.DataFrame:
    """Every item of a comparisons file: response_id (the item key) and text."""
    import polars as pl

    from pluralprefs.data.batches import item_table
    from pluralprefs.data.comparisons import read
    from pluralprefs.encoders.tokens import plain

    items = item_table(read(data, labelled=False))
    texts = pl.Series("text", [plain(text) for text in items["text"].to_list()], dtype=pl.Utf8)
    return items.select(pl.col("item_key").alias("response_id")).with_columns(texts)


def _levels(text: str) -> tuple[int, int] | None:
    if text == "none":
        return None
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--levels {text!r}: give two levels of 0 to 4, as 1,3, or none") from None
    return low, high


def _read(folder: Path, name: str, command: str) -> pl.DataFrame:
    from pluralprefs.data.files import DataError, read_frame

    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `pluralprefs attributes {command}` writes it")
    table = read_frame(path)
    if "text" in table.columns and table["text"].null_count():
        row = table["text"].is_null().arg_true()[0] + 1
        raise DataError(f"{path}: row {row}, column 'text': is missing; write a text, or remove the row")
    return table


def _write(folder: Path, **tables: pl.DataFrame) -> None:
    from pluralprefs.data.files import write_frame

    for name, table in tables.items():
        write_frame(table, folder / f"{name}.parquet")


def _write_attributes(folder: Path, attributes: Mapping[str, Attribute]) -> None:
    """The set in the form that `catalog.load` reads."""
    from dataclasses import asdict

    from pluralprefs.registry.files import write_json

    write_json(folder / "attributes.json", {"attributes": [asdict(attribute) for attribute in attributes.values()]})


def _by_split(rows: pl.DataFrame, line: str) -> pl.DataFrame:
    """Accuracy with its interval, one column a split."""
    import polars as pl

    found: dict[Any, dict[str, Any]] = {}
    splits = rows["split"].unique(maintain_order=True).to_list()
    for row in rows.iter_rows(named=True):
        cells = found.setdefault(row[line], {line: row[line], **dict.fromkeys(splits, "–")})
        cells[row["split"]] = f"{row['accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return pl.DataFrame(list(found.values()), schema_overrides={line: rows.schema[line]})
