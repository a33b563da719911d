"""Question: how many users adapt in a second, against one call of SciPy a user?

Command: make bench                       (or: python benchmarks/adapt_users.py [--many])

2,000 users with 16 comparisons each over K features, after compilation: `laplace_user` under `vmap`, with covariance,
against `scipy.optimize.minimize` (L-BFGS, analytic gradient, no covariance) on the same objective, in the same run.
Both find the same mode, which is checked first. `--many` instead prints the seconds of 10,000 such users, MAP by
gradient (`fit_user`, K = 8) and posteriors with covariance (factors), in chunks that bound the memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from pluralprefs.adapt import fit_user, laplace_user
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.types import Comparisons, Item
from pluralprefs.users import Users

USERS, SHOTS, SCIPY_USERS, MANY, CHUNK = 2000, 16, 200, 10_000, 500


def drawn(users: int, features: int) -> tuple[BradleyTerry, Users, Comparisons[Item]]:
    """A family, its table at the prior N(0, I), and the rows [users, SHOTS] of users drawn from that prior."""
    draw = np.random.default_rng(0)
    first, second = draw.standard_normal(size=(2, users, SHOTS, features), dtype=np.float32)
    weight = draw.normal(size=(users, features, 1))
    target = (draw.random((users, SHOTS)) < expit((first - second) @ weight)[..., 0]).astype(np.float32)
    model = BradleyTerry.init(key=jax.random.key(0), dim=features, item_effects=False)
    table = Users.init(model, users=0, communities=0, strength=1.0)
    none = np.full((users, SHOTS), -1, np.int32)
    support = Comparisons(
        first=Item(embedding=first), second=Item(embedding=second), target=target, tie=np.zeros_like(none, bool),
        user=none, community=none, rater=none, source=none, offset=np.zeros_like(target), weight=np.ones_like(target),
    )  # fmt: skip
    return model, table, jax.tree.map(jnp.asarray, support)


def many(features: int, name: str, adapt: Callable[..., Any]) -> None:
    """Print the seconds in which `adapt` fits MANY users."""
    model, table, support = drawn(MANY, features)
    support = jax.tree.map(lambda leaf: leaf.reshape(-1, CHUNK, *leaf.shape[1:]), support)
    chunked = jax.jit(lambda rows: jax.lax.map(jax.vmap(lambda one: adapt(model, one, table)), rows))
    jax.block_until_ready(chunked(support))  # compiles
    seconds = timed(lambda: jax.block_until_ready(chunked(support)))
    print(f"{MANY} users x {SHOTS} comparisons, K = {features:3d}, {name}: {seconds:.2f} s", flush=True)


def one(features: int) -> None:
    """Print both rates and their ratio for one number of features."""
    model, table, support = drawn(USERS, features)
    first, second, target = np.asarray(support.first.embedding), np.asarray(support.second.embedding), support.target
    target = np.asarray(target, float)
    mode = jax.jit(jax.vmap(lambda rows: laplace_user(model, rows, table, rounds=0)))
    ours = jax.jit(jax.vmap(lambda rows: laplace_user(model, rows, table)))
    difference = (first - second).astype(float)

    def scipy_mode(u: int) -> np.ndarray:
        def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
            logits = difference[u] @ w
            nats = np.logaddexp(0, logits) - target[u] * logits
            return nats.sum() + 0.5 * w @ w, (expit(logits) - target[u]) @ difference[u] + w

        return minimize(objective, np.zeros(features), jac=True, method="L-BFGS-B").x

    found = np.asarray(mode(support).mean.state["linear"])
    worst = max(np.abs(found[u] - scipy_mode(u)).max() for u in range(20))
    assert worst < 1e-2, f"the two modes differ by {worst}"
    jax.block_until_ready(ours(support))
    rate = USERS / timed(lambda: jax.block_until_ready(ours(support)))
    scipy_rate = SCIPY_USERS / timed(lambda: [scipy_mode(u) for u in range(SCIPY_USERS)])
    print(f"K = {features:4d}: {rate:9.0f} users/s, SciPy {scipy_rate:6.0f} users/s, ratio {rate / scipy_rate:.1f}")


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of several repeats."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


if __name__ == "__main__":
    if sys.argv[1:] == ["--many"]:
        many(8, "MAP by gradient", fit_user)
        for size in (8, 32, 384):
            many(size, "posterior", laplace_user)
    elif sys.argv[1:]:
        sys.exit(f"{' '.join(sys.argv[1:])}: only --many is known")
    else:
        for size in (8, 32, 384):
            one(size)
