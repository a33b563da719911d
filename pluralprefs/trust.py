"""How far what shots say of a user is trusted, and how much they leave open: users whom the family has not seen judge.

Held-out users show shots and are asked about other comparisons of theirs (`judging`). At each number of shots

    trust    the factor of what the answers say (`Residual`: the odd part of the inferred shift), and
    even     that of what the shots say whichever way they were answered, at most as large: those that lose the fewest
             nats, drawn towards those of fewer shots, and at first to 0, as far as the users disagree about them: the
             step is times max(0, 1 - (standard error / step)^2), so that noise is not trusted (`borne_out`)
    efficiency   the share of what shots tell that the family has read, and
    scale    how much sharper one user is than what is then predicted (`spread`).

How users differ of whom nothing is known, the spread, all users of the training tell, and held-out users need not.
These are few, and say little: trust is drawn to 0. Efficiency follows from spread and trust. What shots of responses
that training does not know say is judged apart (`far_judges`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit

from pluralprefs.adapting import adapt_and_predict, adapt_rectangles
from pluralprefs.data.episodes import episode_indices
from pluralprefs.directions import differences
from pluralprefs.fitting import Rows, take
from pluralprefs.judging import ENOUGH, FEW, SHOTS, Judging
from pluralprefs.models.residual import Residual
from pluralprefs.pooling import validation_nats
from pluralprefs.spread import (
    Asked,
    disjoint,
    efficiency_of,
    left_open,
    of_nobody,
    predicted,
    scale_of,
)
from pluralprefs.types import Item
from pluralprefs.users import Users

KNOTS = (0, 1, 2, 4, 8, 16, 32, 64)  # numbers of shots at which trust is learned; the last stands for all there are
MANY = 512  # shots that are tried where users have more than an episode shows
DRAWS = 5  # of shots for each held-out user
MOST = 4.0  # factor of a shift
NOTHING_SAID = np.zeros(2)
GAP = 1e-3  # of a factor, between which slopes of the loss are taken


class Trust(NamedTuple):
    """What `Residual` reads at each number of shots, and the most shots that count."""

    shots: Float[np.ndarray, " knots"]
    trust: Float[np.ndarray, " knots"]
    even: Float[np.ndarray, " knots"]
    scale: Float[np.ndarray, " knots"]
    efficiency: Float[np.ndarray, " knots"]
    most: Float[np.ndarray, ""]
    spread: float


def trusted(
    model: Residual, items: Item, notes: dict[str, Any], rows: Rows, near: Judging,
    away: tuple[Residual, Judging] | None = None, *, dependent: bool = False,
) -> Residual:  # fmt: skip
    """Learn trust, even, scale, efficiency and most for shots of responses that training knows and (by `away`, a model
    and judges) of others, and the spread.

    `rows` are those of all users of the training, with what the population says of them, out of fold, as `offset`.
    Where comparisons of a user that share a response are `dependent`, none that do tell scale and spread together.

    A number of shots that few have, fewer than `ENOUGH` users and than a quarter of those who have one, teaches noise:
    it is trusted as the number before it, and more shots than that count as that many, since nobody bore out that they
    say more; far away, where few have much to show, as many count as near.
    """
    found = [_judged(model, items, near, rows, notes, dependent)]
    if away is not None:
        notes["far"] = {}
        found.append(_judged(away[0], items, away[1], rows, notes["far"], dependent, found[0].spread))
    both = {name: np.stack([getattr(part, name) for part in (found[0], found[-1])]) for name in Trust._fields[:-1]}
    nothing = (both["trust"] == 0) & (both["even"] == 0)  # who is not trusted at all is a stranger, to the last digit
    both["efficiency"], both["scale"] = (
        np.where(nothing, both[name][0, 0], both[name]) for name in ("efficiency", "scale")
    )
    for place, part in enumerate([notes] if away is None else [notes, notes["far"]]):
        for name in ("trust", "even", "scale", "efficiency"):
            part[name] = {str(k): float(v) for k, v in zip((*KNOTS[:-1], "all"), both[name][place], strict=True)}
    notes["spread"] = found[0].spread
    learned = {name: jnp.asarray(values, jnp.float32) for name, values in both.items()}
    return model.replace(**learned | {"most": jnp.maximum(learned["most"], learned["most"][0]),
                                      "spread": jnp.float32(found[0].spread)})  # fmt: skip


def _judged(
    model: Residual, items: Item, judging: Judging, everyone: Rows, notes: dict[str, Any], dependent: bool,
    spread: float | None = None,
) -> Trust:  # fmt: skip
    """What the users of `judging` bear out at each number of shots, and what `everyone` leaves open without any: a
    `spread` that was found already, where it is given, for there is one that serves."""
    knots = jnp.tile(jnp.asarray(KNOTS, jnp.float32), (2, 1))
    one = jnp.ones_like(knots)
    open_ended = model.replace(shots=knots, trust=one, even=one, scale=one, efficiency=one, spread=jnp.ones(()),
                               most=jnp.full(2, 1e6))  # fmt: skip
    rows, asked = judging
    told = disjoint if dependent else lambda found: found
    strangers = of_nobody(open_ended, items, everyone, dependent)
    spread = left_open(strangers, 0.0)[1] if spread is None else spread
    sharper = scale_of(strangers, 0.0, spread)

    def bear_out(found: Asked, before: tuple[float, ...]) -> tuple[float, float, float, float]:
        """Trust, even, scale and efficiency."""
        factor, found = borne_out(found, np.array(before[:2])), told(found)
        efficiency = efficiency_of(found, factor, spread)
        return float(factor[0]), float(factor[1]), scale_of(found, factor, spread, efficiency), efficiency

    learned = [(0.0, 0.0, sharper, 0.0)]
    enough_for, with_one = 0, 1
    for count in KNOTS[1:-1]:
        found = _shown(open_ended, items, judging, count, least=count)
        users = len(np.unique(found.rows.user))
        with_one = max(users, 1) if count == 1 else with_one
        if users < min(ENOUGH, with_one / 4):
            learned.append(learned[-1])
            continue
        learned.append(bear_out(found, learned[-1]))
        enough_for = count
    many = min(int(np.unique(np.asarray(rows.user), return_counts=True)[1].max()), MANY)
    shown_of_many = many * (0.75 if isinstance(asked, str) and asked == "pair" else 0.5)
    most, at_all, last = float(enough_for), learned[-1], SHOTS + 1.0
    if enough_for == SHOTS < int(shown_of_many):  # some show more than an episode does
        arms = {"all": 1e6, SHOTS: float(SHOTS)}
        shown = {name: _shown(open_ended.replace(most=jnp.full(2, cap)), items, judging, many, least=SHOTS + 1)
                 for name, cap in arms.items()}  # fmt: skip
        if len(np.unique(shown["all"].rows.user)) >= min(ENOUGH, with_one / 4):
            fewer = np.array(learned[-1][:2])
            nats = {name: _lost_by(part, borne_out(part, fewer)) for name, part in shown.items()}
            best = min(nats, key=nats.__getitem__)
            at_all, most, last = bear_out(shown[best], learned[-1]), arms[best], max(last, shown_of_many)
            notes["validation_nll_of_shots"] = {str(name): value for name, value in nats.items()}
    trust, even, scale, efficiency = np.array([*learned, at_all]).T
    return Trust(np.asarray([*KNOTS[:-1], last]), trust, even, scale, efficiency, np.asarray(most), spread)


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
    # The shift alone is asked for; of what is left open, which is much work, next to nothing is computed, which is 0.
    model = model.replace(weights=jax.tree.map(jnp.zeros_like, model.weights))
    alone = model.replace(others=take(model.others, slice(1)), axes=jnp.zeros((1 + items.embedding.shape[1], 1)))
    asked_flat = picked.replace(offset=np.zeros_like(picked.offset))  # shots keep theirs, which are out of fold
    odd, even = jnp.ones_like(alone.trust), jnp.zeros_like(alone.trust)
    shift = [
        adapt_and_predict(part, prior_table(part), items, take(rows, support[support >= 0]), units[0], asked_flat,
                          units[1])[0]
        for part in (alone.replace(trust=odd, even=even), alone.replace(trust=even, even=odd))
    ]  # fmt: skip
    return Asked(np.stack(shift, axis=1), np.asarray(picked.offset, float), picked, units[1],
                 *_open_of(model, items, take(rows, support[support >= 0]), units[0], picked, units[1]))  # fmt: skip


def _open_of(
    model: Residual, items: Item, shown: Rows, shower: np.ndarray, asked: Rows, unit: np.ndarray
) -> tuple[Float[np.ndarray, "asked directions"], Float[np.ndarray, "asked directions"]]:
    """What comparisons have of each unknown of their unit, and what the unit's shots tell of it: unknowns such that
    shots tell of each apart."""
    apart, table = differences(model, items, asked), prior_table(model)
    count, size = max(unit.max(initial=-1), shower.max(initial=-1)) + 1, apart.shape[1]
    known, axes = np.zeros((count, size)), np.tile(np.eye(size), (count, 1, 1))
    for units, posterior in adapt_rectangles(model, table, items, shown, shower):
        root = np.asarray(table.population["open"], float) + posterior.mean.state["open"]
        left, axes[units] = np.linalg.eigh(root @ root.swapaxes(1, 2))
        known[units] = 1 / np.clip(left, np.finfo(np.float32).eps, 1.0) - 1
    return np.einsum("rd,rde->re", apart, axes[unit]), known[unit]


def _lost_by(found: Asked, factor: np.ndarray) -> float:
    return validation_nats(predicted(found, factor), np.zeros(1), found.rows)


def borne_out(found: Asked, before: Float[np.ndarray, " 2"] = NOTHING_SAID) -> Float[np.ndarray, " 2"]:
    """The factors of the odd and of the even part of a shift that users bear out, who bore out `before` of fewer shots.

    All lies between the odd part alone, which is the mean of the shift that a family infers and of minus the one that
    reversed labels would make, and that shift itself, both parts alike: where answers say nothing, a correction that is
    the same for all would be the luck of those few who judge. The odd part alone is departed from, and then `before`,
    as far as users bear that out. Few users make no factor larger than 1, as a family was trained.
    """
    alone, best = np.array([_best(found, found.shift[:, :1])[0], 0.0]), _best_of_both(found)
    share = _borne_out(found.rows, predicted(found, alone), found.shift @ (best - alone))
    factor = alone + share * (best - alone)
    if len(np.unique(found.rows.user)) < FEW:
        factor = factor / max(factor[0], 1.0)
    step = factor - before
    return before + _borne_out(found.rows, predicted(found, before), found.shift @ step) * step


def _best_of_both(found: Asked) -> Float[np.ndarray, " 2"]:
    both, odd = _best(found, np.stack([found.shift.sum(1), found.shift[:, 0]], axis=1))
    return np.array([both + odd, both])


def _best(found: Asked, shifts: Float[np.ndarray, "asked shifts"]) -> Float[np.ndarray, " shifts"]:
    """The factors in [0, `MOST`] that lose the fewest nats."""
    weight, target = np.asarray(found.rows.weight, float), np.asarray(found.rows.target, float)

    def nats(factor: np.ndarray) -> tuple[float, np.ndarray]:
        logits = found.offset + shifts @ factor
        lost = target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)
        return float(weight @ lost), (weight * (expit(logits) - target)) @ shifts

    begin = np.full(shifts.shape[1], 0.1)
    return minimize(nats, begin, jac=True, method="L-BFGS-B", bounds=[(0.0, MOST)] * len(begin)).x


def _borne_out(rows: Rows, offset: np.ndarray, shift: np.ndarray) -> float:
    """The share in [0, 1] of a shift that users bear out.

    The factor that loses the fewest nats, times the positive part of 1 - (standard error / factor)^2 (the garrote of
    Breiman 1995): 0 where other users might as well bear out nothing. The error is that of the loss's slope over users,
    with the variance of Student's t for their number; three users or fewer bear out nothing.
    """
    users, own = np.unique(rows.user, return_inverse=True)
    weight, target = np.asarray(rows.weight, float), np.asarray(rows.target, float)

    def nats(factor: float) -> Float[np.ndarray, " users"]:
        logits = offset + factor * shift
        lost = target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)
        return np.bincount(own, weight * lost, len(users))

    best: Any = minimize_scalar(lambda factor: nats(factor).sum(), bounds=(0.0, MOST), method="bounded")
    if len(users) <= 3 or best.fun >= nats(0.0).sum():
        return 0.0
    low, middle, high = (nats(best.x + step) for step in (-GAP, 0.0, GAP))
    bend = (high - 2 * middle + low).sum() / GAP**2
    squared = len(users) * ((high - low) / (2 * GAP)).var(ddof=1) * (len(users) - 1) / (len(users) - 3)
    return float(min(best.x * max(0.0, 1 - squared / (bend * best.x) ** 2), 1.0)) if bend > 0 else 0.0


def prior_table(model: Residual, *, users: int = 0, communities: int = 0) -> Users:
    """The table of a residual, everyone at the prior user."""
    table = Users.init(model, users=users, communities=communities)
    zero = jnp.zeros_like(table.user_root)
    nothing = {name: getattr(model, name)[0, 0] for name in ("trust", "even", "scale")} | {"spread": model.spread}
    population = model.init_user() | {"state": model.prior, "reversed": model.prior} | nothing
    return table.replace(population=population, user_root=zero, community_root=zero)
