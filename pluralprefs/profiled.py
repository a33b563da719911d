"""Which profile is asked of a run: of which communities or users, on which held-out comparisons?

`profiles` takes profiles of a fit by numbers; here names are looked up, and comparisons that somebody was trained on
are told from those that are held out. `Run.profile` and `Run.community_profile` call this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import polars as pl

from pluralprefs.adapted import Adapts
from pluralprefs.adapting import adapt_units
from pluralprefs.data.files import DataError, require_targets, shown
from pluralprefs.fitting import Fitted, Rows, take
from pluralprefs.profiles import attribute_weights, user_weights
from pluralprefs.types import Item, UserPosterior


class Run(Adapts, Protocol):
    """What a profile needs of a run: its kept training rows with their items, and how it reads other comparisons."""

    @property
    def rows(self) -> Rows | None: ...
    @property
    def items(self) -> Item | None: ...
    @property
    def attributes(self) -> Any: ...
    @property
    def seed(self) -> int: ...
    def trained_on(self, table: pl.DataFrame, rows: Rows) -> np.ndarray: ...
    def beside(self, items: Item, rows: Rows) -> tuple[Rows, Item, Rows]: ...


def of_communities(run: Run, communities: Sequence[str] | None, test: pl.DataFrame | None) -> pl.DataFrame:
    """Profiles of communities; see `Run.community_profile`."""
    fitted, items, names = _profiled(run)
    known = run.vocabulary.communities
    asked = None if communities is None else [_community(run, community) for community in communities]
    rows = take(fitted.rows, slice(0))
    if test is not None:
        _, items, rows = _held_out(run, test)
        if asked is not None and not np.isin(rows.community, asked).any():
            raise DataError(f"test: none of its held-out comparisons is of {shown(communities)}: give some whose "
                            f"{run.experiment.community!r} says so")  # fmt: skip
    return attribute_weights(fitted, items, rows, known, names, seed=run.seed, asked=asked)


def of_users(
    run: Run, users: Mapping[str, UserPosterior] | Sequence[str] | None, community: str | None,
    test: pl.DataFrame | None,
) -> pl.DataFrame:  # fmt: skip
    """Profiles of users; see `Run.profile`."""
    fitted, items, names = _profiled(run)
    if isinstance(users, str) or (community is not None and not isinstance(users, Mapping)):
        raise TypeError("profile takes a list of names, ['ana'], who depart from their own communities; community= is "
                        "for adapted users")  # fmt: skip
    place = -1 if community is None else _community(run, community)
    if isinstance(users, Mapping):
        units = {name: (place, posterior, None) for name, posterior in users.items()}
    else:
        units = _of_table(run, fitted, items, users)
    asked: dict[str, Rows] = {}
    if test is not None:
        theirs = test.filter(pl.col("user_id").fill_null("").is_in(list(units)))
        if not theirs.height:
            raise DataError(f"test: none of its comparisons is by {shown(list(units))}: give held-out ones whose "
                            "'user_id' says so")  # fmt: skip
        theirs, items, rows = _held_out(run, theirs)
        owner = theirs["user_id"].fill_null("").to_numpy()
        for name, (place, *_) in units.items():
            if len(mine := np.flatnonzero(owner == name)):
                own = take(rows, mine)
                asked[name] = own.replace(community=np.where(own.community < 0, place, own.community))
    return user_weights(fitted, items, units, run.vocabulary.communities, names, seed=run.seed, test=asked)


def _profiled(run: Run) -> tuple[Fitted, Item, tuple[str, ...]]:
    """What a profile is of: the fit with the kept training rows, their items, and the names of the attributes."""
    if run.rows is None or run.items is None:
        raise DataError(f"{run.folder.name}: kept no training rows to take profiles over; fit with save_users")
    if run.attributes is None and run.items.attributes is not None:
        raise ValueError("profile: this run was loaded without its attributes; load it with attributes=True")
    names = run.attributes.names if run.attributes is not None else ()
    return Fitted(run.model, run.users, run.rows, run.notes), run.items, tuple(names)


def _community(run: Run, name: str) -> int:
    known = run.vocabulary.communities
    if name not in known:
        raise DataError(f"community {name!r}: the run has {', '.join(known) or 'none'}")
    return known.index(name)


def _of_table(
    run: Run, fitted: Fitted, items: Item, names: Sequence[str] | None
) -> dict[str, tuple[int, UserPosterior, int]]:
    """Users of the kept training rows, all by default: the community of most of their rows, state, count of rows."""
    user, rows = np.asarray(fitted.rows.user), fitted.rows
    kept = {run.vocabulary.users[number]: number for number in np.unique(user[user >= 0]).tolist()}
    for name in names or ():
        if name not in kept:
            raise DataError(f"user {name!r}: is no user of the training data that {run.folder.name} kept")
    mine = np.flatnonzero(np.isin(user, list(kept.values()) if names is None else [kept[name] for name in names]))
    found = adapt_units(run.model, run.users, items, take(rows, mine), user[mine])
    return {
        run.vocabulary.users[u]: (_usual(np.asarray(rows.community)[user == u]), posterior, int((user == u).sum()))
        for u, posterior in found.items()
    }


def _usual(numbers: np.ndarray) -> int:
    """The most frequent number."""
    values, counts = np.unique(numbers, return_counts=True)
    return int(values[counts.argmax()])


def _held_out(run: Run, test: pl.DataFrame) -> tuple[pl.DataFrame, Item, Rows]:
    """Comparisons but for pairs that the same user was trained on, with the kept items before their own.

    Raises DataError where none is left.
    """
    require_targets(test)
    items, rows = run.arrays(test)
    fresh = ~run.trained_on(test, rows)
    if not fresh.any():
        raise DataError("test: holds pairs alone that their users were trained on; give held-out ones")
    _, both, rows = run.beside(items, rows)
    return test.filter(pl.Series(fresh)), both, take(rows, np.flatnonzero(fresh))
