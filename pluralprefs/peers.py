"""A prior for new users that is no Gaussian: to be like one of the users of the training, whichever.

    p(d) = (1 / P) sum_u N(d; m_u, C_u),        m_u, C_u the posterior of user u of the training

A round of nonparametric empirical Bayes (Laird 1978, Journal of the American Statistical Association 73, 805-811): the
mean of the posteriors is the prior that a step of expectation-maximisation makes of the Gaussian. It has the shape
that users have: types, mixtures that lie near corners. A new user's posterior is a mixture too, each Gaussian weighed
by how well it explains the comparisons (`adapt.laplace_user`).

Whether users are better described so is asked of users of the training, each without their own Gaussian: the evidence
of all their comparisons under the mixture of the others, against that under the Gaussian prior.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import logsumexp

from pluralprefs.adapt import covariance_root, peer_posteriors, reduced, solve_rows
from pluralprefs.adapting import adapt_units
from pluralprefs.blas import one_blas_thread
from pluralprefs.fitting import Fitted, Rows, buckets, gathered, padded, strangers, take
from pluralprefs.types import InfersUser, Item, LinearInUser
from pluralprefs.users import Peers, Pooled, Users, ravel

FEWEST = 20  # users of whom the shape of a population can be told
ASKED = 300  # users whose evidence is compared, at most
LARGEST = 32  # coordinates of a state
AT_ONCE = 16  # users, each with a system a peer


def check_peers(model: Any, pooled: Pooled) -> None:
    """Raise ValueError for a family or a table whose new users cannot have peers."""
    name = type(getattr(model, "family", model)).__name__
    if isinstance(model, (LinearInUser, InfersUser)) or hasattr(model, "attribute_weights"):
        raise ValueError(f"users.peers: {name} has no use for them: leave it out, or take low_rank or an ideal point")
    if pooled.gain or pooled.levels != ("user",):
        raise ValueError('users.peers: needs users.gain = false and users.levels = ["user"]')


def with_peers(fitted: Fitted, items: Item, most: int) -> Fitted:
    """The fit whose new users have peers, at most so many, where left-out users bear that out; notes say."""
    rows, table = fitted.rows, fitted.users.replace(peers=None)
    user = np.asarray(rows.user)
    known = np.random.default_rng(0).permutation(np.unique(user[(user >= 0) & (np.asarray(rows.weight) > 0)]))
    if len(known) < FEWEST:
        return fitted
    size = table.user_root.shape[0]
    if size > LARGEST + 1:
        raise ValueError(f"users.peers: the user state has {size - 1} coordinates, more than {LARGEST}: leave it out")
    chosen = np.sort(known[:most])
    found = adapt_units(fitted.model, table, items, *_of(rows, user, chosen))
    peers = Peers(
        mean=jnp.stack([ravel(one.mean)[0] for one in found.values()]),
        root=jnp.stack([_square(one.covariance) for one in found.values()]),
    )
    asked = np.sort(known[:ASKED])
    alone, among = _evidence(fitted.model, table, items, peers, *_of(rows, user, asked))
    own = asked[:, None] == chosen[None, :]
    left_out = np.where(own, -np.inf, among)
    mixture = logsumexp(left_out, axis=1) - np.log(np.maximum((~own).sum(1), 1))
    notes: dict[str, Any] = {
        "peers_evidence": {"gaussian": float(alone.sum()), "peers": float(mixture.sum()), "users": len(asked)}
    }
    if mixture.sum() <= alone.sum():
        return replace(fitted, notes=fitted.notes | notes)
    notes["peers"] = len(chosen)
    return replace(fitted, users=table.replace(peers=peers), notes=fitted.notes | notes)


def _of(rows: Rows, user: np.ndarray, chosen: np.ndarray) -> tuple[Rows, np.ndarray]:
    own = np.flatnonzero(np.isin(user, chosen))
    return take(rows, own), user[own]


def _square(covariance: Any) -> Float[Array, "size size"]:
    """A root of a covariance that is square, whatever its factor."""
    factor = covariance_root(jax.tree.map(jnp.asarray, covariance))
    values, vectors = jnp.linalg.eigh(factor @ factor.T)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]


@one_blas_thread()
def _evidence(
    model: Any, users: Users, items: Item, peers: Peers, rows: Rows, unit: np.ndarray
) -> tuple[Float[np.ndarray, " users"], Float[np.ndarray, "users peers"]]:
    """Log evidence of each user's rows under the Gaussian prior and under each peer's, users in order."""
    model, items = reduced(model, items)
    rows, order = strangers(rows), np.unique(unit)
    alone, among = np.zeros(len(order)), np.zeros((len(order), peers.mean.shape[0]))
    for units, index in buckets(unit, 2 * peers.mean.shape[1]):
        place = np.searchsorted(order, units)
        by_gaussian, by_peer = _evidences(model, users, items, peers, padded(rows, index))
        alone[place], among[place] = by_gaussian[: len(units)], by_peer[: len(units)]
    return alone, among


@jax.jit
def _evidences(model: Any, users: Users, items: Item, peers: Peers, rows: Rows) -> tuple[Array, Array]:
    def one(own: Rows) -> tuple[Array, Array]:
        support = gathered(items, own)
        by_peer, _, _ = peer_posteriors(model, support, users, peers)
        return solve_rows(model, support, users, users.user_root).evidence, by_peer

    return jax.lax.map(partial(one), rows, batch_size=AT_ONCE)
