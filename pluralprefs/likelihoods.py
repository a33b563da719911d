"""From log-odds to nats: what one judgement costs, and how the costs of many rows become one number.

A family answers with the log-odds l that a user prefers the first response; a likelihood is a small pytree, called as
`likelihood(log_odds, row)`, that says how many nats the recorded judgement costs. It may own learned scalars (a
temperature, a tie threshold). A reduction `(nats, batch) -> loss` says whose rows count how much: a pooled mean lets
prolific users dominate, a mean per user does not, a tail cares for the users served worst. With s the logistic
function, t = P(first preferred) and softplus(x) = log(1 + exp x):

    Logistic   t softplus(-l) + (1 - t) softplus(l)                     Bradley-Terry; the minimiser is l = logit t
    Davidson   P(first) : P(tie) : P(second) = e^(l/2) : nu : e^(-l/2)  doi:10.1080/01621459.1970.10481082
    Hinge      t max(0, margin - l) + (1 - t) max(0, margin + l)        PAL, arXiv 2406.08469
    IPO        t ((l - 1/2)/beta)^2 + (1 - t) ((l + 1/2)/beta)^2        arXiv 2310.12036
    RobustDPO  [(1 - e) softplus(-l) - e softplus(l)] / (1 - 2e)        rDPO, arXiv 2403.00409

Hinge and IPO scores are not log-odds: fit a temperature (`Logistic.init(temperature=True)`) on a validation slice
before a probability is reported. Rows of weight 0 are padding and change neither a reduction nor its gradient.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.nn import softplus
from jaxtyping import Array, Bool, Float

from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons


@pytree
class Logistic:
    """Cross-entropy of a soft target, with an optional learned temperature, constant margin and label smoothing.

    The log-odds are divided by exp(log_temperature). `margin` shifts them against the recorded side, as in
    softplus(margin - l). `label_smoothing` e replaces the target t by (1 - e) t + e / 2.

    >>> from types import SimpleNamespace
    >>> float(Logistic()(jnp.array(0.0), SimpleNamespace(target=1.0))).__round__(4)
    0.6931
    """

    log_temperature: Float[Array, ""] | None = None
    margin: float = static(default=0.0)
    label_smoothing: float = static(default=0.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")

    @classmethod
    def init(cls, *, temperature: bool = False, margin: float = 0.0, label_smoothing: float = 0.0) -> Self:
        """Start at temperature 1; without `temperature` there is nothing to learn."""
        log_temperature = jnp.zeros(()) if temperature else None
        return cls(log_temperature=log_temperature, margin=margin, label_smoothing=label_smoothing)

    def scaled(self, log_odds: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Divide by the temperature: the log-odds whose logistic function is the probability to report."""
        return log_odds if self.log_temperature is None else log_odds * jnp.exp(-self.log_temperature)

    def __call__(self, log_odds: Float[Array, ""], row: Comparisons[Any]) -> Float[Array, ""]:
        """Nats of one row."""
        scaled = self.scaled(log_odds)
        target = (1.0 - self.label_smoothing) * row.target + 0.5 * self.label_smoothing
        return target * softplus(self.margin - scaled) + (1.0 - target) * softplus(self.margin + scaled)


@pytree
class Davidson:
    """Three outcomes: first, tie, second. `log_tie` is log nu; nu -> 0 gives Bradley-Terry on decided rows.

    Rows marked as ties cost -log P(tie); on all others the target, graded or not, weighs the two decided outcomes.
    Given a decision, the log-odds of `first` are l itself (doi:10.1080/01621459.1970.10481082).

    >>> Davidson.init(tie=0.5).probabilities(jnp.array(0.0)).round(3).tolist()
    [0.25, 0.5, 0.25]
    """

    log_tie: Float[Array, ""]

    @classmethod
    def init(cls, *, tie: float = 1 / 3) -> Self:
        """Start where two equal responses are judged a tie with probability `tie`."""
        if not 0.0 < tie < 1.0:
            raise ValueError(f"tie is {tie}; the share of ties between equal responses must lie in (0, 1)")
        return cls(log_tie=jnp.log(jnp.asarray(2.0 * tie / (1.0 - tie))))

    def log_probabilities(self, log_odds: Float[Array, "*batch"]) -> Float[Array, "*batch 3"]:
        """Log P of (first preferred, tie, second preferred)."""
        tie = jnp.broadcast_to(self.log_tie, jnp.shape(log_odds))
        return jax.nn.log_softmax(jnp.stack([0.5 * log_odds, tie, -0.5 * log_odds], axis=-1), axis=-1)

    def probabilities(self, log_odds: Float[Array, "*batch"]) -> Float[Array, "*batch 3"]:
        """P of (first preferred, tie, second preferred); sums to one."""
        return jnp.exp(self.log_probabilities(log_odds))

    def __call__(self, log_odds: Float[Array, ""], row: Comparisons[Any]) -> Float[Array, ""]:
        """Nats of one row."""
        first, tie, second = self.log_probabilities(log_odds)
        return -jnp.where(row.tie, tie, row.target * first + (1.0 - row.target) * second)


