"""`pluralprefs suggest | ask | choose`: one user at a time, a question, an answer, a choice."""

from __future__ import annotations

import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pluralprefs.run_options import RUNS, Debug, Named, New, Root, Seed, opened
from pluralprefs.terminal import plainly, say

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from pluralprefs.adapted import AdaptedUser
    from pluralprefs.run import Run

Pool = Annotated[Path, typer.Option("--pool", help="Pairs that may be asked; no target needed.")]
Rule = Annotated[str, typer.Option(help="bald, d_optimal, eubo or random.")]
Prior = Annotated[
    str | None, typer.Option(help='Where a user without a file begins: "population" (unless said) or "community:NAME".')
]
ANSWERS = {"1": (1.0, False), "2": (0.0, False), "t": (0.5, True), "s": (0.5, False)}
KEYS = "[1] first  [2] second  [t] tie  [s] skip  [u] undo  [q] quit"
SHOWN = 5  # coordinates that moved most
INNER = ("reversed", "trust", "even", "scale", "spread", "open")  # of an inferred user, no part of a profile


def _person(loaded: Run, user: Path | None, prior: str | None) -> AdaptedUser:
    """The user of a file, or who begins at `prior`. Raises DataError for a file that began at another."""
    from pluralprefs.data.files import DataError

    if user is None:
        return loaded.adapt(prior=prior or "population")
    person = loaded.load_user(user)
    if prior is not None and prior != person.prior:
        raise DataError(f"{user}: begins at {person.prior}, not at {prior}: leave --prior out, or name another --user")
    return person


