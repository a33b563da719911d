"""`pluralprefs personas questions | responses | refine | label | report | winrate`: synthetic people, and win rates.

Each command reads what the one before it left in one folder and adds its own plain tables; the teacher's answers are
kept there as they come, so that a command that was stopped is run again and goes on. In the folder:

    people.parquet, questions.parquet                         questions (and answers.jsonl, the cache)
    responses.parquet                                         responses
    refinements.parquet, people.parquet once more             refine
    labels.parquet, comparisons.jsonl                         label
    disagreement.parquet                                      report
    winrate.parquet                                           winrate
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pluralprefs.teacher_cli import CACHE, Asking, Concurrency, Debug, DryRun, MaxCost, Model, Prices, Rate, TeacherName
from pluralprefs.terminal import plainly, say, show, warn

if TYPE_CHECKING:
    import polars as pl

    from pluralprefs.attributes.teacher import Teacher
    from pluralprefs.personas.passes import Passes

personas_app = typer.Typer(
    no_args_is_help=True, help="Synthetic people: questions, responses, what they prefer; win rates by a judge."
)

Folder = Annotated[Path, typer.Option(help="Folder of all tables.")]
Judge = Annotated[
    str, typer.Option("--judge", envvar="PLURALPREFS_TEACHER", help='"lexicon" (offline) or address of a chat server.')
]
Seed = Annotated[int, typer.Option(help="Of what is drawn, and of the lexicon.")]
PairsEach = Annotated[int, typer.Option("--pairs", help="Pairs of responses to each question.")]
SHOWN = 12  # people in a printed matrix, at most


@personas_app.command(
    epilog="Examples: pluralprefs personas questions · pluralprefs personas questions people.jsonl "
    "--teacher http://localhost:8000/v1 --model my-model --price 0.5,1.5 --max-cost 20 --dry-run"
)
@plainly
def questions(
    people: Annotated[
        Path | None, typer.Argument(help="user_id and description a row; without, eight of ours.")
    ] = None,
    folder: Folder = Path("personas"),
    each: Annotated[int, typer.Option(help="Questions asked for in a request.")] = 10,
    draws: Annotated[int, typer.Option(help="Requests for each person.")] = 1,
    most: Annotated[int | None, typer.Option(help="Questions kept, at most.")] = None,
    seed: Seed = 0,
    teacher: TeacherName = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Ask what each person would ask, and drop what repeats."""
    import polars as pl

    from pluralprefs.personas.people import examples, read_people
    from pluralprefs.personas.questions import question_tasks
    from pluralprefs.personas.questions import questions as ask

    known = read_people(people) if people else examples()
    asking = Asking(teacher, model, price, max_cost, concurrency, rate)
    with asking.open(lambda: _lexicon(seed)) as one:
        if dry_run:
            asking.tell_estimate(one, question_tasks(known, each, draws), folder)
            return
        table = ask(known, _passes(one, asking, folder), each=each, draws=draws, most=most, tell=say)
    if not table.height:
        raise ValueError(f"{folder / CACHE}: nobody's questions could be read; run again, or name another model")
    _write(folder, people=known.with_columns(original=pl.col("description")), questions=table)
    say(f"{table.height} questions of {known.height} people written to {folder}")


