"""Fit families that infer a user from shots (`InfersUser`): episodes of training users, judged on users held out.

    population (Newton, out of fold) -> family, trained by episodes on top of it -> trust, by users held out

A fifth of the training users is held out first. They choose the number of epochs, and then `Residual`'s scalars: how
much of the inferred shift to trust at each number of shots, and whether more shots than an episode has are to be used
as they are. The family is then trained again on all users for as many epochs. A held-out user is judged out of fold
twice: the family has not seen the user, nor the population the pair. Where one user's pairs are not independent
(`cross_fit` "item") neither has seen the responses, as long as users have enough of them.

What shots of responses that training does not know say is trusted apart: a fifth of the comparisons is kept from
another family and population, by all users, where they fall into groups of responses that were never compared with
those of another group (the conversations of polis, the sides of ukpconvarg1). Users whom that family has not seen show
and are asked about these. All shots are trusted alike where there are no such groups, or too few users to judge there,
or where held-out users too show what training does not know: responses that were judged once, or beyond the most that
have an effect.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from scipy.optimize import minimize_scalar
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pluralprefs.adapting import adapt_and_predict, adapt_units
from pluralprefs.data.episodes import episode_epoch, episode_indices
from pluralprefs.fitting import Fitted, Rows, gathered, padded, row_log_odds, strangers, take
from pluralprefs.hosts import everywhere
from pluralprefs.models.residual import Residual
from pluralprefs.pooling import Base, folds_by, validation_nats
from pluralprefs.train import episode_loss, episode_nats, init_state, make_epoch_step, make_train_step
from pluralprefs.training import Report, Training, staying
from pluralprefs.types import Episode, Item, Params, Reduction
from pluralprefs.users import Pooled, Users

SHOTS = 32  # of an episode, at most
KNOTS = (0, 1, 2, 4, 8, 16, 32, 64)  # numbers of shots at which trust is learned; the last stands for all there are
MANY = 512  # shots that are tried where users have more than an episode shows
DRAWS = 5  # of shots for each held-out user
HELD_OUT = 20  # per cent of the training users
NEW_ITEMS = 30  # per cent of the items, where they are kept apart
FAR = (20, 35)  # per cent of the rows, between which groups of responses are kept from the family
ENOUGH = 20  # users who have shown a number of shots, to learn how far it is to be trusted
FEWEST = 2  # users to judge by; where there are fewer nothing is trusted

Apart = str | Bool[np.ndarray, " items"]  # what shots and questions do not share (`episode_indices`)


class Judging(NamedTuple):
    """Rows of users whom the family has not seen, and what of those is asked about."""

    rows: Rows
    asked: Apart


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
    for name in ("temper", "parts", "covariance"):  # what only users that are fitted have
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
        chosen, done = train(model.family, take(judged, part), epochs=epochs, held=near, notes=notes,
                             folder=checkpoints and checkpoints / "held-out")  # fmt: skip
        met = None if items.index is None else np.asarray(items.index) >= 0
        away = far_judges(judged, held, near, pooled, met)
        if away is not None:
            part, far, strange = away
            offset = row_log_odds(*population(~strange), items, strangers(far.rows)).astype(np.float32)
            far = far._replace(rows=far.rows.replace(offset=offset))
            stranger, _ = train(model.family, take(judged, part), epochs=done,
                                folder=checkpoints and checkpoints / "far")  # fmt: skip
            away = settled(model, stranger, items, rows), far
        model = trusted(settled(model, chosen, items, rows), items, notes, near, away)
        family, _ = train(model.family, judged, epochs=done, folder=checkpoints and checkpoints / "all")
        model = settled(model, family, items, rows)
    return _table(model, items, rows, pooled, users, communities, notes)


def judges(rows: Rows, held: np.ndarray, pooled: Pooled) -> tuple[np.ndarray, Judging]:
    """Rows to train on, and users to judge by.

    Where items are kept apart, `NEW_ITEMS` per cent of the items are held out too: held-out users show the others, and
    are asked about items that the family has not seen, as it will be. That leaves about half of the rows to train on
    and half of a user's rows to show. Where fewer than `FEWEST` users could be asked so, items are parted anew for each
    user, and where that fails too, only pairs are kept apart.
    """
    usable = _usable(rows)
    apart = np.isin(np.asarray(rows.user), held)
    others, aside = np.flatnonzero(usable & ~apart), take(rows, np.flatnonzero(usable & apart))
    if pooled.cross_fit != "item":
        return others, Judging(aside, "pair")
    new = np.array(
        [_hash(f"new item|{i}") % 100 < NEW_ITEMS for i in range(int(max(rows.first.max(), rows.second.max())) + 1)]
    )
    fitted = others[~new[rows.first[others]] & ~new[rows.second[others]]]
    for part, judging in ((fitted, Judging(aside, new)), (others, Judging(aside, "item"))):
        if len(np.unique(rows.user[part])) >= FEWEST <= _askable(judging):
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
    usable = _usable(rows)
    strange = far_items(rows, usable)[rows.first]
    if not strange.any() or not _shows_known(near, known):
        return None
    for part in (usable & ~strange, usable & ~strange & ~np.isin(rows.user, held)):
        unseen = take(rows, np.flatnonzero(usable & strange & ~np.isin(rows.user, rows.user[part])))
        far = Judging(unseen, "item" if pooled.cross_fit == "item" else "pair")
        if len(np.unique(rows.user[part])) >= FEWEST and _askable(far) >= ENOUGH:
            return np.flatnonzero(part), far, strange
    return None


def _usable(rows: Rows) -> Bool[np.ndarray, " rows"]:
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
    for name in sorted(np.flatnonzero(size), key=lambda name: _hash(f"far|{least[name]}")):
        if (taken_size < FAR[0] or len(taken) < 2) and taken_size + size[name] <= FAR[1]:
            taken.append(int(name))
            taken_size += size[name]
    return np.isin(group, taken) & (len(taken) > 1)


def _askable(judging: Judging) -> int:
    """How many users have a question where shots and questions are kept apart so."""
    _, query = episode_indices(np.random.default_rng(0), judging.rows, SHOTS, SHOTS, exactly=True, apart=judging.asked)
    return int((query >= 0).any(axis=1).sum())


def held_out(known: np.ndarray) -> np.ndarray:
    """Users to judge by: `HELD_OUT` per cent, but at least `FEWEST`, as are left to train on; else none."""
    held = np.array([int(u) for u in known if _hash(f"held out|{u}") % 100 < HELD_OUT], int)
    if not FEWEST <= len(held) <= len(known) - FEWEST:
        held = known[:FEWEST]
    return held if len(known) >= 2 * FEWEST else known[:0]


def out_of_fold(population: Base, items: Item, rows: Rows, pooled: Pooled) -> np.ndarray:
    """Log-odds of the population for each row, from fits that did not see its pair: [rows], float32."""
    if not pooled.cross_fit:
        return row_log_odds(*population(None), items, strangers(rows)).astype(np.float32)
    found = np.zeros(len(rows.target), np.float32)
    for fold in folds_by(pooled.cross_fit, rows, pooled.folds):
        found[fold.predict] = row_log_odds(*population(fold.fit), items, strangers(take(rows, fold.predict)))
    return found


def settled(model: Residual, family: Any, items: Item, rows: Rows) -> Residual:
    """The residual with a trained family and the prior user that it infers from no shots."""
    return model.replace(family=family, prior=family.infer_user(gathered(items, padded(rows, np.array([-1])))).mean)


def trusted(
    model: Residual, items: Item, notes: dict[str, Any], near: Judging, away: tuple[Residual, Judging] | None = None
) -> Residual:  # fmt: skip
    """Learn trust and most for shots of responses that training knows and (by `away`, a model and judges) of others.

    Each is what makes the moderated predictions of the rows that were not shown lose the fewest nats. A number of shots
    that few have, fewer than `ENOUGH` users and than a quarter of those who have one, teaches noise: it is trusted as
    the number before it, and more shots than that count as that many, since nobody bore out that they say more; far
    away, where few have much to show, as many count as near.
    """
    found = [_borne_out(model, items, near, notes)]
    if away is not None:
        notes["far"] = {}
        found.append(_borne_out(away[0], items, away[1], notes["far"]))
    shots, trust, most = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(found[0], found[-1], strict=True))
    return model.replace(shots=shots, trust=trust, most=jnp.maximum(most, most[0]))


def _borne_out(
    model: Residual, items: Item, judging: Judging, notes: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Numbers of shots, how far each is trusted, and the most shots that count, by the users of `judging`."""
    open_ended = model.replace(trust=jnp.ones((2, len(KNOTS))), most=jnp.full(2, 1e6),
                               shots=jnp.tile(jnp.asarray(KNOTS, jnp.float32), (2, 1)))  # fmt: skip
    rows, asked = judging
    trust, borne_out, everyone = [0.0], 0, 1
    for count in KNOTS[1:-1]:
        found = _shown(open_ended, items, judging, count, least=count)
        users = len(np.unique(found[3].user))
        everyone = max(users, 1) if count == 1 else everyone
        enough = users >= min(ENOUGH, everyone / 4)
        trust.append(_least(*found) if enough else trust[-1])
        borne_out = count if enough else borne_out
    many = min(int(np.unique(np.asarray(rows.user), return_counts=True)[1].max()), MANY)
    shown_of_many = many * (0.75 if isinstance(asked, str) and asked == "pair" else 0.5)
    most, at_all, last = float(borne_out), trust[-1], SHOTS + 1.0
    if borne_out == SHOTS < int(shown_of_many):  # some show more than an episode does
        arms = {"all": 1e6, SHOTS: float(SHOTS)}
        shown = {name: _shown(open_ended.replace(most=jnp.full(2, cap)), items, judging, many, least=SHOTS + 1)
                 for name, cap in arms.items()}  # fmt: skip
        if len(np.unique(shown["all"][3].user)) >= min(ENOUGH, everyone / 4):
            factor = {name: _least(*part) for name, part in shown.items()}
            nats = {name: validation_nats(part[2] + factor[name] * part[0], factor[name] ** 2 * part[1], part[3])
                    for name, part in shown.items()}  # fmt: skip
            best = min(nats, key=nats.__getitem__)
            most, at_all, last = arms[best], factor[best], max(last, shown_of_many)
            notes["validation_nll_of_shots"] = {str(name): value for name, value in nats.items()}
    notes["trust"] = {str(k): s for k, s in zip(KNOTS[1:-1], trust[1:], strict=True)} | {"all": at_all}
    return np.asarray([*KNOTS[:-1], last]), np.asarray([*trust, at_all]), np.asarray(most)


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


