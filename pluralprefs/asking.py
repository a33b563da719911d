"""What to ask next: the comparisons of a pool that say most about a user.

Log-odds of the pool's pairs are jointly Gaussian under the user's posterior, l ~ N(m, S); y is the answer, s the
logistic function, h = E[s'(l)] the information that an answer is expected to carry.

    bald        I(y; l) = H(E s(l)) - E H(s(l)), in nats: what the answer says about the user (Houlsby et al. 2011,
                arXiv 1112.5745)
    d_optimal   log(1 + h S_ii) / 2: what it takes from the log volume of the posterior (MacKay 1992; PReF, arXiv
                2503.06358, asks by the like)
    eubo        E max(r_first, r_second): the expected utility of the best option (Lin et al. 2022, arXiv 2203.11382;
                Astudillo et al. 2023, arXiv 2303.15746), for families with a reward, over the prompt's average response
    random      each pair with equal chance

Bald and d_optimal learn the user; eubo seeks what the user likes best, and asks about little else. Several questions
are chosen one after the other, S conditioned on those already chosen: an answer with curvature h takes
S_i S_i' / (1/h + S_ii) away, whichever answer it is, so that a second question does not ask the same again.

What no level explains of a row (`Users.residual`) blurs an answer and is not learned: m and S are moderated by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from scipy.special import entr, expit, ndtr

from pluralprefs.adapt import Joint
from pluralprefs.adapted import pair_ids
from pluralprefs.adapting import gaussian_mean, joint_log_odds, user_rewards
from pluralprefs.data.files import DataError
from pluralprefs.fitting import Rows
from pluralprefs.types import Item, LeavesOpen, ScalarReward

if TYPE_CHECKING:
    from pluralprefs.adapted import AdaptedUser

RULES = ("bald", "d_optimal", "eubo", "random")


def suggest(
    user: AdaptedUser, pool: pl.DataFrame, n: int = 5, *, rule: str = "bald", seed: int = 0
) -> pl.DataFrame:  # fmt: skip
    """Choose up to `n` pairs of a pool to ask the user, the best first; those that the user has judged are left out.

    The pool's rows with `gain` (see the module for its meaning under each rule, given the questions before it; 0 for
    random), `probability` of the first response, `log_odds` and `log_odds_std`. No rows where nothing is left to ask.
    `seed` is for "random". Raises DataError for an unknown rule or a user without uncertainty.
    """
    if rule not in RULES:
        raise DataError(f"rule {rule!r}: write {', '.join(RULES)}")
    if n < 1:
        raise DataError(f"n {n}: ask for one pair at least")
    unsure, run = rule in ("bald", "d_optimal"), user.run
    inferred = isinstance(run.model, LeavesOpen)
    if unsure and inferred and float(run.users.population["spread"] + user.posterior.mean.state["spread"]) < 1e-6:
        raise DataError(f'rule {rule!r} needs uncertainty, and of this user the run, which infers users, states none: '
                        'choose "random"')  # fmt: skip
    if unsure and not inferred and user.posterior.covariance is None:
        raise DataError(f'rule {rule!r} needs the uncertainty that method="map" does not give: adapt with "laplace"')
    pairs = pl.Series("pair", pair_ids(pool), dtype=pl.Utf8)
    left = user.own(pool).filter(pairs.is_first_distinct() & ~pairs.is_in(list(user.pairs)))
    if not left.height:
        return left.with_columns(**{name: pl.lit(0.0) for name in ("gain", "probability", "log_odds", "log_odds_std")})
    items, rows = run.arrays(left)
    joint = joint_log_odds(run.model, run.users, items, user.posterior, rows)
    residual = float(run.users.residual)
    level = _utility(user, items, rows, left) if rule == "eubo" else np.zeros(left.height)
    chosen, gain = pick(joint, n, rule, level=level, residual=residual, weight=run.notes.get("temper", 1.0), seed=seed)
    mean, spread = joint.mean[chosen], variances(joint)[chosen] + residual
    return left[chosen.tolist()].with_columns(
        gain=pl.Series(gain),
        probability=pl.Series(expit(mean / np.sqrt(1 + np.pi * spread / 8))),
        log_odds=pl.Series(mean),
        log_odds_std=pl.Series(np.sqrt(spread)),
    )


def pick(
    joint: Joint, n: int, rule: str, *, level: Float[np.ndarray, " rows"], residual: float = 0.0, weight: float = 1.0,
    seed: int = 0,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:  # fmt: skip
    """Choose up to `n` rows by a rule and say what each is worth; see the module.

    `level` is the mean utility of a row's two responses (eubo), `weight` the exponent that tempers an answer.
    """
    n = min(n, len(joint.mean))
    if rule == "random":
        return np.random.default_rng(seed).permutation(len(joint.mean))[:n], np.zeros(n)
    shrink = 1 / np.sqrt(1 + np.pi * residual / 8)
    mean, plus, minus = shrink * joint.mean, shrink * joint.plus, shrink * joint.minus
    spread, taken = variances(Joint(mean, plus, minus)), np.zeros((len(mean), 0))
    chosen, gains = [], []
    for _ in range(n):
        worth = _worth(rule, mean, spread, shrink * level, weight)
        worth[chosen] = -np.inf
        best = int(np.argmax(worth))
        chosen.append(best)
        gains.append(worth[best])
        column = plus @ plus[best] - minus @ minus[best] - taken @ taken[best]
        information = weight * gaussian_mean(_slope, mean[best], spread[best])
        column *= np.sqrt(information / (1 + information * spread[best]))
        taken = np.concatenate([taken, column[:, None]], axis=1)
        spread = np.maximum(spread - column**2, 0.0)
    return np.array(chosen), np.array(gains)


def variances(joint: Joint) -> Float[np.ndarray, " rows"]:
    """Variance of each row's log-odds."""
    return np.maximum((joint.plus**2).sum(1) - (joint.minus**2).sum(1), 0.0)


