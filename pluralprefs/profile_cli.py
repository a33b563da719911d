"""`pluralprefs profile`: what the communities and users of a run like, look at, and would miss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pluralprefs.run_options import RUNS, Debug, Named, New, Root
from pluralprefs.terminal import plainly, say, warn

if TYPE_CHECKING:
    import polars as pl

    from pluralprefs.registry import RunFolder
    from pluralprefs.run import Run


@plainly
def profile(
    run: Named,
    community: Annotated[str | None, typer.Option(help='One, all by default; of --users ("" for none).')] = None,
    communities: New = None,
    user: Annotated[str | None, typer.Option(help='A user of the training data, or "all"; needs kept rows.')] = None,
    users: Annotated[
        Path | None, typer.Option(help="States of `adapt`; name their --community, which they lack.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Held-out comparisons, for ablation and shapley of users and --communities.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="preference, attention, ablation, shapley (six attributes or fewer).")
    ] = "preference",
    root: Root = RUNS,
    seed: Annotated[int | None, typer.Option("--seed", help="One of the run's fits; their mean by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where all rows go (.jsonl, .csv, .parquet); else printed.")] = None,
    json: Annotated[bool, typer.Option("--json", help="All rows as JSON lines.")] = False,
    debug: Debug = False,
) -> None:
    """What each community (or user) likes, looks at, and would miss, by attribute, with 95 % intervals.

    Intervals are widened by what the run's fits (seeds) differ by; states of --users belong to one of them. Pairs of
    --test that their users were trained on, or adapted to with `adapt --prior`, are left out.
    """
    from pluralprefs.data.files import write_frame
    from pluralprefs.profiles import over_seeds, profile_table
    from pluralprefs.registry import find_run

    if user is not None and (users is not None or community is not None):
        raise ValueError("--user names somebody of the training data: leave --users and --community out")
    if test is not None and user is None and users is None and communities is None:
        raise ValueError("--test: the run's own communities were tested on its own data; give it with --user, --users "
                         "or --communities")  # fmt: skip
    folder = find_run(run, root)
    if user is not None or users is not None:
        fits = _fits(folder, seed, communities, one=users is not None)
        found = _of_states(fits[0], users, community, test) if users is not None else _of_users(fits, user or "", test)
        rows = over_seeds(found)
    else:
        rows = over_seeds(_of_communities(folder, seed, communities, test))
    if community is not None and users is None:
        known = sorted(set(rows["community"]) - {""})
        rows = rows.filter(community=community)
        if not rows.height:
            raise ValueError(f"--community {community}: the run has a profile of {', '.join(known) or 'none'}; one "
                             "that it has not met is fitted with --communities FILE")  # fmt: skip
    if out is not None:
        write_frame(rows, out)
        say(f"{rows.height} rows written to {out}")
    else:
        say(rows.write_ndjson().rstrip() if json else profile_table(rows, kind))


def _fits(folder: RunFolder, seed: int | None, communities: Path | None, *, one: bool) -> list[Run]:
    """The run's fits, or the one that is asked for, with the communities of a file, which is read once."""
    from pluralprefs.run import load

    content = folder.read()
    fitted = [number for number in content["seeds"] if str(number) in content.get("notes", {})]
    seeds = [seed] if seed is not None or one else fitted
    lacking = [] if seed is not None or one else [number for number in content["seeds"] if number not in fitted]
    if lacking and seeds:
        warn(f"{folder.name}: seeds {', '.join(map(str, lacking))} are not fitted and left out; continue the run with "
             "`pluralprefs train --resume`")  # fmt: skip
    loaded = [load(folder.path, seed=number) for number in seeds or [None]]
    if communities is None:
        return loaded
    new = loaded[0].read(communities)
    return [fit.with_communities(new) for fit in loaded]


def _of_states(fit: Run, path: Path, community: str | None, test: Path | None) -> pl.DataFrame:
    """Profiles of adapted users, who depart from `community` where their file does not say from which."""
    import polars as pl

    from pluralprefs.adapted import is_one_user, owned, pair_ids

    states = fit.load_users(path)
    held_out = None if test is None else owned(fit.read(test), states)
    if is_one_user(path):
        one = fit.load_user(path)
        own = fit.vocabulary.communities[one.community] if one.community >= 0 else ""
        if community not in (None, own):
            raise ValueError(f"{path}: begins at {one.prior}, not at community {community}: leave --community out")
        community = own
        if held_out is not None:
            held_out = held_out.filter(~pl.Series(pair_ids(held_out)).is_in(list(one.pairs)))
            if not held_out.height:
                raise ValueError(f"{test}: holds pairs alone that {path} was adapted to; give held-out ones")
    elif community is None and bool((fit.users.community_root > 0).any()):
        names = ", ".join(fit.vocabulary.communities)
        raise ValueError(f"{path}: these states do not say from which community their users depart; add --community "
                         f'with one of {names}, or --community "" for none')  # fmt: skip
    return fit.profile(states, community=community or None, test=held_out)


def _of_users(fits: list[Run], user: str, test: Path | None) -> pl.DataFrame:
    """Profiles by each fit of a user of the training data, or of "all"."""
    import polars as pl

    first = fits[0]
    held_out = None if test is None else first.read(test)
    if user == "all":
        return pl.concat([fit.profile(test=held_out) for fit in fits])
    known = [name for name in (user, first.known_as(user)) if name in first.vocabulary.users]
    if not known and first.rows is not None:
        raise ValueError(f"--user {user}: is no user of the training data that the run kept")
    return pl.concat([fit.profile(known[:1], test=held_out) for fit in fits])


def _of_communities(folder: RunFolder, seed: int | None, communities: Path | None, test: Path | None) -> pl.DataFrame:
    """The recorded profiles of the run's communities by each fit, and those of new ones before them."""
    import polars as pl

    seeds = folder.read()["seeds"]
    if seed is not None and seed not in seeds:
        raise ValueError(f"--seed {seed}: {folder.name} has seeds {', '.join(map(str, seeds))}")
    own = folder.table("attribute_weights")
    own = own if seed is None else own.filter(pl.col("seed") == seed)
    if not own.height:
        raise ValueError(f"{folder.name}: has no profiles yet; continue the run with `pluralprefs train --resume`")
    if communities is None:
        return own
    fits = _fits(folder, seed, communities, one=False)
    held_out = None if test is None else fits[0].read(test)
    known = set(own["community"])
    new = [name for name in fits[0].vocabulary.communities if name not in known]
    return pl.concat([*(fit.community_profile(new, test=held_out) for fit in fits), own], how="diagonal")