@personas_app.command(epilog="Example: pluralprefs personas responses --steered 4 --views 4 --draws 2")
@plainly
def responses(
    folder: Folder = Path("personas"),
    steered: Annotated[int, typer.Option(help="People for whom each question is answered.")] = 3,
    views: Annotated[int, typer.Option(help="Points of view from which each question is answered.")] = 3,
    draws: Annotated[int, typer.Option(help="Responses for each person and view.")] = 1,
    seed: Seed = 0,
    teacher: TeacherName = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Answer every question for some people and from some points of view."""
    from pluralprefs.personas import responses as writing

    known, asked = _read(folder, "people", "questions"), _read(folder, "questions", "questions")
    asking = Asking(teacher, model, price, max_cost, concurrency, rate)
    with asking.open(lambda: _lexicon(seed)) as one:
        if dry_run:
            first = writing.view_tasks(asked, views)
            stand_in = [f"{number} " + "x" * 60 for number in range(views)]
            found = writing.lines(_passes(one, asking, folder, make=False).known(first), asked.height, stand_in)
            wanted = writing.respond_tasks(asked, known, found, steered=steered, draws=draws, seed=seed)
            asking.tell_estimate(one, [*first, *(response.task for response in wanted)], folder)
            return
        passes = _passes(one, asking, folder)
        table = writing.responses(asked, known, passes, steered=steered, views=views, draws=draws, seed=seed, tell=say)
    _write(folder, responses=table)
    say(f"{table.height} responses to {table['question_id'].n_unique()} questions written to {folder}")


@personas_app.command(epilog="Example: pluralprefs personas refine --rounds 3 --enough 0.9")
@plainly
def refine(
    folder: Folder = Path("personas"),
    rounds: Annotated[int, typer.Option(help="Better descriptions asked for, at most.")] = 3,
    enough: Annotated[float, typer.Option(help="Share of pairs that a description has to decide.", min=0, max=1)] = 0.9,
    tried: Annotated[int, typer.Option(help="Pairs that every description is tried on.")] = 12,
    pairs: PairsEach = 4,
    seed: Seed = 0,
    teacher: TeacherName = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Refine descriptions, from those that were given, until they decide."""
    import polars as pl

    from pluralprefs.personas.refinement import refine as improve
    from pluralprefs.personas.refinement import refining_tasks

    known = _read(folder, "people", "questions")
    given = known.select("user_id", description="original")
    drawn = _pairs(folder, pairs, seed).head(tried)
    asking = Asking(teacher, model, price, max_cost, concurrency, rate)
    with asking.open(lambda: _lexicon(seed)) as one:
        if dry_run:
            say("at most, if no description decides enough:")
            asking.tell_estimate(one, refining_tasks(given, drawn, rounds), folder)
            return
        found = improve(given, drawn, _passes(one, asking, folder), rounds=rounds, enough=enough, tell=say)
    _write(folder, people=found.people.with_columns(known["original"]), refinements=found.rounds)
    last = found.rounds.filter("taken").group_by("user_id", maintain_order=True).last()
    first = found.rounds.filter(pl.col("round") == 0).select("user_id", before="decided")
    show(last.join(first, on="user_id", maintain_order="left").select("user_id", "round", "before", "decided"),
         f"Share decided of {drawn.height} pairs")  # fmt: skip
    say(f"{(last['round'] > 0).sum()} of {last.height} descriptions refined; every round in refinements.parquet")


@personas_app.command(epilog="Example: pluralprefs personas label --pairs 6 --most 200")
@plainly
def label(
    folder: Folder = Path("personas"),
    pairs: PairsEach = 4,
    most: Annotated[int | None, typer.Option(help="Pairs that each person judges, at most.")] = None,
    seed: Seed = 0,
    teacher: TeacherName = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Ask in both orders what each person prefers, and keep what agrees: comparisons.jsonl."""
    from pluralprefs.data.comparisons import write
    from pluralprefs.personas.labels import both_orders, by_person, comparisons, label_tasks
    from pluralprefs.personas.labels import label as ask

    known, drawn = _read(folder, "people", "questions"), _pairs(folder, pairs, seed)
    drawn = drawn if most is None else drawn.head(most)
    asking = Asking(teacher, model, price, max_cost, concurrency, rate)
    with asking.open(lambda: _lexicon(seed)) as one:
        if dry_run:
            asking.tell_estimate(one, both_orders(label_tasks(known, drawn)), folder)
            return
        table = ask(known, drawn, _passes(one, asking, folder), tell=say)
    _write(folder, labels=table)
    show(by_person(table), "Labels; inconsistent ones are left out")
    kept = comparisons(table)
    write(kept, folder / "comparisons.jsonl")
    say(f"{kept.height} of {table.height} labels are consistent; written to {folder / 'comparisons.jsonl'}")


@personas_app.command(epilog="Example: pluralprefs personas report --most 0.6 --contested --out chosen.jsonl")
@plainly
def report(
    folder: Folder = Path("personas"),
    most: Annotated[
        float | None, typer.Option(help="Leave out who disagrees with the others on more pairs.", min=0, max=1)
    ] = None,
    contested: Annotated[bool, typer.Option("--contested", help="Leave out pairs on which all agree.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the comparisons that stay go (.jsonl, .parquet).")] = None,
    debug: Debug = False,
) -> None:
    """Who disagrees with whom, and the comparisons that stay where that is too much or nothing."""
    import polars as pl

    from pluralprefs.data.comparisons import write
    from pluralprefs.personas.disagreement import choose, disagreement
    from pluralprefs.personas.labels import by_person, comparisons

    labels = _read(folder, "labels", "label")
    table = disagreement(labels)
    _write(folder, disagreement=table)
    others = table.filter(pl.col("other_id").is_null()).select("user_id", "disagreement", "ci_low", "ci_high")
    counts = by_person(labels).select("user_id", "kept", "decided")
    show(counts.join(others, on="user_id", maintain_order="left"), "Disagreement with all others [95 % over questions]")
    if others.height <= SHOWN:
        show(_matrix(table), "Share of pairs on which two people differ")
    found = choose(labels, table, most, contested)
    say(f"{found.unanimous} pairs on which all agree{', left out' if contested else ''}")
    if most is not None:
        say(f"{len(found.people)} people left out: {', '.join(found.people) or 'nobody disagrees so much'}")
    if out is not None:
        kept = comparisons(found.labels)
        write(kept, out)
        say(f"{kept.height} comparisons of {kept['user_id'].n_unique()} people written to {out}")


@personas_app.command(
    epilog="Examples: pluralprefs personas winrate mine.jsonl base.jsonl · pluralprefs personas winrate mine.jsonl "
    "base.jsonl --judge http://localhost:8000/v1 --model my-judge"
)
@plainly
def winrate(
    a: Annotated[Path, typer.Argument(help="prompt, response, and user_id and description where there are any.")],
    b: Annotated[Path, typer.Argument(help="The same prompts and users, answered by another system.")],
    people: Annotated[Path | None, typer.Option(help="user_id and description, where neither file has them.")] = None,
    folder: Folder = Path("personas"),
    out: Annotated[Path | None, typer.Option(help="Where every judgement goes; winrate.parquet of the folder.")] = None,
    judge: Judge = "lexicon",
    model: Model = None,
    price: Prices = None,
    max_cost: MaxCost = None,
    concurrency: Concurrency = 8,
    rate: Rate = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """How often A's text is preferred to B's, asked in both orders, with 95 % intervals over users."""
    from pluralprefs.data.files import write_frame
    from pluralprefs.personas import winrates
    from pluralprefs.personas.labels import both_orders

    pairs = winrates.matched(winrates.read_generated(a), winrates.read_generated(b), str(a), str(b))
    pairs = _described(pairs, people) if people else pairs
    asking = Asking(judge, model, price, max_cost, concurrency, rate)
    if bare := pairs["description"].null_count():
        warn(f"{bare} of {pairs.height} rows have no description: the judge says which answer is better")
    with asking.open(_lexicon) as one:
        if dry_run:
            asking.tell_estimate(one, both_orders(winrates.judging_tasks(pairs)), folder)
            return
        rows = winrates.judged(pairs, _passes(one, asking, folder), tell=say)
    path = out or folder / "winrate.parquet"
    write_frame(rows, path)
    show(winrates.win_rates(rows), f"Share won by {a.name}; inconsistent and equal are ties")
    say(f"{rows.height} judgements written to {path}")


def _described(pairs: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Descriptions of a file for users whose rows carry none."""
    import polars as pl

    from pluralprefs.personas.people import read_people

    known = read_people(path).rename({"description": "other"})
    table = pairs.join(known, on="user_id", how="left", maintain_order="left")
    return table.with_columns(pl.coalesce("description", "other").alias("description")).drop("other")


def _matrix(table: pl.DataFrame) -> pl.DataFrame:
    """One row and one column a person."""
    import polars as pl

    rows = table.filter(pl.col("other_id").is_not_null())
    wide = rows.pivot("other_id", index="user_id", values="disagreement", maintain_order=True)
    return wide.select("user_id", *(name for name in wide["user_id"] if name in wide.columns))


def _lexicon(seed: int = 0) -> Teacher:
    from pluralprefs.personas.lexicon_personas import LexiconPersonas

    return LexiconPersonas(seed)


def _passes(teacher: Teacher, asking: Asking, folder: Path, make: bool = True) -> Passes:
    from pluralprefs.personas.passes import Passes

    if not make:
        return Passes(teacher, folder / CACHE)
    options: dict[str, Any] = asking.options(folder)
    return Passes(teacher, **{name: options.pop(name) for name in ("cache", "max_cost", "price")}, options=options)


def _pairs(folder: Path, each: int, seed: int) -> pl.DataFrame:
    from pluralprefs.personas.responses import pairs

    found = pairs(_read(folder, "responses", "responses"), each, seed)
    if not found.height:
        raise ValueError(f"{folder / 'responses.parquet'}: no question has two different responses; ask for more")
    return found


def _read(folder: Path, name: str, command: str) -> pl.DataFrame:
    from pluralprefs.data.files import read_frame

    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `pluralprefs personas {command}` writes it")
    return read_frame(path)


def _write(folder: Path, **tables: pl.DataFrame) -> None:
    from pluralprefs.data.files import write_frame

    for name, table in tables.items():
        write_frame(table, folder / f"{name}.parquet")