@pytree
class Hinge:
    """PAL's margin loss (arXiv 2406.08469). A graded target weighs the two sides, so 0.5 costs at least the margin.

    >>> from types import SimpleNamespace
    >>> [float(Hinge()(jnp.array(l), SimpleNamespace(target=1.0))) for l in (-1.0, 0.25, 2.0)]
    [2.0, 0.75, 0.0]
    """

    margin: float = static(default=1.0)

    def __call__(self, log_odds: Float[Array, ""], row: Comparisons[Any]) -> Float[Array, ""]:
        """Cost of one row, in units of the log-odds rather than nats."""
        right = jnp.maximum(0.0, self.margin - log_odds)
        return row.target * right + (1.0 - row.target) * jnp.maximum(0.0, self.margin + log_odds)


@pytree
class IPO:
    """Squared distance of h = l / beta from 1 / (2 beta) at t = 1 (arXiv 2310.12036); the log-odds are l = beta h.

    A policy equal to its reference has l = 0 and costs (1 / (2 beta))^2 whatever the target.

    >>> from types import SimpleNamespace
    >>> float(IPO(beta=0.5)(jnp.array(0.0), SimpleNamespace(target=1.0)))
    1.0
    """

    beta: float = static(default=0.1)

    def __post_init__(self) -> None:
        if not self.beta > 0.0:
            raise ValueError(f"beta is {self.beta}; IPO needs beta > 0")

    def __call__(self, log_odds: Float[Array, ""], row: Comparisons[Any]) -> Float[Array, ""]:
        """Cost of one row (a squared difference, not nats)."""
        first, second = ((log_odds - 0.5) / self.beta) ** 2, ((log_odds + 0.5) / self.beta) ** 2
        return row.target * first + (1.0 - row.target) * second


@pytree
class RobustDPO:
    """Unbiased under labels flipped with probability `flips` = e < 1/2 (rDPO, arXiv 2403.00409).

    The expectation over flips of [(1 - e) softplus(-l) - e softplus(l)] / (1 - 2e) is the clean softplus(-l). Taken
    alone it falls without bound as l grows, so the log-odds are cut off at `clip` on the recorded side only: within
    the clip the loss is unbiased, beyond it the flipped rows pull the log-odds back, and a wrong row is never cut.
    """

    flips: float = static(default=0.1)
    clip: float = static(default=10.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.flips < 0.5:
            raise ValueError(f"flips is {self.flips}; labels flipped at 1/2 or more carry no preference: use [0, 0.5)")
        if not self.clip > 0.0:
            raise ValueError(f"clip is {self.clip}; it must be positive")

    def __call__(self, log_odds: Float[Array, ""], row: Comparisons[Any]) -> Float[Array, ""]:
        """Nats of one row; negative values are possible."""
        return row.target * self._recorded(log_odds) + (1.0 - row.target) * self._recorded(-log_odds)

    def _recorded(self, log_odds: Float[Array, ""]) -> Float[Array, ""]:
        odds = jnp.minimum(log_odds, self.clip)
        return ((1.0 - self.flips) * softplus(-odds) - self.flips * softplus(odds)) / (1.0 - 2.0 * self.flips)


def pooled_mean(nats: Float[Array, " rows"], batch: Comparisons[Any]) -> Float[Array, ""]:
    """Average over rows by weight; 0 where every row is padding."""
    return _ratio(jnp.sum(_weighted(nats, batch)), jnp.sum(batch.weight))


def per_user_mean(nats: Float[Array, " rows"], batch: Comparisons[Any]) -> Float[Array, ""]:
    """Average each user's rows by weight, then the users equally. Rows without a user (-1) count as one user.

    Users are those of the batch. Where batches hold a small part of each user's rows, dividing `weight` by the user's
    number of rows and taking `pooled_mean` is closer to the mean over all users.
    """
    means, present = _user_means(nats, batch)
    return _ratio(jnp.sum(jnp.where(present, means, 0.0)), jnp.sum(present))


def user_tail(nats: Float[Array, " rows"], batch: Comparisons[Any], *, alpha: float) -> Float[Array, ""]:
    """Average over the share `alpha` of users with the highest mean nats: conditional value at risk over users.

    Rockafellar and Uryasev 2000, doi:10.21314/JOR.2000.038. alpha = 1 is `per_user_mean`, alpha -> 0 the worst user;
    the user at the border counts in part. A part of an experiment is `partial(user_tail, alpha=0.2)`.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; the share of users in the tail must lie in (0, 1]")
    means, present = _user_means(nats, batch)
    order = jnp.argsort(jnp.where(present, -means, jnp.inf))
    share = alpha * jnp.sum(present)
    taken = jnp.clip(share - jnp.arange(means.shape[0]), 0.0, 1.0)
    return _ratio(jnp.sum(taken * jnp.where(present, means, 0.0)[order]), share)


def _weighted(nats: Float[Array, " rows"], batch: Comparisons[Any]) -> Float[Array, " rows"]:
    # `where` and not a product alone: 0 * inf is NaN.
    return batch.weight * jnp.where(batch.weight > 0, nats, 0.0)


def _ratio(total: Float[Array, "*any"], count: Any) -> Float[Array, "*any"]:
    # The inner `where` keeps the gradient finite where count is 0.
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0.0)


def _user_means(
    nats: Float[Array, " rows"], batch: Comparisons[Any]
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Mean nats of each user of the batch in an array as long as the batch, and which of its places are in use."""
    size = nats.shape[0]
    _, group = jnp.unique(batch.user, size=size, return_inverse=True)
    total = jax.ops.segment_sum(_weighted(nats, batch), group, num_segments=size)
    weight = jax.ops.segment_sum(batch.weight, group, num_segments=size)
    return _ratio(total, weight), weight > 0
