"""Predictions of a fitted model on every cell: seen users, shot curves of unseen users, and the controls.

A prediction is one row of one comparison: log-odds moderated by the posterior's variance, and its standard deviation.
Every metric is computed from these rows (`metrics.summarise`), so that they are what a run keeps. Controls:
"wrong_user" scores a user's comparisons with another user's posterior; "label_flip" reverses the labels of the
support; "no_attributes" takes the attributes of all items away, where there are any (seen users).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import polars as pl

from pluralprefs.adapt import laplace_user
from pluralprefs.adapting import adapt_and_predict, predict_seen
from pluralprefs.baselines import prediction_rows
from pluralprefs.fitting import Fitted, Rows, take
from pluralprefs.hosts import gathered, own_units
from pluralprefs.types import Item, UserPosterior

SEEN = ("seen/testpair", "seen/newprompt")
UNSEEN = ("unseen/testpair", "unseen/newprompt")
Adapter = Callable[..., UserPosterior]


def evaluate(
    fitted: Fitted,
    items: Item,
    table: pl.DataFrame,
    rows: Rows,
    draws: pl.DataFrame,
    *,
    model: str,
    seed: int = 0,
    shots: Sequence[int] = (0, 2, 4, 8, 16, 32),
    adapter: Adapter = laplace_user,
    controls: bool = True,
) -> pl.DataFrame:
    """Predict every test cell of `table`, whose index rows are `rows`, in the same order.

    `draws` lists the support of unseen users (`splits.support_draws`): the first n positions are the n shots.
    """
    parts = []
    cell = table["cell"].to_numpy()
    for name in SEEN:
        index = np.flatnonzero(cell == name)
        if len(index):
            parts.append(_seen(fitted, items, table, rows, index, model, seed, None))
            if controls and items.attributes is not None:
                without = items.replace(attribute_mask=jnp.zeros(items.attributes.shape[:-1], bool))
                parts.append(_seen(fitted, without, table, rows, index, model, seed, "no_attributes"))
            if controls and len(np.unique(rows.user[index])) > 1:
                parts.append(_seen(fitted, items, table, rows, index, model, seed, "wrong_user"))
    position = {name: i for i, name in enumerate(table["example_id"])}
    for name in UNSEEN:
        drawn = draws.filter(pl.col("cell") == name)
        index = np.flatnonzero(cell == name)
        if not len(index):
            continue
        curve = _Curve(fitted, items, table, rows, index, drawn, position, adapter)
        most = max(shots)
        for count in shots:
            parts.append(curve(count, model, seed, None))
        if controls and most:
            parts.extend(curve(most, model, seed, control) for control in ("wrong_user", "label_flip"))
    return pl.concat(parts) if parts else prediction_rows(table.head(0), np.zeros(0), model, seed=seed)


def moderated_rows(
    table: pl.DataFrame, mean: np.ndarray, variance: np.ndarray, model: str, **columns: object
) -> pl.DataFrame:
    """Prediction rows with log-odds of the predictive probability, mean / sqrt(1 + pi variance / 8)."""
    table = table.with_columns(pl.Series("log_odds_std", np.sqrt(variance)))
    return prediction_rows(table, mean / np.sqrt(1 + np.pi * variance / 8), model, **columns)


def _seen(
    fitted: Fitted, items: Item, table: pl.DataFrame, rows: Rows, index: np.ndarray, model: str, seed: int,
    control: str | None,
) -> pl.DataFrame:  # fmt: skip
    query = take(rows, index)
    if control == "wrong_user":
        query = query.replace(user=_shifted(query.user))
    mean, variance = _by_all(np.abs(query.user), lambda own: predict_seen(fitted, items, take(query, own)))
    return moderated_rows(table[index], mean, variance, model, seed=seed, control=control)


def _by_all(unit: np.ndarray, predict: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each row, each process for the units that are its own."""
    own = own_units(unit)
    found = np.stack(predict(own), axis=1) if len(own) else np.zeros((0, 2))
    mean, variance = gathered(found, own, len(unit)).T
    return mean, variance


def _shifted(user: np.ndarray) -> np.ndarray:
    """Replace every user by the next one that occurs; unknown users stay unknown."""
    present = np.unique(user[user >= 0])
    following = np.roll(present, -1)
    place = np.searchsorted(present, np.maximum(user, 0)).clip(max=max(len(present) - 1, 0))
    return np.where(user >= 0, following[place], -1).astype(user.dtype)


class _Curve:
    """The shot curve of one cell: every user with every draw is one unit to adapt."""

    def __init__(
        self, fitted: Fitted, items: Item, table: pl.DataFrame, rows: Rows, index: np.ndarray, drawn: pl.DataFrame,
        position: dict[str, int], adapter: Adapter,
    ) -> None:  # fmt: skip
        self.fitted, self.items, self.table, self.rows, self.adapter = fitted, items, table, rows, adapter
        self.index, self.drawn = index, drawn
        self.support = np.array([position[name] for name in drawn["example_id"]], int)
        names = table["user_id"].to_numpy()[index]
        self.users, self.query_user = np.unique(names, return_inverse=True)
        self.draws = max(1, int(drawn["draw"].max() or 0) + 1) if drawn.height else 1  # type: ignore[arg-type]
        place = {name: i for i, name in enumerate(self.users)}
        self.support_user = np.array([place.get(name, -1) for name in drawn["user_id"]], int)

    def __call__(self, count: int, model: str, seed: int, control: str | None) -> pl.DataFrame:
        draws = self.draws if count else 1
        chosen = (self.drawn["position"].to_numpy() < count) & (self.support_user >= 0)
        support = take(self.rows, self.support[chosen])
        weight = (support.weight * self.fitted.notes.get("temper", 1.0)).astype(np.float32)
        target = 1.0 - support.target if control == "label_flip" else support.target
        support = support.replace(weight=weight, target=target.astype(np.float32))
        unit = self.support_user[chosen] * draws + self.drawn["draw"].to_numpy()[chosen]
        user = (self.query_user + 1) % len(self.users) if control == "wrong_user" else self.query_user
        which = np.tile(np.arange(len(self.index)), draws)
        draw = np.repeat(np.arange(draws), len(self.index))
        asked, query = user[which] * draws + draw, take(self.rows, self.index[which])

        def predict(own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            shown = np.isin(unit, asked[own])
            return adapt_and_predict(
                self.fitted.model, self.fitted.users, self.items, take(support, shown), unit[shown],
                take(query, own), asked[own], adapter=self.adapter,
            )  # fmt: skip

        mean, variance = _by_all(asked, predict)
        parts = []
        for number in range(draws):
            part = draw == number
            parts.append(moderated_rows(self.table[self.index], mean[part], variance[part], model, seed=seed,
                                        shots=count, draw=number, control=control))  # fmt: skip
        return pl.concat(parts)
