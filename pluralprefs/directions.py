"""In which directions users differ: those of users whom a family has inferred, and those of the responses' features.

    d = A' [f(v_1) .. f(v_V), e]        of a response with features e; f(v) are its rewards for users v of the training

`Residual` leaves open what lies in these directions. What a family has learned of how people differ is not all: whom it
does not move differs too, in what the features say. So the principal directions of both together are taken, over
comparisons of the training; `mix` is the features' part of the variance (`spread.mixed` chooses it), and by all of them
users differ by 1 log-odds.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pluralprefs.fitting import Rows, at, step_up, take
from pluralprefs.models.residual import DIRECTIONS, OTHERS, Residual
from pluralprefs.types import Item

ASKED = 2000  # rows by which it is known how users differ
LEAST = 0.01  # of log-odds: users who differ less differ by chance


class Axes(NamedTuple):
    """Combinations of rewards or of features, and what some comparisons have of each: 1 of all on average."""

    axes: Float[np.ndarray, "size directions"]
    apart: Float[np.ndarray, "rows directions"]
    unit: float


class Ways(NamedTuple):
    """How users may differ: as users of the training do, and by the features."""

    rewards: Axes
    features: Axes


def ways(model: Residual, items: Item, rows: Rows, most: float = np.inf) -> Ways:
    """Of a residual, about some of `rows`. `most` bounds the unit of rewards: what little users differ is not blown
    up."""
    some = np.flatnonzero((np.asarray(rows.user) >= 0) & (np.asarray(rows.weight) > 0))
    some = take(rows, np.random.default_rng(0).permutation(some)[:ASKED])
    each = model.replace(axes=jnp.eye(OTHERS + items.embedding.shape[1]))
    found = differences(each, items, some).astype(float)
    centred = np.eye(OTHERS) - 1 / OTHERS
    return Ways(_principal(found[:, :OTHERS], centred, most), _principal(found[:, OTHERS:], None, np.inf))


def _principal(found: np.ndarray, centred: np.ndarray | None, most: float) -> Axes:
    found = found if centred is None else found @ centred
    square, axes = np.linalg.eigh(found.T @ found / max(len(found), 1))
    axes = axes[:, -DIRECTIONS:] if centred is None else centred @ axes[:, -DIRECTIONS:]
    usual = np.sqrt(max(square[-DIRECTIONS:].sum(), 0.0))
    unit = min(np.sqrt(OTHERS) / usual, most) if usual > LEAST * np.sqrt(OTHERS) else 0.0
    axes = axes * unit / np.sqrt(OTHERS)
    return Axes(axes, found @ axes, unit)


def directed(model: Residual, found: Ways, mix: float) -> Residual:
    """The residual with the principal directions of a mix: the features' part of the variance, in [0, 1]."""
    parts = (np.sqrt(1 - mix), found.rewards), (np.sqrt(mix), found.features)
    apart = np.concatenate([share * part.apart for share, part in parts], axis=1)
    square, axes = np.linalg.eigh(apart.T @ apart / max(len(apart), 1))
    kept = square[-DIRECTIONS:].sum()
    axes = axes[:, -DIRECTIONS:] * np.sqrt(square.sum() / kept if kept > 0 else 0.0)
    above, below = np.split(axes, [found.rewards.axes.shape[1]])
    both = [share * part.axes @ own for (share, part), own in zip(parts, (above, below), strict=True)]
    return model.replace(axes=jnp.asarray(np.concatenate(both), jnp.float32))


def differences(model: Residual, items: Item, rows: Rows) -> Float[np.ndarray, "rows directions"]:
    """How users differ about the log-odds of `rows`: `left_open` of a stranger whose spread is 1."""
    sides = np.stack([rows.first, rows.second])
    met, place = np.unique(sides, return_inverse=True)
    index = np.pad(met, (0, step_up(len(met)) - len(met)))  # few shapes to compile
    found, (first, second) = np.asarray(_directions(model, items, index)), place.reshape(sides.shape)
    return found[first] - found[second]


@jax.jit
def _directions(model: Residual, items: Item, index: Int[Array, " items"]) -> Float[Array, "items directions"]:
    return jax.lax.map(lambda one: model.directions(at(items, one)), index, batch_size=1024)
