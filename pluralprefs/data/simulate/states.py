"""What a simulated user is: a state vector, the prior it was drawn from, and the log-odds it implies.

Three kinds of log-odds cover every world. `Linear`: (w_0 + w_community + state) . (z_a - z_b). `Distance`: the user is
the mixture of prototypes P' state and prefers the nearer item, scale (|z_b - P' state| - |z_a - P' state|). `Cycle`:
state C[type_a, type_b] with a skew matrix C, which no reward can express. `Noise` turns log-odds into the
probabilities of the three answers (first, tie, second).

Priors are sampled and weighed in free coordinates, in which every real vector is a user: the state itself for a
Gaussian, log(w_k / w_K) for a Dirichlet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

SURE = 30.0  # log-odds that stand for certainty: labels are the sign of the difference, and s(30) = 1 - 1e-13


class Pairs(NamedTuple):
    """Rows of comparisons as positions: two items and a community each (0 where a world has none)."""

    first: Int[np.ndarray, " rows"]
    second: Int[np.ndarray, " rows"]
    community: Int[np.ndarray, " rows"]


def sigmoid(log_odds: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
    """Map log-odds to probabilities without overflow.

    >>> sigmoid(np.array([-1000.0, 0.0])).round(9).tolist()
    [0.0, 0.5]
    """
    return 1.0 / (1.0 + np.exp(-np.clip(log_odds, -700.0, 700.0)))


def to_log_odds(difference: Float[np.ndarray, " *shape"], scale: float | None) -> Float[np.ndarray, " *shape"]:
    """Multiply a difference by `scale` (Bradley-Terry labels), or take its sign as certain where `scale` is None."""
    return SURE * np.sign(difference) if scale is None else scale * difference


class LogOdds(Protocol):
    """How a state judges pairs."""

    def __call__(
        self, states: Float[np.ndarray, "samples size"], pairs: Pairs
    ) -> Float[np.ndarray, "samples rows"]: ...


@dataclass(frozen=True)
class Linear:
    """Log-odds linear in the state, around the shared weights of the row's community."""

    items: Float[np.ndarray, "items size"]
    shared: Float[np.ndarray, "communities size"]

    def design(self, pairs: Pairs) -> tuple[Float[np.ndarray, "rows size"], Float[np.ndarray, " rows"]]:
        """Return the feature differences of the rows and their log-odds at a zero state."""
        difference = self.items[pairs.first] - self.items[pairs.second]
        return difference, np.einsum("rs,rs->r", difference, self.shared[pairs.community])

    def __call__(self, states: Float[np.ndarray, "samples size"], pairs: Pairs) -> Float[np.ndarray, "samples rows"]:
        difference, offset = self.design(pairs)
        return states @ difference.T + offset