@plainly
def suggest(
    run: Named,
    pool: Pool,
    user: Annotated[Path | None, typer.Option(help="User from `adapt --prior` or `ask`; none: the prior.")] = None,
    n: Annotated[int, typer.Option("-n", help="Pairs to suggest.")] = 5,
    rule: Rule = "bald",
    prior: Prior = None,
    out: Annotated[Path | None, typer.Option(help="Where they go (.jsonl, .csv, .parquet); else printed.")] = None,
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Choose the pairs of a pool that say most about a user, the best first."""
    from pluralprefs.asking import suggest as choose_pairs
    from pluralprefs.data.files import write_frame

    loaded = opened(run, root, seed, communities)
    person = _person(loaded, user, prior)
    found = choose_pairs(person, _pairs(loaded, pool), n, rule=rule).drop("user_id")
    if out is not None:
        write_frame(found, out)
        say(f"{found.height} pairs written to {out}")
    elif not found.height:
        say(f"{pool}: nothing is left to ask this user")
    else:
        say(found.select("example_id", "prompt", "first", "second", "gain", "probability").write_ndjson().rstrip())


@plainly
def ask(
    run: Named,
    pool: Pool,
    user: Annotated[Path, typer.Option(help="User file: read where it exists, written after every answer.")],
    n: Annotated[int, typer.Option("-n", help="Questions at most, this time.")] = 20,
    rule: Rule = "bald",
    prior: Prior = None,
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Ask somebody one pair after the other and show how the state moves. The same command again goes on."""
    loaded = opened(run, root, seed, communities)
    table = _pairs(loaded, pool)
    person = _person(loaded, user if user.exists() else None, prior)
    if person.ids:
        say(f"{user}: goes on after {_counted(person)}")
    say(KEYS)
    asked, earlier = 0, False  # whether what was said before this session may be taken back
    while asked < n:
        question = _question(person, table, rule)
        if question is None and _last(person, table) is None:
            say("nothing is left to ask")
            break
        answer = _answer(question)
        if answer == "q":
            break
        if answer == "u" or question is None:
            last = _last(person, table)
            if last is None:
                say("nothing to undo")
                continue
            if not (asked or earlier):
                earlier = True
                say(f"{last}\n  was said before this session: [u] again to take it back")
                continue
            moved, asked = person.undo(), max(asked - 1, 0)
        else:
            moved, asked, earlier = person.update(_judged(question, answer)), asked + 1, False
        moved.save(user)
        _show(loaded, person, moved)
        person = moved
    if not user.exists():
        person.save(user)
    say(f"{_counted(person)}; {user} holds the state")


@plainly
def choose(
    run: Named,
    data: Annotated[Path, typer.Option("--input", help="Rows with prompt, response and any attribute columns.")],
    user: Annotated[Path | None, typer.Option(help="User from `adapt --prior` or `ask`; none: the prior.")] = None,
    rule: Annotated[str, typer.Option(help="mean, lower_bound or consensus.")] = "lower_bound",
    prior: Prior = None,
    out: Annotated[Path | None, typer.Option(help="Where ranks go (.jsonl, .csv, .parquet); else printed.")] = None,
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Rank the responses to each prompt for a user, the choice first."""
    import polars as pl

    from pluralprefs.choosing import choose as rank
    from pluralprefs.data.files import DataError, read_frame, write_frame

    loaded = opened(run, root, seed, communities)
    person = _person(loaded, user, prior)
    rows = read_frame(data)
    missing = [name for name in ("prompt", "response") if name not in rows.columns]
    if missing:
        raise DataError(f"{data}: column {missing[0]!r} is missing; write one row a response, with its prompt")
    parts = []
    for part in rows.partition_by("prompt", maintain_order=True):
        prompt = part["prompt"].to_list()[0]
        ranked = rank(person, prompt, part.drop("prompt"), rule=rule).drop("place")
        parts.append(ranked.select(pl.Series("prompt", [prompt] * part.height, part["prompt"].dtype),
                                   pl.int_range(1, pl.len() + 1).alias("rank"), pl.all()))  # fmt: skip
    found = pl.concat(parts)
    if out is None:
        say(found.write_ndjson().rstrip())
    else:
        write_frame(found, out)
        say(f"{found.height} responses ranked; written to {out}")


def _pairs(loaded: Run, pool: Path) -> pl.DataFrame:
    return loaded.read(pool, labelled=False)


def _question(person: AdaptedUser, table: pl.DataFrame, rule: str) -> pl.DataFrame | None:
    from pluralprefs.asking import suggest as choose_pairs

    found = choose_pairs(person, table, 1, rule=rule, seed=len(person.ids))
    return found if found.height else None


def _answer(question: pl.DataFrame | None) -> str:
    """Show a pair, where one is left, and read what is said of it; the end of the input is a quit."""
    say("nothing is left to ask: [u] undo  [q] quit" if question is None else f"\n{_shown(question)}")
    known = () if question is None else ANSWERS
    while True:
        typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        said = line.strip().lower()
        if not line or said == "q":
            return "q"
        if said in known or said == "u":
            return said
        say(KEYS)


def _shown(pair: pl.DataFrame) -> str:
    row = pair.row(0, named=True)
    return f"{_text(row['prompt'])}\n  1  {_text(row['first'])}\n  2  {_text(row['second'])}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(f"{m['role']}: {m['content']}" for m in value or ())


def _judged(question: pl.DataFrame, answer: str) -> pl.DataFrame:
    """The pair as a comparison. One that is skipped has weight 0: it says nothing and is not asked again."""
    import polars as pl

    target, tie = ANSWERS[answer]
    weight = 0.0 if answer == "s" else 1.0
    return question.with_columns(target=pl.lit(target), tie=pl.lit(tie), weight=pl.lit(weight))


def _last(person: AdaptedUser, table: pl.DataFrame) -> str | None:
    """The pair of the user's last comparison, None where there is none or it is none of the pool."""
    import polars as pl

    from pluralprefs.adapted import pair_ids

    there = table.filter(pl.Series(pair_ids(table), dtype=pl.Utf8) == (person.pairs or ("",))[-1])
    return _shown(there) if there.height else None


def _counted(person: AdaptedUser) -> str:
    weights = () if person.rows is None else person.rows.weight
    judged = sum(bool(weight > 0) for weight in weights)
    return f"{judged} comparisons, {len(weights) - judged} skipped"


def _show(loaded: Run, before: AdaptedUser, after: AdaptedUser) -> None:
    """Print what moved most: the attribute profile where the run has one, else coordinates of the state."""
    names, (old, new), std = _profile(loaded, before, after)
    if not abs(new - old).max():
        say("  nothing moved")
        return
    scale = abs(new).max() or 1.0
    for i in sorted(range(len(names)), key=lambda i: -abs(new[i] - old[i]))[:SHOWN]:
        bar = "#" * round(10 * abs(new[i]) / scale)
        side = f"{bar:>10}|{'':10}" if new[i] < 0 else f"{'':10}|{bar:10}"
        unsure = f", +-{1.96 * std[i]:.2f}" if isfinite(std[i]) else ""
        say(f"  {names[i]:<24.24} {side} {new[i]:+.2f} (was {old[i]:+.2f}{unsure})")


def _profile(loaded: Run, *states: AdaptedUser) -> tuple[list[str], tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Names, values before and after, and standard deviations of what is shown, NaN where the user states none."""
    import jax
    import numpy as np

    from pluralprefs.users import part_names, ravel

    before, after = states
    if loaded.attributes is not None and loaded.rows is not None:
        community = loaded.vocabulary.communities[after.community] if after.community >= 0 else None
        rows = [loaded.profile({"": s.posterior}, community=community).filter(kind="preference") for s in states]
        half = (rows[1]["ci_high"] - rows[1]["ci_low"]).to_numpy() / 2 / 1.96
        return rows[1]["attribute"].to_list(), (rows[0]["mean"].to_numpy(), rows[1]["mean"].to_numpy()), half
    source = loaded.encoder if loaded.attributes is None else loaded.attributes
    columns, parts = getattr(source, "names", ()), part_names(after.posterior.mean)
    own = [i for i, part in enumerate(parts) if part.split(".")[0] not in INNER]
    names = []
    for i in own:
        part, place = parts[i], i - parts.index(parts[i])
        column = columns[place] if parts.count(part) == len(columns) else str(place + 1)
        names.append(part if parts.count(part) == 1 else f"{part} {column}".strip())
    old, new = (np.asarray(ravel(state.posterior.mean)[0])[own] for state in (before, after))
    spread = np.full(len(new), np.nan)
    if after.posterior.covariance is not None:
        root, downdate = (np.asarray(factor) ** 2 for factor in jax.tree.leaves(after.posterior.covariance))
        spread = np.maximum((root if root.ndim == 1 else root.sum(1)) - downdate.sum(0), 0.0)[own]
    return names, (old, new), np.sqrt(spread)