Asked = tuple[np.ndarray, np.ndarray, np.ndarray, Rows]  # mean and variance of the shift, log-odds without it, rows


def _shown(model: Residual, items: Item, judging: Judging, count: int, *, least: int) -> Asked:
    """Infer the users of `judging` from `count` shots, or all that they have, and ask about the others, `DRAWS` times.

    Users who have fewer than `least` to show are left out.
    """
    (rows, apart), given, questions = judging, [], []
    for draw in range(DRAWS):
        lines = episode_indices(np.random.default_rng(draw), rows, max(count, SHOTS), SHOTS, exactly=True, apart=apart)
        shown, query = lines[0][:, :count], lines[1]
        enough = (shown >= 0).sum(1) >= least
        given.append(shown[enough])
        questions.append(query[enough])
    support, query = np.concatenate(given), np.concatenate(questions)
    units = [np.broadcast_to(np.arange(len(part))[:, None], part.shape)[part >= 0] for part in (support, query)]
    picked = take(rows, query[query >= 0])
    alone = model.replace(weights=jax.tree.map(jnp.zeros_like, model.weights))
    asked_flat = picked.replace(offset=np.zeros_like(picked.offset))  # shots keep theirs, which are out of fold
    mean, variance = adapt_and_predict(alone, prior_table(alone), items, take(rows, support[support >= 0]), units[0],
                                       asked_flat, units[1])  # fmt: skip
    return mean, variance, np.asarray(picked.offset, float), picked


def _least(mean: np.ndarray, variance: np.ndarray, offset: np.ndarray, rows: Rows, most: float = 4.0) -> float:
    """The factor in [0, most] of a shift that loses the fewest nats on top of `offset`."""

    def nats(factor: float) -> float:
        return validation_nats(offset + factor * mean, factor**2 * variance, rows)

    found: Any = minimize_scalar(nats, bounds=(0.0, most), method="bounded")
    return float(found.x) if found.fun < nats(0.0) else 0.0


def prior_table(model: Residual, *, users: int = 0, communities: int = 0) -> Users:
    """The table of a residual, everyone at the prior user."""
    table = Users.init(model, users=users, communities=communities)
    zero = jnp.zeros_like(table.user_root)
    population = {"state": model.prior, "trust": jnp.zeros(())}
    return table.replace(population=population, user_root=zero, community_root=zero)


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
    return Fitted(model, table, rows, notes)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
