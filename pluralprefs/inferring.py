"""Fit families that infer a user from shots (`InfersUser`): episodes of training users, judged on users held out.

    population (Newton, out of fold) -> family, trained by episodes on top of it -> trust, by users held out

A fifth of the training users is held out first. They choose the number of epochs, and then `Residual`'s scalars
(`trust`): how much of the inferred shift to trust at each number of shots, what it leaves open, and whether more shots
than an episode has are to be used as they are. The family is then trained again on all users for as many epochs. A
held-out user is judged out of fold twice: the family has not seen the user, nor the population the pair. Where one
user's pairs are not independent (`cross_fit` "item") neither has seen the responses, as long as users have enough.

What shots of responses that training does not know say is trusted apart: a fifth of the comparisons is kept from
another family and population, by all users, where they fall into groups of responses that were never compared with
those of another group (the conversations of polis, the sides of ukpconvarg1). Users whom that family has not seen show
and are asked about these. All shots are trusted alike where there are no such groups, or too few users to judge there,
or where held-out users too show what training does not know: responses that were judged once, or beyond the most that
have an effect.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pluralprefs.adapting import adapt_units
from pluralprefs.data.episodes import episode_epoch, episode_indices
from pluralprefs.directions import directed, ways
from pluralprefs.fitting import Fitted, Rows, gathered, padded, row_log_odds, strangers, take
from pluralprefs.hosts import everywhere
from pluralprefs.judging import SHOTS, Apart, Judging, far_judges, held_out, judges
from pluralprefs.models.residual import OTHERS, Residual
from pluralprefs.models.variational import Variational, active_units
from pluralprefs.pooling import Base, folds_by
from pluralprefs.spread import mixed
from pluralprefs.train import episode_loss, episode_nats, init_state, make_epoch_step, make_train_step
from pluralprefs.training import Report, Training, staying
from pluralprefs.trust import prior_table, trusted
from pluralprefs.types import Episode, Item, Params, Reduction
from pluralprefs.users import Pooled

UNITS = 3.0  # at most: of the family that serves, in those of the family that was judged


def fit_inferred(
    model: Residual,
    items: Item,
    rows: Rows,
    pooled: Pooled,
    *,
    population: Base,
    users: int,
    communities: int,
    likelihood: Any,
    reduction: Reduction,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    seed: int,
    notes: dict[str, Any],
    report: Report | None = None,
    checkpoints: Path | None = None,
) -> Fitted:
    """Fit the population, the family and its trust to `rows`, and infer the table's users from them.

    population(mask) gives a linear family and its fitted state, as `pooling.population_by_newton` does. With no level
    "user", or too few users to hold any out, the population is all there is. Raises ValueError for levels that the
    family cannot have, and for a `temper`, `parts`, `covariance` or learned `residual`, which would change nothing.
    """
    if "community" in pooled.levels:
        raise ValueError(f"{type(model.family).__name__} infers users and has no community level: set users.levels to "
                         '["user"]')  # fmt: skip
    default = Pooled()
    for name in ("temper", "temper_by", "parts", "covariance"):  # what only users that are fitted have
        if getattr(pooled, name) != getattr(default, name):
            raise ValueError(f"{type(model.family).__name__} infers users, which users.{name} does not change: leave "
                             "it out")  # fmt: skip
    if pooled.residual is True:
        raise ValueError(f"{type(model.family).__name__} infers users, which users.residual = true does not change: "
                         "give a number")  # fmt: skip
    base, table = population(None)
    model = model.replace(population=base, weights=table.population)
    judged = rows.replace(offset=out_of_fold(population, items, rows, pooled))
    known = np.unique(np.asarray(rows.user)[(np.asarray(rows.user) >= 0) & (np.asarray(rows.weight) > 0)])
    held = held_out(known)
    if "user" in pooled.levels and len(held):
        train = partial(_train, items=items, likelihood=likelihood, reduction=reduction, optimizer=optimizer,
                        batch_size=batch_size, seed=seed, report=report,
                        apart="item" if pooled.cross_fit == "item" else "pair")  # fmt: skip
        part, near = judges(judged, held, pooled)
        shown = take(judged, part)
        chosen, done = train(model.family, shown, epochs=epochs, held=near, notes=notes,
                             folder=checkpoints and checkpoints / "held-out")  # fmt: skip
        model, dependent = settled(model, chosen, items, shown), pooled.cross_fit == "item"
        differ = ways(model, items, shown)
        notes["mix"] = mix = mixed(model, differ, items, judged, dependent)
        met = None if items.index is None else np.asarray(items.index) >= 0
        away = far_judges(judged, held, near, pooled, met)
        if away is not None:
            part, far, strange = away
            offset = row_log_odds(*population(~strange), items, strangers(far.rows)).astype(np.float32)
            far = far._replace(rows=far.rows.replace(offset=offset))
            others = take(judged, part)
            stranger, _ = train(model.family, others, epochs=done, folder=checkpoints and checkpoints / "far")
            stranger = settled(model, stranger, items, others)
            away = directed(stranger, ways(stranger, items, others), mix), far
        model = trusted(directed(model, differ, mix), items, notes, judged, near, away, dependent=dependent)
        family, _ = train(model.family, judged, epochs=done, folder=checkpoints and checkpoints / "all")
        model = settled(model, family, items, judged)
        model = directed(model, ways(model, items, judged, UNITS * differ.rewards.unit), mix)
    return _table(model, items, rows, pooled, users, communities, notes)


def out_of_fold(population: Base, items: Item, rows: Rows, pooled: Pooled) -> np.ndarray:
    """Log-odds of the population for each row, from fits that did not see its pair: [rows], float32."""
    if not pooled.cross_fit:
        return row_log_odds(*population(None), items, strangers(rows)).astype(np.float32)
    found = np.zeros(len(rows.target), np.float32)
    for fold in folds_by(pooled.cross_fit, rows, pooled.folds):
        found[fold.predict] = row_log_odds(*population(fold.fit), items, strangers(take(rows, fold.predict)))
    return found


def settled(model: Residual, family: Any, items: Item, rows: Rows) -> Residual:
    """The residual with a trained family, the prior user that it infers from no shots, and some of the users of `rows`,
    each from as many shots as an episode has."""
    user = np.where(np.asarray(rows.weight) > 0, np.asarray(rows.user), -1)
    known = np.random.default_rng(0).permutation(np.unique(user[user >= 0]))
    lines = np.full((OTHERS + 1, SHOTS), -1)  # the last has shown nothing
    for line, one in zip(lines, np.resize(known, OTHERS if len(known) else 0), strict=False):
        own = np.random.default_rng(one).permutation(np.flatnonzero(user == one))[:SHOTS]
        line[: len(own)] = own
    found = jax.jit(jax.vmap(family.infer_user))(gathered(items, padded(rows, lines))).mean
    return model.replace(family=family, prior=take(found, -1), others=take(found, slice(OTHERS)))


def _train(
    family: Any, rows: Rows, *, items: Item, likelihood: Any, reduction: Reduction,
    optimizer: optax.GradientTransformation, epochs: int, batch_size: int, seed: int, report: Report | None,
    folder: Path | None, apart: str, held: Judging | None = None, notes: dict[str, Any] | None = None,
) -> tuple[Any, int]:  # fmt: skip
    """Train on episodes and return the family and the epochs that it took: those that serve `held` users best."""

    def batch(number: int, rows: Rows) -> tuple[Episode[Any], np.ndarray]:
        episodes = episode_epoch(seed, number, rows, batch_size, shots=SHOTS, apart=apart)
        steps = len(episodes.query.weight)
        return everywhere((episodes, ((number + np.arange(steps) / steps) / epochs).astype(np.float32)))

    nats = None if held is None else partial(_held_out_nats, items, held_episodes(*held))
    epoch = make_epoch_step(make_train_step(episode_loss(reduction=reduction), optimizer))
    step = staying(epoch)
    state = init_state(Params(family, (), likelihood), optimizer, jax.random.key(seed))
    [best] = Training(step, items, batch, nats, (epochs,), (report,))([state], rows, folder)
    if notes is not None:
        notes.update(epochs=best.epochs, epochs_validation_nll=best.nats)
    return best.params.model, best.epochs or epochs


def held_episodes(rows: Rows, asked: Apart = "pair", counts: tuple[int, ...] = (0, 2, 8, SHOTS)) -> Episode[Any]:
    """Fixed episodes of the users of `rows` with each number of shots: [episodes, shots | queries] index rows."""
    parts = []
    for number, count in enumerate(counts):
        support, query = episode_indices(np.random.default_rng(number), rows, SHOTS, SHOTS, exactly=True, apart=asked)
        parts.append((np.where(np.arange(SHOTS) < count, support, -1), query))
    support, query = (np.concatenate(side) for side in zip(*parts, strict=True))
    return Episode(support=padded(rows, support), query=padded(rows, query))


@jax.jit
def _episode_nats(params: Params, items: Item, episodes: Episode[Any]) -> Float[Array, ""]:
    shown = Episode(*(gathered(items, part) for part in (episodes.support, episodes.query)))
    users = jax.vmap(params.model.infer_user)(shown.support).mean
    weight = episodes.query.weight
    return jnp.sum(weight * episode_nats(params, shown, users)) / jnp.sum(weight)


def _held_out_nats(items: Item, episodes: Episode[Any], params: Params) -> float:
    return float(_episode_nats(params, items, episodes))


def _table(
    model: Residual, items: Item, rows: Rows, pooled: Pooled, users: int, communities: int, notes: dict[str, Any]
) -> Fitted:
    """The whole table, its users inferred from their training rows."""
    table = prior_table(model, users=users, communities=communities)
    table = table.replace(residual=jnp.float32(0.0 if pooled.residual is True else pooled.residual))
    place = np.flatnonzero(np.asarray(rows.user) >= 0)
    found = adapt_units(model, table, items, take(rows, place), np.asarray(rows.user)[place])
    if found:
        index = np.array(list(found))
        means = jax.tree.map(lambda *leaves: np.stack(leaves), *(posterior.mean for posterior in found.values()))
        table = table.replace(user=jax.tree.map(lambda all_, x: all_.at[index].set(x), table.user, means))
        if isinstance(model.family, Variational):
            notes["active_units"] = active_units(means.state["state"])
    return Fitted(model, table, rows, notes)
