"""The implicit reward of a language model that reads its user from the prompt (FSPO, arXiv 2502.19312).

    r(x, y | C) = beta [log pi(y | C, x) - log pi_ref(y | C, x)]           `Item.log_ratio` is the bracket
    l = r(first) - r(second) = beta h

The user C is the shots in the prompt, which the item has been read with (`encoders.in_context`), so the user state is
empty. With `likelihoods.IPO(beta)` the loss is (h - 1 / (2 beta))^2; with `likelihoods.Logistic` it is that of
DPO (arXiv 2305.18290), with label smoothing where asked for.
"""

from __future__ import annotations

from typing import Any, Self

from jaxtyping import Array, Float

from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Item, Key


@pytree
class ImplicitReward:
    """See the module. The user state is (): users differ by what their items were read with."""

    beta: float = static(default=0.005)

    def __post_init__(self) -> None:
        if not self.beta > 0.0:
            raise ValueError(f"beta is {self.beta}; an implicit reward needs beta > 0")

    @classmethod
    def init(cls, *, key: Key | None = None, beta: float = 0.005, **_: Any) -> Self:
        """There is nothing to draw: the parameters are the language model's."""
        return cls(beta)

    def init_user(self) -> tuple[()]:
        return ()

    def reward(self, user: tuple[()], item: Item) -> Float[Array, ""]:
        """Raises ValueError for an item without log_ratio."""
        if item.log_ratio is None:
            raise ValueError("an implicit reward reads Item.log_ratio, which these items lack: encode them with "
                             "encoders.in_context")  # fmt: skip
        return self.beta * item.log_ratio

    def log_odds(self, user: tuple[()], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)