def _worth(
    rule: str, mean: np.ndarray, spread: np.ndarray, level: np.ndarray, weight: float
) -> Float[np.ndarray, " rows"]:
    if rule == "bald":
        return _entropy(gaussian_mean(expit, mean, spread)) - gaussian_mean(lambda x: _entropy(expit(x)), mean, spread)
    if rule == "d_optimal":
        return 0.5 * np.log1p(weight * gaussian_mean(_slope, mean, spread) * spread)
    deviation = np.sqrt(spread)
    standard = mean / np.where(deviation > 0, deviation, 1.0)
    distance = deviation * np.sqrt(2 / np.pi) * np.exp(-(standard**2) / 2) + mean * (2 * ndtr(standard) - 1)
    return level + 0.5 * np.where(deviation > 0, distance, np.abs(mean))  # max(a, b) = (a + b) / 2 + |a - b| / 2


def _entropy(p: np.ndarray) -> np.ndarray:
    return entr(p) + entr(1 - p)


def _slope(x: np.ndarray) -> np.ndarray:
    return expit(x) * expit(-x)


def _utility(user: AdaptedUser, items: Item, rows: Rows, table: pl.DataFrame) -> Float[np.ndarray, " rows"]:
    """Mean utility of each row's two responses, over that of the prompt's average response in the table."""
    if not isinstance(user.run.model, ScalarReward):
        raise DataError('rule "eubo" needs a family with a reward; choose bald or d_optimal')
    reward = user_rewards(user.run.model, user.run.users, items, user.posterior, user.community)
    level = pl.DataFrame({"prompt": table["prompt_id"], "level": (reward[rows.first] + reward[rows.second]) / 2})
    return level.select(pl.col("level") - pl.col("level").mean().over("prompt"))["level"].to_numpy()
