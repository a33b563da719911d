"""How far what shots say of a user is trusted, and how much they leave open: users whom the family has not seen judge.

Held-out users show shots and are asked about other comparisons of theirs; `judges` says which. At each number of shots

    trust    the factor of what the answers say (`Residual`: the odd part of the inferred shift) that loses the fewest
             nats, drawn towards 0 as far as the users disagree about it:
             trust * max(0, 1 - (standard error / trust)^2), so that noise is not trusted
    even     with it, the factor of what shots say whichever way they were answered
    spread   how far users depart from what is then predicted, in directions in which users of the training differ, as
             what the answers of one user have in common says: that of the most evidence, in log-odds
    scale    how much sharper one user is than the mean over users that a prediction is: with it the average over the
             spread says what was predicted (`scale_of`)

What no shot leaves open is how users differ, of which all users of the training tell, and held-out users need not.
These are few, and say little: trust is drawn to 0, and of the spread they tell the share that shots leave of what they
differ by themselves (`spread_of`). What shots of responses that training does not know say is judged
apart (`far_judges`); its spread is only nearly in log-odds, for how much users differ (`Residual.unit`) is known of
responses that training knows.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from pluralprefs.adapting import adapt_and_predict
from pluralprefs.data.episodes import episode_indices
from pluralprefs.fitting import Rows, at, padded, step_up, take
from pluralprefs.models.residual import Residual
from pluralprefs.pooling import validation_nats
from pluralprefs.types import Item
from pluralprefs.users import Pooled, Users

SHOTS = 32  # of an episode, at most
KNOTS = (0, 1, 2, 4, 8, 16, 32, 64)  # numbers of shots at which trust is learned; the last stands for all there are
MANY = 512  # shots that are tried where users have more than an episode shows
DRAWS = 5  # of shots for each held-out user
HELD_OUT, MOST_HELD = 20, 2000  # per cent of the training users, and the most of them
NEW_ITEMS = 30  # per cent of the items, where they are kept apart
FAR = (20, 35)  # per cent of the rows, between which groups of responses are kept from the family
ENOUGH = 20  # users who have shown a number of shots, to learn how far it is to be trusted
FEWEST = 2  # users to judge by; where there are fewer nothing is trusted
MOST_DRAWS = 300  # of users, to learn what is left open
MODE_STEPS = 12  # of Newton's method
USUAL_SCALE = 0.5  # of log(scale) beside which a spread is learned, beforehand
NO_SPREAD = -5.0  # a logarithm: a spread of next to nothing, with which questions can still be ranked
NOTHING = 1e-3  # log-odds, below which nothing is predicted
GAP = 1e-3  # of a factor, between which slopes of the loss are taken

Apart = str | Bool[np.ndarray, " items"]  # what shots and questions do not share (`episode_indices`)
Factor = float | Float[np.ndarray, " 2"]  # of the odd and the even part of a shift


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
    usable = _usable(rows)
    apart = np.isin(np.asarray(rows.user), held)
    others, aside = np.flatnonzero(usable & ~apart), take(rows, np.flatnonzero(usable & apart))
    if pooled.cross_fit != "item":
        return others, Judging(aside, "pair")
    count = int(max(rows.first.max(), rows.second.max())) + 1
    new = np.array([_hash(f"new item|{i}") % 100 < NEW_ITEMS for i in range(count)])
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
    """Users to judge by: `HELD_OUT` per cent, but `MOST_HELD` at most, and `FEWEST` at least, as are left to train on;
    else none."""
    held = np.array([int(u) for u in known if _hash(f"held out|{u}") % 100 < HELD_OUT], int)
    held = np.sort(np.random.default_rng(0).permutation(held)[:MOST_HELD])
    if not FEWEST <= len(held) <= len(known) - FEWEST:
        held = known[:FEWEST]
    return held if len(known) >= 2 * FEWEST else known[:0]


class Trust(NamedTuple):
    """What `Residual` reads at each number of shots, and the most shots that count."""

    shots: Float[np.ndarray, " knots"]
    trust: Float[np.ndarray, " knots"]
    even: Float[np.ndarray, " knots"]
    scale: Float[np.ndarray, " knots"]
    spread: Float[np.ndarray, " knots"]
    most: Float[np.ndarray, ""]


def trusted(
    model: Residual, items: Item, notes: dict[str, Any], rows: Rows, near: Judging,
    away: tuple[Residual, Judging] | None = None, *, dependent: bool = False,
) -> Residual:  # fmt: skip
    """Learn trust, even, scale, spread and most for shots of responses that training knows and (by `away`, a model and
    judges) of others.

    `rows` are those of all users of the training, with what the population says of them, out of fold, as `offset`.
    Where comparisons of a user that share a response are `dependent`, none that do tell scale and spread together.

    A number of shots that few have, fewer than `ENOUGH` users and than a quarter of those who have one, teaches noise:
    it is trusted as the number before it, and more shots than that count as that many, since nobody bore out that they
    say more; far away, where few have much to show, as many count as near.
    """
    found = [_judged(model, items, near, rows, notes, dependent)]
    if away is not None:
        notes["far"] = {}
        found.append(_judged(away[0], items, away[1], rows, notes["far"], dependent))
    learned = {name: jnp.asarray(np.stack([getattr(part, name) for part in (found[0], found[-1])]), jnp.float32)
               for name in Trust._fields}  # fmt: skip
    return model.replace(**learned | {"most": jnp.maximum(learned["most"], learned["most"][0])})


def _judged(
    model: Residual, items: Item, judging: Judging, everyone: Rows, notes: dict[str, Any], dependent: bool
) -> Trust:
    """What the users of `judging` bear out at each number of shots, and what `everyone` leaves open without any."""
    knots = jnp.tile(jnp.asarray(KNOTS, jnp.float32), (2, 1))
    one, zero = jnp.ones_like(knots), jnp.zeros_like(knots)
    open_ended = model.replace(shots=knots, trust=one, even=one, scale=one, spread=zero, most=jnp.full(2, 1e6))
    rows, asked = judging
    told = disjoint if dependent else lambda found: found
    usual = left_open(_of_nobody(open_ended, items, everyone, dependent), 0.0)
    own = spread_of(told(_shown(open_ended, items, judging, 0, least=0)), 0.0, usual[1])

    def bear_out(found: Asked) -> tuple[float, float, float, float]:
        """Trust, even, scale, spread. Held-out users tell what share of what they differ by themselves is left open."""
        factor, found = borne_out(found), told(found)
        spread = usual[1] * min(1.0, spread_of(found, factor, usual[1]) / max(own, np.exp(NO_SPREAD)))
        return float(factor[0]), float(factor[1]), scale_of(found, factor, spread), spread

    learned = [(0.0, 0.0, *usual)]
    enough_for, with_one = 0, 1
    for count in KNOTS[1:-1]:
        found = _shown(open_ended, items, judging, count, least=count)
        users = len(np.unique(found.rows.user))
        with_one = max(users, 1) if count == 1 else with_one
        if users < min(ENOUGH, with_one / 4):
            learned.append(learned[-1])
            continue
        learned.append(bear_out(found))
        enough_for = count
    many = min(int(np.unique(np.asarray(rows.user), return_counts=True)[1].max()), MANY)
    shown_of_many = many * (0.75 if isinstance(asked, str) and asked == "pair" else 0.5)
    most, at_all, last = float(enough_for), learned[-1], SHOTS + 1.0
    if enough_for == SHOTS < int(shown_of_many):  # some show more than an episode does
        arms = {"all": 1e6, SHOTS: float(SHOTS)}
        shown = {name: _shown(open_ended.replace(most=jnp.full(2, cap)), items, judging, many, least=SHOTS + 1)
                 for name, cap in arms.items()}  # fmt: skip
        if len(np.unique(shown["all"].rows.user)) >= min(ENOUGH, with_one / 4):
            nats = {name: validation_nats(predicted(part, borne_out(part)), np.zeros(1), part.rows)
                    for name, part in shown.items()}  # fmt: skip
            best = min(nats, key=nats.__getitem__)
            at_all, most, last = bear_out(shown[best]), arms[best], max(last, shown_of_many)
            notes["validation_nll_of_shots"] = {str(name): value for name, value in nats.items()}
    trust, even, scale, spread = np.array([*learned, at_all]).T
    for name, values in (("trust", trust), ("even", even), ("scale", scale), ("spread", spread)):
        notes[name] = {str(k): float(v) for k, v in zip((*KNOTS[:-1], "all"), values, strict=True)}
    return Trust(np.asarray([*KNOTS[:-1], last]), trust, even, scale, spread, np.asarray(most))


class Asked(NamedTuple):
    """Comparisons that users are asked about: the odd and the even part of the shift that shots make, log-odds without
    them, whose draw it is, and how users of the training differ about it."""

    shift: Float[np.ndarray, "asked 2"]
    offset: Float[np.ndarray, " asked"]
    rows: Rows
    unit: Int[np.ndarray, " asked"]
    apart: Float[np.ndarray, "asked others"]


def _shown(model: Residual, items: Item, judging: Judging, count: int, *, least: int) -> Asked:
    """Infer the users of `judging` from `count` shots, or all that they have, and ask about the others, `DRAWS` times.

    Users who have fewer than `least` to show are left out.
    """
    (rows, kept_apart), given, questions = judging, [], []
    for draw in range(DRAWS):
        lines = episode_indices(np.random.default_rng(draw), rows, max(count, SHOTS), SHOTS, exactly=True,
                                apart=kept_apart)  # fmt: skip
        shown, query = lines[0][:, :count], lines[1]
        enough = (shown >= 0).sum(1) >= least
        given.append(shown[enough])
        questions.append(query[enough])
    support, query = np.concatenate(given), np.concatenate(questions)
    units = [np.broadcast_to(np.arange(len(part))[:, None], part.shape)[part >= 0] for part in (support, query)]
    picked = take(rows, query[query >= 0])
    # The shift alone is asked for; of what is left open, which is much work, one direction is computed, which is 0.
    alone = model.replace(weights=jax.tree.map(jnp.zeros_like, model.weights), others=take(model.others, slice(1)))
    asked_flat = picked.replace(offset=np.zeros_like(picked.offset))  # shots keep theirs, which are out of fold
    odd, even = jnp.ones_like(alone.trust), jnp.zeros_like(alone.trust)
    shift = [
        adapt_and_predict(part, prior_table(part), items, take(rows, support[support >= 0]), units[0], asked_flat,
                          units[1])[0]
        for part in (alone.replace(trust=odd, even=even), alone.replace(trust=even, even=odd))
    ]  # fmt: skip
    return Asked(
        np.stack(shift, axis=1), np.asarray(picked.offset, float), picked, units[1], differences(model, items, picked)
    )


def disjoint(found: Asked) -> Asked:
    """Comparisons of which no two of a user's draw share a response: the first that do not, in order.

    What a user said of one response is in all its pairs. Evidence that takes them for answers of their own finds users
    to differ, and to be sure, far more than they do. All are kept where that leaves hardly anybody two to compare, as
    where each pair has a response that all pairs have.
    """
    kept = _no_response_twice(found.rows, found.unit)
    return take(found, kept) if kept.sum() >= 2 * len(np.unique(found.unit)) else found


def _no_response_twice(rows: Rows, unit: np.ndarray) -> Bool[np.ndarray, " rows"]:
    kept, seen = np.zeros(len(unit), bool), set()
    for row, sides in enumerate(zip(unit, rows.first, rows.second, strict=True)):
        both = {(sides[0], sides[1]), (sides[0], sides[2])}
        if not seen & both:
            kept[row] = True
            seen |= both
    return kept


def _of_nobody(model: Residual, items: Item, rows: Rows, dependent: bool = False) -> Asked:
    """Up to `SHOTS` comparisons of each of some users of whom nothing is known, `disjoint` where they are dependent."""
    draw, user = np.random.default_rng(0), np.where(_usable(rows), rows.user, -1)
    known = draw.permutation(np.unique(user[user >= 0]))[:MOST_DRAWS]
    mixed = [draw.permutation(np.flatnonzero(user == one)) for one in known]
    chosen = [own[:SHOTS] for own in mixed]
    if dependent:
        apart = [own[_no_response_twice(take(rows, own), user[own])][:SHOTS] for own in mixed]
        chosen = apart if sum(map(len, apart)) >= 2 * len(apart) else chosen
    place = np.concatenate([np.zeros(0, int), *chosen])
    picked = take(rows, place)
    return Asked(np.zeros((len(place), 2)), np.asarray(picked.offset, float), picked, user[place],
                 differences(model, items, picked))  # fmt: skip


def differences(model: Residual, items: Item, rows: Rows) -> Float[np.ndarray, "rows others"]:
    """How users of the training differ about the log-odds of `rows`: `left_open` of a user whose spread is 1."""
    sides = np.stack([rows.first, rows.second])
    met, place = np.unique(sides, return_inverse=True)
    index = np.pad(met, (0, step_up(len(met)) - len(met)))  # few shapes to compile
    rewards, (first, second) = np.asarray(_rewards_apart(model, items, index)), place.reshape(sides.shape)
    return rewards[first] - rewards[second]


@jax.jit
def _rewards_apart(model: Residual, items: Item, index: Int[Array, " items"]) -> Float[Array, "items others"]:
    user = model.init_user() | {"spread": jnp.ones(())}
    return jax.lax.map(lambda one: model.left_open(user, at(items, one)), index, batch_size=1024)


def predicted(found: Asked, factor: Factor) -> Float[np.ndarray, " asked"]:
    """Log-odds with a factor of each part of the shift, or one of both."""
    return found.offset + found.shift @ np.broadcast_to(factor, 2)


def borne_out(found: Asked) -> Float[np.ndarray, " 2"]:
    """The factors of the parts of a shift that users bear out: of the odd part, then of the even part beside it."""
    factor = np.zeros(2)
    for part in (0, 1):
        factor[part] = _borne_out(found.rows, predicted(found, factor), found.shift[:, part])
    return factor


def _borne_out(rows: Rows, offset: np.ndarray, shift: np.ndarray, most: float = 4.0) -> float:
    """The factor in [0, most] of a shift that users bear out.

    The one that loses the fewest nats, times the positive part of 1 - (standard error / factor)^2 (the garrote of
    Breiman 1995): 0 where other users might as well bear out nothing. The error is that of the loss's slope over users.
    """
    users, own = np.unique(rows.user, return_inverse=True)
    weight, target = np.asarray(rows.weight, float), np.asarray(rows.target, float)

    def nats(factor: float) -> Float[np.ndarray, " users"]:
        logits = offset + factor * shift
        lost = target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)
        return np.bincount(own, weight * lost, len(users))

    best: Any = minimize_scalar(lambda factor: nats(factor).sum(), bounds=(0.0, most), method="bounded")
    if len(users) < FEWEST or best.fun >= nats(0.0).sum():
        return 0.0
    low, middle, high = (nats(best.x + step) for step in (-GAP, 0.0, GAP))
    bend = (high - 2 * middle + low).sum() / GAP**2
    error = np.sqrt(len(users)) * ((high - low) / (2 * GAP)).std(ddof=1) / bend if bend > 0 else np.inf
    return float(best.x * max(0.0, 1 - (error / best.x) ** 2))


def left_open(found: Asked, factor: Factor, usual: float = 1.0) -> tuple[float, float]:
    """Scale of what is predicted (`scale_of`), and spread of users about it (`spread_of`)."""
    spread = spread_of(found, factor, usual)
    return scale_of(found, factor, spread), spread


def spread_of(found: Asked, factor: Factor, usual: float = 1.0) -> float:
    """The spread of users, about a prediction with these factors, that has the most evidence, with a scale of its own.

    What is predicted is the mean of a Gaussian process over a user's answers, whose kernel says how users of the
    training differ, and each draw is a user. Next to nothing is open where the answers say so, nothing where users of
    the training do not differ, or nobody answers.

    Few users say little: log(scale) is normal beforehand with deviation `USUAL_SCALE`, the spread half Cauchy with
    scale `usual`, in log-odds. The draws of one user count as one.
    """
    draws, begin, unit = np.unique(found.unit, return_index=True, return_inverse=True)
    if not len(draws) or not found.apart.any():
        return 0.0
    user = np.asarray(found.rows.user)[begin]
    chosen = np.sort(np.random.default_rng(0).permutation(len(draws))[:MOST_DRAWS])
    lines = np.full((min(step_up(len(chosen)), MOST_DRAWS), SHOTS), -1)  # few shapes to compile
    for line, draw in zip(lines, chosen, strict=False):
        own = np.flatnonzero(unit == draw)  # a draw asks no more
        line[: len(own)] = own
    rows = padded(found.rows.replace(offset=predicted(found, factor).astype(np.float32)), lines)
    apart = found.apart[np.maximum(lines, 0)].astype(np.float32)
    kernel, repeats = np.einsum("uiv,ujv->uij", apart, apart), len(chosen) / len(np.unique(user[chosen]))
    lost = partial(_lost, kernel, rows, repeats, max(usual, np.exp(NO_SPREAD)))
    best: Any = minimize(lost, np.zeros(2), jac=True, method="L-BFGS-B", tol=1e-5,
                         bounds=[(-1.6, 1.6), (NO_SPREAD, 3.5)])  # fmt: skip
    return float(np.exp(best.x[1]))


def scale_of(found: Asked, factor: Factor, spread: float) -> float:
    """How much sharper one user is than the mean over users that is predicted: 1 where nothing is open.

    With this scale the average over what is open says what was predicted, as nearly as one scale for all comparisons
    can: it loses the fewest nats on the predictions themselves. Answers have no part in it: what is predicted was
    fitted to those of many users already, and the few who are held out would add their noise. None is below 1.
    """
    if not len(found.unit):
        return 1.0
    mean = predicted(found, factor)
    variance = spread**2 * np.einsum("rv,rv->r", found.apart, found.apart)
    if np.abs(mean).max() < NOTHING:  # any scale keeps that: what it is where little is predicted
        flatter = 1 / np.sqrt(1 + np.pi * variance / 8)
        return float(flatter.mean() / (flatter**2).mean())
    meant = found.rows.replace(target=expit(mean))

    def nats(log_scale: float) -> float:
        return validation_nats(np.exp(log_scale) * mean, variance, meant)

    scaled: Any = minimize_scalar(nats, bounds=(0.0, np.log(10.0)), method="bounded")
    return float(np.exp(scaled.x))


def _lost(
    kernel: np.ndarray, rows: Rows, repeats: float, usual: float, logarithms: np.ndarray
) -> tuple[float, np.ndarray]:
    """Minus the log posterior of a scale and a spread, and its slope; each user is there `repeats` times."""
    nats, slope = lost_evidence(jnp.asarray(logarithms, jnp.float32), kernel, rows)
    if not np.isfinite(nats) or not np.isfinite(slope).all():  # steps that ran away: this is not the place
        return 1e12, np.zeros(2)
    standard, squared = logarithms[0] / USUAL_SCALE, np.exp(2 * logarithms[1]) / usual**2
    beforehand = 0.5 * standard**2 + np.log1p(squared), np.array([standard / USUAL_SCALE, 2 * squared / (1 + squared)])
    return float(nats) / repeats + beforehand[0], np.asarray(slope, float) / repeats + beforehand[1]


@jax.jit
@jax.value_and_grad
def lost_evidence(logarithms: Float[Array, 2], kernel: Float[Array, "users rows rows"], rows: Rows) -> Float[Array, ""]:
    """Minus the log evidence of a scale and a spread, by Laplace's method (Rasmussen and Williams 2006, 3.1)."""
    scale, spread = jnp.exp(logarithms)

    def one(kernel: Float[Array, "rows rows"], rows: Rows) -> Float[Array, ""]:
        kernel = spread**2 * kernel
        fixed = scale * rows.offset

        def step(f: Float[Array, " rows"], _: None) -> tuple[Float[Array, " rows"], None]:
            return kernel @ solved(f)[0], None

        def solved(f: Float[Array, " rows"]) -> tuple[Array, Array]:
            p = jax.nn.sigmoid(fixed + f)
            root = jnp.sqrt(jnp.maximum(rows.weight * p * (1 - p), 1e-12))  # of padding, a slope
            triangle = jnp.linalg.cholesky(jnp.eye(len(root)) + root[:, None] * kernel * root[None, :])
            b = root**2 * f + rows.weight * (rows.target - p)
            a = b - root * jax.scipy.linalg.cho_solve((triangle, True), root * (kernel @ b))
            return a, jnp.sum(jnp.log(jnp.diagonal(triangle)))

        f, _ = jax.lax.scan(step, jnp.zeros_like(fixed), None, length=MODE_STEPS)
        f, _ = step(jax.lax.stop_gradient(f), None)  # where a step ends at the mode, its slope is that of the mode
        a, half_log_det = solved(f)
        f = kernel @ a
        logits = fixed + f
        nats = rows.target * jax.nn.softplus(-logits) + (1 - rows.target) * jax.nn.softplus(logits)
        return 0.5 * a @ f + jnp.sum(rows.weight * nats) + half_log_det

    return jnp.sum(jax.vmap(one)(kernel, rows))


def prior_table(model: Residual, *, users: int = 0, communities: int = 0) -> Users:
    """The table of a residual, everyone at the prior user."""
    table = Users.init(model, users=users, communities=communities)
    zero = jnp.zeros_like(table.user_root)
    nothing = {name: getattr(model, name)[0, 0] for name in ("trust", "even", "scale", "spread")}
    population = {"state": model.prior, "reversed": model.prior, **nothing}
    return table.replace(population=population, user_root=zero, community_root=zero)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
