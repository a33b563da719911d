"""Fit one Bradley-Terry head per attribute on a shared frozen encoder, all attributes in one compiled program.

Minimised for each attribute a over its ordered pairs i, with features x of the encoder, centred and scaled:

    mean_i [t_i softplus(-d_i) + (1 - t_i) softplus(d_i)] + l2_a / 2 |theta_a|^2,    d = r_a(high) - r_a(low)

with r_a(x) = w_a . phi_a(x) and target t = 1 for an ordered pair, 1/2 for two texts that stand equal on the attribute.
phi is the identity (Newton's method: the problem is convex) or one hidden layer tanh(V_a x + b_a) (Adam, full batch).
PrefPalette (arXiv 2507.13541) trains one model per attribute instead. Attributes run in groups of `TOGETHER`, which
bounds the memory, and share products with the features of texts, of which there are fewer than pairs. Each attribute's
start is drawn from its name, so that its fit depends on its own pairs and the features alone. Both may come from other
attributes too: texts that stand equal are rewrites of those, and centre, scale and kernel of the features are of all
texts (`fitting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from pluralprefs.data.ids import stable_hash
from pluralprefs.pytrees import pytree

NEWTON_STEPS, SOLVE_STEPS = 15, 40  # a system of every Newton step is solved by products alone
ADAM_STEPS, LEARNING_RATE = 300, 1e-2
TOGETHER = 32  # attributes at once


@pytree
class Rows:
    """Ordered pairs of every attribute as rows of a table of texts; rows of weight 0 are padding."""

    low: Any  # Int[Array, "attributes pairs"]
    high: Any  # Int[Array, "attributes pairs"]
    target: Any  # Float[Array, "attributes pairs"]
    weight: Any  # Float[Array, "attributes pairs"]

    @classmethod
    def of(cls, pairs: Sequence[Sequence[tuple[int, int]]], equal: Sequence[Sequence[tuple[int, int]]] = ()) -> Rows:
        """Pad the (low, high) pairs of each attribute, then those of equal texts, to one length.

        >>> Rows.of([[(0, 1), (0, 2)], [(1, 2)]], equal=[[], [(0, 2)]]).target.tolist()
        [[1.0, 1.0], [1.0, 0.5]]
        """
        same = equal or [()] * len(pairs)
        whole = [[*ordered, *level] for ordered, level in zip(pairs, same, strict=True)]
        longest = max(map(len, whole), default=0) or 1
        filled = np.zeros((len(whole), longest, 2), np.int32)
        target, weight = np.ones((2, len(whole), longest), np.float32) * np.array([1.0, 0.0])[:, None, None]
        for attribute, rows in enumerate(whole):
            if rows:
                filled[attribute, : len(rows)] = rows
                weight[attribute, : len(rows)] = 1.0
                target[attribute, len(pairs[attribute]) : len(rows)] = 0.5
        return cls(filled[..., 0], filled[..., 1], target.astype(np.float32), weight.astype(np.float32))


@pytree
class Heads:
    """Weights of all attributes; `hidden` and `bias` are None where the reward is linear in the features."""

    weight: Any  # Float[Array, "attributes width"]
    hidden: Any = None  # Float[Array, "attributes dim width"]
    bias: Any = None  # Float[Array, "attributes width"]


def fit_heads(
    features: Float[np.ndarray, "texts dim"],
    rows: Rows,
    l2: Float[np.ndarray, " attributes"],
    names: Sequence[str],
    *,
    hidden: tuple[int, ...] = (),
    seed: int = 0,
) -> Heads:
    """Fit the heads of all attributes. hidden: () for linear heads, (width,) for one hidden layer.

    Raises ValueError for more than one hidden layer.
    """
    if len(hidden) > 1:
        raise ValueError(f"hidden={hidden}: use () for linear heads or (width,) for one hidden layer")
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), stable_hash(name) % 2**31) for name in names])
    found = _fit(jnp.asarray(features), rows, jnp.asarray(l2, jnp.float32), keys, width=hidden[0] if hidden else 0)
    return jax.tree.map(np.asarray, found)


@partial(jax.jit, static_argnames="width")
def _fit(features: Float[Array, "texts dim"], rows: Rows, l2: Any, keys: Any, width: int) -> Heads:
    def one(arguments: tuple[Rows, Any, Any]) -> Heads:
        mine, strength, key = arguments
        return _hidden(features, mine, strength, key, width) if width else _linear(features, mine, strength)

    return jax.lax.map(one, (rows, l2, keys), batch_size=min(TOGETHER, len(keys)))


def nats(difference: Any, target: Any) -> Any:
    """What it costs to predict log-odds `difference` where the target is the chance of the high side."""
    return target * jax.nn.softplus(-difference) + (1 - target) * jax.nn.softplus(difference)


def _linear(features: Float[Array, "texts dim"], rows: Rows, l2: Any) -> Heads:
    """Newton's method, each system by conjugate gradients; a step is the best of 1, 1/2 and 1/4 of it."""
    share = rows.weight / jnp.maximum(rows.weight.sum(), 1.0)

    def differences(w: Array) -> Array:
        rewards = features @ w  # of texts, not of pairs: with all attributes at once it is a product of two matrices
        return rewards[rows.high] - rewards[rows.low]

    def transposed(of_pairs: Array) -> Array:
        of_texts = jnp.zeros(features.shape[0]).at[rows.high].add(of_pairs).at[rows.low].add(-of_pairs)
        return of_texts @ features

    def objective(w: Array) -> Array:
        return share @ nats(differences(w), rows.target) + 0.5 * l2 * w @ w

    def step(_: Any, w: Array) -> Array:
        chance = jax.nn.sigmoid(differences(w))
        gradient = l2 * w - transposed(share * (rows.target - chance))
        curvature = share * chance * (1 - chance)
        newton, _ = cg(lambda v: transposed(curvature * differences(v)) + l2 * v, gradient, maxiter=SOLVE_STEPS)
        trials = w[None] - jnp.array([[1.0], [0.5], [0.25]]) * newton[None]
        return trials[jnp.argmin(jax.vmap(objective)(trials))]

    return Heads(jax.lax.fori_loop(0, NEWTON_STEPS, step, jnp.zeros(features.shape[1])))


def _hidden(features: Float[Array, "texts dim"], rows: Rows, l2: Any, key: Any, width: int) -> Heads:
    """Adam on all pairs at once, the learning rate falling to zero on a cosine."""
    first, second = jax.random.split(key)
    dim = features.shape[1]
    start = Heads(
        weight=jax.random.normal(first, (width,)) / np.sqrt(width),
        hidden=jax.random.normal(second, (dim, width)) / np.sqrt(dim),
        bias=jnp.zeros(width),
    )
    share = rows.weight / jnp.maximum(rows.weight.sum(), 1.0)

    def objective(heads: Heads) -> Array:
        rewards = jnp.tanh(features @ heads.hidden + heads.bias[None]) @ heads.weight
        size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(heads))
        return share @ nats(rewards[rows.high] - rewards[rows.low], rows.target) + 0.5 * l2 * size

    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, ADAM_STEPS))

    def step(_: Any, carry: tuple[Heads, Any]) -> tuple[Heads, Any]:
        heads, state = carry
        updates, state = adam.update(jax.grad(objective)(heads), state)
        return jax.tree.map(jnp.add, heads, updates), state

    return jax.lax.fori_loop(0, ADAM_STEPS, step, (start, adam.init(start)))[0]  # pyright: ignore[reportArgumentType]
