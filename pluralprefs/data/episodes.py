"""Episodes: some comparisons of a user as shots, others of the same user as questions, drawn anew in every epoch.

An epoch is a pure function of (seed, number): each pass over the users shuffles the rows of each, shows the first n of
them, n uniform from 0 to `shots`, and asks the next `queries`. A pair that is among the shots is never asked, whichever
of its responses comes first. Passes are as many as ask about as many rows as there are, or less where users have few.

Where pairs are made of one user's votes, a question that shares a response with a shot is half answered by it. With
`apart` "item" each pass parts the responses of each user at random, a part between one half and nine tenths to be
shown, and shots and questions have no response in common: what is learned is what shots say of new responses. An array
instead says which responses are asked about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pluralprefs.data.batches import steps_per_epoch, take_rows
from pluralprefs.types import Comparisons, Episode

USERS_AT_ONCE = 4096
APART = (0.5, 0.9)  # share of a user's responses that are shown, drawn between these; of pairs (1 - share)^2 are asked
ASKED = 0.1  # of the rows in a pass, the mean of that


def episode_epoch(
    seed: int, number: int, rows: Comparisons[Any], batch_size: int, *, shots: int = 32, queries: int = 32,
    apart: str = "pair",
) -> Episode[Any]:  # fmt: skip
    """Lay out epoch `number` as index episodes: support [steps, users, shots] and query [steps, users, queries].

    `rows` are numpy index rows; those of unknown users or of weight 0 are left out, and so is who has no row. A step
    asks about `batch_size` rows where users have enough of them. What is missing is padding of weight 0. `apart` is
    what shots and questions must not share, "pair" or "item". Raises ValueError where no user has a row.
    """
    draw = np.random.default_rng([seed, number])
    users = len(np.unique(np.asarray(rows.user)[_usable(rows)]))
    if not users:
        raise ValueError("no row of a known user to make an episode of: give user_id to the training rows")
    count = int(_usable(rows).sum())
    asked = queries if apart == "pair" else min(queries, max(1, round(ASKED * count / users)))
    passes = max(1, round(count / (users * asked)))
    found = [episode_indices(draw, rows, shots, queries, apart=apart) for _ in range(passes)]
    at_once = min(max(1, batch_size // asked), passes * users)
    steps = steps_per_epoch(passes * users, at_once)

    def laid_out(parts: list[np.ndarray]) -> np.ndarray:
        lines = np.concatenate(parts)
        padding = np.full((steps * at_once - len(lines), lines.shape[1]), -1)
        return np.concatenate([lines, padding]).reshape(steps, at_once, -1)

    support, query = (laid_out([pass_[side] for pass_ in found]) for side in (0, 1))
    return Episode(support=take_rows(rows, support), query=take_rows(rows, query))


def episode_indices(
    draw: np.random.Generator, rows: Comparisons[Any], shots: int, queries: int, *, exactly: bool = False,
    apart: str | Bool[np.ndarray, " items"] = "pair",
) -> tuple[Int[np.ndarray, "users shots"], Int[np.ndarray, "users queries"]]:  # fmt: skip
    """Rows of one pass, one line a user in random order, -1 where there is none.

    With `exactly` every user shows `shots` rows, but keeps a quarter to ask about (apart "item": of the responses);
    else a number drawn for each. The first n of a line's shots are a shuffle's first n. Raises ValueError unless
    `apart` is "pair", "item" or an array, true for the responses that are asked about.
    """
    if isinstance(apart, str) and apart not in ("pair", "item"):
        raise ValueError(f"apart is 'pair' or 'item', not {apart!r}")
    order = draw.permutation(np.flatnonzero(_usable(rows)))
    order = order[np.argsort(np.asarray(rows.user)[order], kind="stable")]
    _, start, count = np.unique(np.asarray(rows.user)[order], return_index=True, return_counts=True)
    if not isinstance(apart, str) or apart == "item":
        asked = None if isinstance(apart, str) else apart
        support, query = _items_apart(draw, rows, order, start, count, shots, queries, exactly, asked)
        if not exactly:
            support = np.where(np.arange(shots) < draw.integers(0, shots + 1, len(start))[:, None], support, -1)
    else:
        number = shots if exactly else draw.integers(0, shots + 1, len(start))
        given = np.minimum(number, count - np.maximum(count // 4, 1) if exactly else count - 1)
        support = _lines(order, start, given, shots)
        query = _lines(order, start + given, np.minimum(count - given, queries), queries)
        pair = _pairs(rows)
        for cut in range(0, len(start), USERS_AT_ONCE):
            part = slice(cut, cut + USERS_AT_ONCE)
            shown = np.where(support[part] >= 0, pair[support[part]], -1)
            twice = (pair[query[part]][:, :, None] == shown[:, None, :]).any(axis=2)
            query[part] = np.where(twice, -1, query[part])
    mixed = draw.permutation(len(start))
    return support[mixed], query[mixed]


def _items_apart(
    draw: np.random.Generator, rows: Comparisons[Any], order: np.ndarray, start: np.ndarray, count: np.ndarray,
    shots: int, queries: int, exactly: bool, asked: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Part each user's responses, and return rows of two that are shown and rows of two that are asked about."""
    if not len(order):
        return np.full((0, shots), -1), np.full((0, queries), -1)
    line = np.repeat(np.arange(len(start)), count)
    sides = np.concatenate([np.asarray(rows.first)[order], np.asarray(rows.second)[order]]).astype(np.int64)
    width = int(sides.max()) + 1
    items, place = np.unique(np.tile(line, 2) * width + sides, return_inverse=True)
    owner = items // width
    shuffled = np.lexsort((draw.random(len(items)), owner))  # items are sorted by owner, so ranks count from its first
    rank = np.empty(len(items), np.int64)
    rank[shuffled] = np.arange(len(items))
    first, many = np.searchsorted(owner, np.arange(len(start))), np.bincount(owner, minlength=len(start))
    share = np.full(len(start), 0.75) if exactly else draw.uniform(*APART, len(start))
    shown = rank - first[owner] < np.round(share * many)[owner] if asked is None else ~asked[items % width]
    shown = shown[place]
    both = shown.reshape(2, -1).sum(axis=0)  # of a row's two responses

    def lines(wanted: int, size: int) -> np.ndarray:
        kept = both == wanted
        number = np.bincount(line[kept], minlength=len(start))
        begin = np.concatenate([[0], np.cumsum(number)[:-1]])
        return _lines(order[kept] if kept.any() else order, begin, np.minimum(number, size), size)

    return lines(2, shots), lines(0, queries)


def _usable(rows: Comparisons[Any]) -> np.ndarray:
    return (np.asarray(rows.user) >= 0) & (np.asarray(rows.weight) > 0)


def _lines(order: np.ndarray, start: np.ndarray, count: np.ndarray, width: int) -> np.ndarray:
    place = np.arange(width)[None, :]
    rows = order[np.minimum(start[:, None] + place, len(order) - 1)]
    return np.where(place < count[:, None], rows, -1)


def _pairs(rows: Comparisons[Any]) -> np.ndarray:
    """A number for each row's pair of responses, the same in either order."""
    sides = np.sort(np.stack([rows.first, rows.second]), axis=0)
    return np.unique(sides, axis=1, return_inverse=True)[1].reshape(-1)
