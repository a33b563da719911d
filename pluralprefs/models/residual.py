"""A population, and on top of it what shots say of a user: the form in which inferred users are fitted and scored.

    l(u) = scale(n) {l_0 + trust(n) odd + even(n) even} + spread d' R z
    odd = [f(u) - f(u')] / 2        even = [f(u) + f(u')] / 2 - f(prior)

l_0 are the log-odds of a population (`population` at its state `weights`), f those of a family that infers its users
(`family`), u the user that it infers from n shots (of a weight above 0), u' from the same shots with their labels
reversed, prior from none. Without shots the log-odds are the population's, times `scale`. The odd part is what the
answers say, and reverses with them; the even part is what the shots say whichever way they were answered: a correction
of the population, where it is not noise. `trust` and `even` are how much of each held-out users bore out at
`shots` many shots, interpolated in log(1 + n), so that a user who has shown something is not served worse than one who
has shown nothing. Weights of more than `most` together, the most that held-out users bore out, count as
`most`, unless these users said that it copes (`trust.py` decides).

What shots leave open of a user (`LeavesOpen`) lies in the directions in which users differ: d are combinations (`axes`)
of what `OTHERS` users of the training get of a response, and of its features (`directions.py`). z ~ N(0, 1) is what is
not known, and R R' how much of it n shots leave:

    R R' = [1 + efficiency(n) spread^2 sum_i w_i p_i (1 - p_i) d_i d_i']^-1        d_i of the two responses of shot i

(Laplace's method, as in Rasmussen and Williams 2006, 3.4, at the p_i that the family says itself), so that less is open
where the user has been asked. `spread` is how far users depart from the population, in log-odds; `efficiency` the share
of what shots tell that the family has read, 0 where it is not trusted at all. The mean user has none of what is open.
What is predicted is a mean over all users who would have shown such shots; one of them is sharper by `scale`.

What shots say is borne out less where the family has met nothing like them, so that all of these are there twice: for
shots of two responses that training knows (`Item.index`), and for others. A user who has shown both has the mean of the
two, by how many of each; each kind has its own `most`. What is asked does not count. The family reads shots with l_0
added to their `offset`, as it was trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons, Item, Replaceable, UserPosterior

OTHERS = 32  # users of the training, by whom it is known how users differ
DIRECTIONS = 16  # at most, in which they do
MOST_TOLD = 1e3  # of the prior's precision, by one shot: more makes systems that float32 does not solve


@pytree
class Residual(Replaceable):
    """See the module. The user state is the family's ("state"), that of the reversed shots ("reversed"), trust, even
    and scale at its number of shots, spread, and R ("open")."""

    population: Any
    weights: Any
    family: Any
    prior: Any
    shots: Float[Array, "2 knots"]
    trust: Float[Array, "2 knots"]
    even: Float[Array, "2 knots"]
    scale: Float[Array, "2 knots"]
    efficiency: Float[Array, "2 knots"]
    spread: Float[Array, ""]
    most: Float[Array, 2]
    others: Any
    axes: Float[Array, "others+dim directions"]
    is_reduced: bool = static(default=False)

    @classmethod
    def init(cls, *, population: Any, family: Any, knots: int, dim: int, **_: Any) -> Self:
        """The population alone: nothing that the family says is trusted yet."""
        shots = jnp.tile(jnp.arange(knots, dtype=jnp.float32), (2, 1))
        zero, one = jnp.zeros_like(shots), jnp.ones_like(shots)
        prior = family.init_user()
        others = jax.tree.map(lambda x: jnp.repeat(x[None], OTHERS, axis=0), prior)
        return cls(population, population.init_user(), family, prior, shots, zero, zero, one, zero, jnp.zeros(()),
                   jnp.zeros(2), others, jnp.zeros((OTHERS + dim, DIRECTIONS)))  # fmt: skip

    def init_user(self) -> dict[str, Any]:
        zero, state, known = jnp.zeros(()), self.family.init_user(), jnp.eye(self.axes.shape[1])
        return {"state": state, "reversed": state, "trust": zero, "even": zero, "scale": jnp.ones(()), "spread": zero,
                "open": known}  # fmt: skip

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior:
        """The family's user of these shots, and what is to be made of it; the prior, without trust, of no shots.

        A covariance of the family's own is not used: it is of the state alone, before anybody has said how far that
        is to be trusted.
        """
        asked, support = support, self._plain(support)
        count = jnp.sum(support.weight > 0)  # as trust was learned, whatever the weights
        known = met(support.first) & met(support.second)
        kinds = jnp.where(jnp.stack([known, ~known]), support.weight[None], 0.0)  # a row for each kind of shot
        total, most = jnp.sum(kinds, axis=1, keepdims=True), jnp.maximum(self.most[:, None], 1e-6)
        weight = jnp.sum(kinds * most / jnp.maximum(total, most), axis=0)
        offset = jax.vmap(partial(self.population.log_odds, self.weights))(support.first, support.second)
        shots = support.replace(offset=support.offset + offset, weight=weight)
        own, other = (self.family.infer_user(shots.replace(target=said)) for said in (shots.target, 1 - shots.target))
        share = jnp.where(count > 0, jnp.sum(kinds > 0, axis=1) / jnp.maximum(count, 1), jnp.array([1.0, 0.0]))

        def at(values: Float[Array, "2 knots"]) -> Float[Array, ""]:
            return share @ jax.vmap(partial(jnp.interp, jnp.log1p(count)))(jnp.log1p(self.shots), values)

        learned = {"trust": at(self.trust), "even": at(self.even), "scale": at(self.scale), "spread": self.spread}
        known = at(self.efficiency) * self.spread**2 * self.known(own.mean, shots, asked)
        triangle = jnp.linalg.cholesky(jnp.eye(known.shape[0]) + known)
        root = jax.scipy.linalg.solve_triangular(triangle, jnp.eye(known.shape[0]), lower=True).T
        return UserPosterior({"state": own.mean, "reversed": other.mean, **learned, "open": root})

    def known(
        self, state: Any, shots: Comparisons[Item], asked: Comparisons[Item]
    ) -> Float[Array, "directions directions"]:
        """What shots tell of the unknowns: the curvature of their log-likelihood at what the family says.

        `asked` are the same comparisons, of responses that may be `reduced`.
        """

        def one(row: Comparisons[Item], asked: Comparisons[Item]) -> tuple[Array, Array]:
            said, nothing = (self.family.reward(u, row.first) - self.family.reward(u, row.second)
                             for u in (state, self.prior))  # fmt: skip
            p = jax.nn.sigmoid(row.offset + said - nothing)
            return row.weight * p * (1 - p), self.directions(asked.first) - self.directions(asked.second)

        bend, apart = jax.vmap(one)(shots, asked)
        size = jnp.maximum(self.spread * jnp.linalg.norm(apart, axis=1), 1.0)
        return (apart * jnp.minimum(bend, MOST_TOLD / size**2)[:, None]).T @ apart

    def reduced(self, items: Item) -> tuple[Self, Item]:
        """`types.ReducesItems`: beside its features, an item has what it has of each direction (`directions`)."""
        if self.is_reduced:
            return self, items
        found = jax.lax.map(self.directions, items, batch_size=1024)
        both = jnp.concatenate([jnp.asarray(items.embedding, found.dtype), found], axis=1)
        return self.replace(is_reduced=True), items.replace(embedding=both)

    def _plain(self, tree: Any) -> Any:
        """An item, or comparisons of items, as the family and the population know them."""
        if not self.is_reduced:
            return tree
        if isinstance(tree, Item):
            return tree.replace(embedding=tree.embedding[..., : self._dim()])
        return tree.replace(first=self._plain(tree.first), second=self._plain(tree.second))

    def _dim(self) -> int:
        return self.axes.shape[0] - jax.tree.leaves(self.others)[0].shape[0]

    def reward(self, user: dict[str, Any], item: Item) -> Float[Array, ""]:
        item = self._plain(item)
        own, other, prior = (self.family.reward(u, item) for u in (user["state"], user["reversed"], self.prior))
        shift = user["trust"] * (own - other) / 2 + user["even"] * ((own + other) / 2 - prior)
        return user["scale"] * (self.population.reward(self.weights, item) + shift)

    def left_open(self, user: dict[str, Any], item: Item) -> Float[Array, " directions"]:
        return user["spread"] * self.directions(item) @ user["open"]

    def directions(self, item: Item) -> Float[Array, " directions"]:
        """What an item has of each direction in which users differ."""
        if self.is_reduced:
            return item.embedding[..., self._dim() :]
        rewards = jax.vmap(self.family.reward, (0, None))(self.others, item)
        return jnp.concatenate([rewards, item.embedding]) @ self.axes

    def log_odds(self, user: dict[str, Any], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)


def met(items: Item) -> Bool[Array, " rows"]:
    """Whether training knows each item; where nobody says which it knows, it does."""
    return jnp.ones(len(items.embedding), bool) if items.index is None else items.index >= 0