@dataclass(frozen=True)
class Distance:
    """Log-odds of an ideal point that is a mixture of prototypes (plain L2 distance)."""

    items: Float[np.ndarray, "items point"]
    prototypes: Float[np.ndarray, "prototypes point"]
    scale: float | None

    def __call__(
        self, states: Float[np.ndarray, "samples prototypes"], pairs: Pairs
    ) -> Float[np.ndarray, "samples rows"]:
        points = states @ self.prototypes
        return to_log_odds(self._distance(points, pairs.second) - self._distance(points, pairs.first), self.scale)

    def _distance(
        self, points: Float[np.ndarray, "samples point"], rows: Int[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "samples rows"]:
        items = self.items[rows]
        squared = (points**2).sum(1)[:, None] + (items**2).sum(1) - 2.0 * points @ items.T
        return np.sqrt(np.maximum(squared, 0.0))


@dataclass(frozen=True)
class Angle:
    """Log-odds of an ideal direction that is a mixture of directions: a difference of cosines."""

    items: Float[np.ndarray, "items point"]
    directions: Float[np.ndarray, "prototypes point"]
    scale: float | None

    def __call__(
        self, states: Float[np.ndarray, "samples prototypes"], pairs: Pairs
    ) -> Float[np.ndarray, "samples rows"]:
        ideal = states @ self.directions
        ideal = ideal / np.linalg.norm(ideal, axis=1, keepdims=True)
        unit = self.items / np.linalg.norm(self.items, axis=1, keepdims=True)
        return to_log_odds(ideal @ (unit[pairs.first] - unit[pairs.second]).T, self.scale)


@dataclass(frozen=True)
class Cycle:
    """Rock, paper, scissors: type t beats type t + 1 (mod 3) for a state of +1, and loses to it for -1."""

    types: Int[np.ndarray, " items"]
    scale: float | None

    def __call__(self, states: Float[np.ndarray, "samples 1"], pairs: Pairs) -> Float[np.ndarray, "samples rows"]:
        step = (self.types[pairs.second] - self.types[pairs.first]) % 3
        return to_log_odds(states * np.array([0.0, 1.0, -1.0])[step], self.scale)


class Prior(Protocol):
    """A distribution of states, in free coordinates."""

    def sample(self, rng: np.random.Generator, samples: int) -> Float[np.ndarray, "samples free"]: ...

    def log_density(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, " samples"]: ...

    def states(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, "samples size"]: ...


@dataclass(frozen=True)
class Gaussian:
    """Independent normal coordinates."""

    mean: Float[np.ndarray, " size"]
    std: Float[np.ndarray, " size"]

    def sample(self, rng: np.random.Generator, samples: int) -> Float[np.ndarray, "samples free"]:
        return self.mean + self.std * rng.standard_normal((samples, len(self.mean)))

    def log_density(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, " samples"]:
        standard = (free - self.mean) / self.std
        return -0.5 * (standard**2 + math.log(2 * math.pi)).sum(1) - np.log(self.std).sum()

    def states(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, "samples size"]:
        return free


@dataclass(frozen=True)
class Dirichlet:
    """Weights on the simplex; in the free coordinates log(w_k / w_K) the density is prod_k w_k^alpha_k / B(alpha)."""

    alpha: Float[np.ndarray, " size"]

    def sample(self, rng: np.random.Generator, samples: int) -> Float[np.ndarray, "samples free"]:
        # Gamma(a) = Gamma(a + 1) U^(1/a), in logs: weights of sparse users would underflow.
        shape = (samples, len(self.alpha))
        log_gamma = np.log(rng.standard_gamma(self.alpha + 1.0, shape)) + np.log1p(-rng.random(shape)) / self.alpha
        return log_gamma[:, :-1] - log_gamma[:, -1:]

    def log_density(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, " samples"]:
        normaliser = sum(math.lgamma(a) for a in self.alpha) - math.lgamma(self.alpha.sum())
        return self._log_weights(free) @ self.alpha - normaliser

    def states(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, "samples size"]:
        return np.exp(self._log_weights(free))

    def _log_weights(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, "samples size"]:
        logits = np.concatenate([free, np.zeros((len(free), 1))], axis=1)
        top = logits.max(1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


@dataclass(frozen=True)
class Softmax:
    """Weights softmax(omega) with omega ~ N(0, std^2), the prior of PAL (arXiv 2406.08469); omega is free."""

    size: int
    std: float

    def sample(self, rng: np.random.Generator, samples: int) -> Float[np.ndarray, "samples free"]:
        return self.std * rng.standard_normal((samples, self.size))

    def log_density(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, " samples"]:
        return -0.5 * ((free / self.std) ** 2 + math.log(2 * math.pi * self.std**2)).sum(1)

    def states(self, free: Float[np.ndarray, "samples free"]) -> Float[np.ndarray, "samples size"]:
        power = np.exp(free - free.max(1, keepdims=True))
        return power / power.sum(1, keepdims=True)


@dataclass(frozen=True)
class Finite:
    """A known list of possible states, so that posteriors are exact sums."""

    atoms: Float[np.ndarray, "atoms size"]
    weights: Float[np.ndarray, " atoms"]


@dataclass(frozen=True)
class Noise:
    """What lies between a user's log-odds and the recorded answer.

    careless_share of the users answer the wrong side with probability `flip_rate`; `position_bias` is added to the
    log-odds of the response shown first; ties follow Davidson, P(tie) ~ tie_strength beside e^(l/2) and e^(-l/2), or
    Rao-Kupper, P(first) = s(l - tie_strength), P(second) = s(-l - tie_strength).
    """

    careless_share: float = 0.0
    flip_rate: float = 0.3
    position_bias: float = 0.0
    ties: str | None = None
    tie_strength: float = 0.5

    @property
    def hypotheses(self) -> tuple[tuple[float, float], ...]:
        """The kinds of user that there may be: (share, flip probability), careful first."""
        kinds = ((1.0 - self.careless_share, 0.0), (self.careless_share, self.flip_rate))
        return tuple(kind for kind in kinds if kind[0] > 0)

    def __post_init__(self) -> None:
        if not (0 <= self.careless_share <= 1 and 0 <= self.flip_rate <= 1):
            raise ValueError(f"shares and rates lie in [0, 1]: got {self.careless_share} and {self.flip_rate}")
        if self.ties not in (None, "davidson", "rao_kupper"):
            raise ValueError(f"ties={self.ties!r}: use None, 'davidson' or 'rao_kupper'")
        if self.tie_strength < 0:
            raise ValueError(f"tie_strength={self.tie_strength}: use a number >= 0")

    def outcomes(
        self, log_odds: Float[np.ndarray, " *shape"], flip: Float[np.ndarray, " *shape"] | float = 0.0
    ) -> tuple[Float[np.ndarray, " *shape"], Float[np.ndarray, " *shape"], Float[np.ndarray, " *shape"]]:
        """Return P(first), P(tie), P(second) for a user who flips an answer with probability `flip`.

        >>> [round(float(p[0]), 3) for p in Noise(ties="davidson", tie_strength=1.0).outcomes(np.zeros(1))]
        [0.333, 0.333, 0.333]
        """
        first, tie, second = self._honest(np.asarray(log_odds, float) + self.position_bias)
        return (1 - flip) * first + flip * second, tie, (1 - flip) * second + flip * first

    def _honest(self, log_odds: Float[np.ndarray, " *shape"]):
        if self.ties is None:
            first = sigmoid(log_odds)
            return first, np.zeros_like(log_odds), 1.0 - first
        if self.ties == "rao_kupper":
            first, second = sigmoid(log_odds - self.tie_strength), sigmoid(-log_odds - self.tie_strength)
            return first, 1.0 - first - second, second
        half = 0.5 * np.abs(log_odds)  # divide by the larger term, so that nothing overflows
        total = 1.0 + self.tie_strength * np.exp(-half) + np.exp(-2 * half)
        winner, loser = 1.0 / total, np.exp(-2 * half) / total
        first = np.where(log_odds >= 0, winner, loser)
        return first, self.tie_strength * np.exp(-half) / total, winner + loser - first
