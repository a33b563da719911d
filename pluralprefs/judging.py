"""Who judges what shots say: users whom a family has not seen, and which of their comparisons they show.

A fifth of the training users is held out, of few users a third (`held_out`). Where responses are kept apart, those that
these users are asked about are held out too (`judges`). What shots of responses that training does not know say is
judged by users who show and are asked about whole groups of responses, from which another family was kept
(`far_judges`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pluralprefs.data.episodes import episode_indices
from pluralprefs.data.ids import stable_hash
from pluralprefs.fitting import Rows, take
from pluralprefs.users import Pooled

SHOTS = 32  # of an episode, at most
HELD_OUT, MOST_HELD = 20, 2000  # per cent of the training users, and the most of them
NEW_ITEMS = 30  # per cent of the items, where they are kept apart
FAR = (20, 35)  # per cent of the rows, between which groups of responses are kept from the family
ENOUGH = 20  # users who have shown a number of shots, to learn how far it is to be trusted
FEW = 10  # users to judge by, below which they can take trust away, but add none
FEWEST = 2  # users to judge by; where there are fewer nothing is trusted

Apart = str | Bool[np.ndarray, " items"]  # what shots and questions do not share (`episode_indices`)


class Judging(NamedTuple):
    """Rows of users whom the family has not seen, and what of those is asked about."""

    rows: Rows
    asked: Apart


def judges(rows: Rows, held: np.ndarray, pooled: Pooled) -> tuple[np.ndarray, Judging]:
    """Rows to train on, and users to judge by.

    Where items are kept apart, `NEW_ITEMS` per cent of the items are held out too: held-out users show the others, and
    are asked about items that the family has not seen, as it will be. That leaves about half of the rows to train on
    and half of a user's rows to show. Where fewer than `ENOUGH` users could be asked so, about too few items, items are
    parted anew for each user, and where `FEWEST` cannot be asked so either, only pairs are kept apart.
    """
    usable = usable_rows(rows)
    apart = np.isin(np.asarray(rows.user), held)
    others, aside = np.flatnonzero(usable & ~apart), take(rows, np.flatnonzero(usable & apart))
    if pooled.cross_fit != "item":
        return others, Judging(aside, "pair")
    count = int(max(rows.first.max(), rows.second.max())) + 1
    new = np.array([stable_hash(f"new item|{i}") % 100 < NEW_ITEMS for i in range(count)])
    fitted = others[~new[rows.first[others]] & ~new[rows.second[others]]]
    for part, judging, least in ((fitted, Judging(aside, new), ENOUGH), (others, Judging(aside, "item"), FEWEST)):
        if len(np.unique(rows.user[part])) >= FEWEST and _askable(judging) >= least:
            return part, judging
    return others, Judging(aside, "pair")


def far_judges(
    rows: Rows, held: np.ndarray, near: Judging, pooled: Pooled, known: Bool[np.ndarray, " items"] | None = None
) -> tuple[np.ndarray, Judging, Bool[np.ndarray, " rows"]] | None:  # fmt: skip
    """Rows to train another family on, users to judge by who show and are asked about what it has not met, and which
    rows are of that.

    Those are `far_items` and users without another row; where these are fewer than `ENOUGH`, users that are held out
    from the other rows too. None where that is not enough either, and where a tenth of the rows that `near` shows have
    an item that is not `known`: what is judged near is then said of unknown items already.
    """
    usable = usable_rows(rows)
    strange = far_items(rows, usable)[rows.first]
    if not strange.any() or not _shows_known(near, known):
        return None
    for part in (usable & ~strange, usable & ~strange & ~np.isin(rows.user, held)):
        unseen = take(rows, np.flatnonzero(usable & strange & ~np.isin(rows.user, rows.user[part])))
        far = Judging(unseen, "item" if pooled.cross_fit == "item" else "pair")
        if len(np.unique(rows.user[part])) >= FEWEST and _askable(far) >= ENOUGH:
            return np.flatnonzero(part), far, strange
    return None


def usable_rows(rows: Rows) -> Bool[np.ndarray, " rows"]:
    return (np.asarray(rows.user) >= 0) & (np.asarray(rows.weight) > 0)


def _shows_known(near: Judging, known: np.ndarray | None) -> bool:
    """Whether nine in ten of the rows that can be shown are of two items that are known."""
    sides = np.stack([near.rows.first, near.rows.second])
    shown = sides if isinstance(near.asked, str) else sides[:, ~near.asked[sides].any(axis=0)]
    return known is None or bool(10 * known[shown].all(axis=0).sum() >= 9 * max(shown.shape[1], 1))


def far_items(rows: Rows, usable: Bool[np.ndarray, " rows"]) -> Bool[np.ndarray, " items"]:
    """Items of groups to keep from the family: none is linked to an item of another group by comparisons.

    Groups are taken in the order of a hash, until they are two or more and have the first of `FAR` per cent of the
    rows; none that would make it more than the second. One alone is none: it says little of another.
    """
    count = int(max(rows.first.max(initial=-1), rows.second.max(initial=-1))) + 1
    first, second = np.asarray(rows.first)[usable], np.asarray(rows.second)[usable]
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    groups, group = connected_components(links, directed=False)
    size = 100 * np.bincount(group[first], minlength=groups) / max(len(first), 1)
    _, least = np.unique(group, return_index=True)  # the first item of a group names it
    taken: list[int] = []
    taken_size = 0.0
    for name in sorted(np.flatnonzero(size), key=lambda name: stable_hash(f"far|{least[name]}")):
        if (taken_size < FAR[0] or len(taken) < 2) and taken_size + size[name] <= FAR[1]:
            taken.append(int(name))
            taken_size += size[name]
    return np.isin(group, taken) & (len(taken) > 1)


def _askable(judging: Judging) -> int:
    """How many users have a question where shots and questions are kept apart so."""
    _, query = episode_indices(np.random.default_rng(0), judging.rows, SHOTS, SHOTS, exactly=True, apart=judging.asked)
    return int((query >= 0).any(axis=1).sum())


def held_out(known: np.ndarray) -> np.ndarray:
    """Users to judge by: `HELD_OUT` per cent, but `MOST_HELD` at most; of few users a third, up to `FEW`.

    None where fewer than `FEWEST` would judge, or be left to train on.
    """
    if len(known) < 2 * FEWEST:
        return known[:0]
    place = np.array([stable_hash(f"held out|{u}") % 100 for u in known])
    held = known[place < HELD_OUT]
    least = max(FEWEST, min(FEW, len(known) // 3))
    if not least <= len(held) <= len(known) - FEWEST:
        held = known[np.argsort(place, kind="stable")[:least]]
    return np.sort(np.random.default_rng(0).permutation(held)[:MOST_HELD])
