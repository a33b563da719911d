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
    --test that their users were trained on are left out.
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
        rows = over_seeds(_of_users(_fits(folder, seed, communities, one=users is not None), user, users, community,
                                    test))  # fmt: skip
    else:
        rows = over_seeds(_of_communities(folder, seed, communities, test))
        rows = rows if community is None else rows.filter(community=community)
    if not rows.height:
        raise ValueError(f"--community {community}: the run has no profile of it")
    if out is not None:
        write_frame(rows, out)
        say(f"{rows.height} rows written to {out}")
    else:
        say(rows.write_ndjson().rstrip() if json else profile_table(rows, kind))


def _fits(folder: RunFolder, seed: int | None, communities: Path | None, *, one: bool) -> list[Run]:
    """The run's fits, or the one that is asked for, with the communities of a file, which is read once."""
    from pluralprefs.run import load

    content = folder.read()
    seeds = [seed] if seed is not None or one else [s for s in content["seeds"] if str(s) in content["notes"]]
    lacking = [] if seed is not None or one else [s for s in content["seeds"] if s not in seeds]
    if lacking and seeds:
        warn(f"{folder.name}: seeds {', '.join(map(str, lacking))} are not fitted and left out; continue the run with "
             "`pluralprefs train --resume`")  # fmt: skip
    loaded = [load(folder.path, seed=number) for number in seeds or [None]]
    if communities is None:
        return loaded
    new = loaded[0].read(communities)
    return [fit.with_communities(new) for fit in loaded]


def _of_users(
    fits: list[Run], user: str | None, users: Path | None, community: str | None, test: Path | None
) -> pl.DataFrame:
    """Profiles of adapted users, or of those of the training data, by each fit."""
    import polars as pl

    first = fits[0]
    held_out = None if test is None else first.read(test)
    if users is not None:
        if community is None and bool((first.users.community_root > 0).any()):
            names = ", ".join(first.vocabulary.communities)
            raise ValueError(f"{users}: a user state does not say from which community the user departs; add "
                             f'--community with one of {names}, or --community "" for none')  # fmt: skip
        return first.profile(first.load_users(users), community=community or None, test=held_out)
    if user == "all":
        return pl.concat([fit.profile(test=held_out) for fit in fits])
    known = [name for name in (user, first.known_as(user or "")) if name in first.vocabulary.users]
    if not known:
        raise ValueError(f"--user {user}: is no user of the training data that the run kept")
    return pl.concat([fit.profile(known[:1], test=held_out) for fit in fits])


def _of_communities(folder: RunFolder, seed: int | None, communities: Path | None, test: Path | None) -> pl.DataFrame:
    """The recorded profiles of the run's communities by each fit, and those of new ones before them."""
    import polars as pl

    own = folder.table("attribute_weights")
    own = own if seed is None else own.filter(pl.col("seed") == seed)
    if communities is None:
        return own
    fits = _fits(folder, seed, communities, one=False)
    held_out = None if test is None else fits[0].read(test)
    known = set(own["community"])
    new = [name for name in fits[0].vocabulary.communities if name not in known]
    return pl.concat([*(fit.community_profile(new, test=held_out) for fit in fits), own], how="diagonal")
