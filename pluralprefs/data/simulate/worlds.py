"""Populations with known truth: tables of comparisons whose users, items and noise were drawn from a stated law.

Each function draws items, users and answers, and returns a `World`: the table of comparisons with its cells already
set, the item features, the true parameters, and everything that `bayes` needs to say how well the best method could do.
Cells follow from construction. A fifth of the users is unseen; items belong to prompts and are compared within one,
and a fifth of the prompts is new; a fifth of the pairs of items is held out for every user at once.

All labels come from log-odds l(user, first, second), kept in the column `true_log_odds`, through P(first) = s(l).
Random streams are separate by purpose, so that a world with more comparisons keeps its users and items.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from pluralprefs.data.simulate.rows import (
    Layout,
    Rows,
    comparisons_table,
    draw_communities,
    draw_layout,
    in_order,
    names,
    positions,
    random_rows,
    stream,
    triangle_rows,
)
from pluralprefs.data.simulate.states import (
    Angle,
    Cycle,
    Dirichlet,
    Distance,
    Finite,
    Gaussian,
    Linear,
    LogOdds,
    Noise,
    Pairs,
    Prior,
    Softmax,
)


@dataclass(frozen=True)
class World:
    """A simulated population: its comparisons, its truth, and the law both were drawn from.

    items   features, one row an item, in the order of `item_ids` (sorted, as in an item table)
    truth   arrays; `user` holds the state of every user in the order of `user_ids`, `careless` who answers carelessly
    """

    name: str
    table: pl.DataFrame
    item_ids: tuple[str, ...]
    items: Float[np.ndarray, "items dim"]
    user_ids: tuple[str, ...]
    community_ids: tuple[str, ...]
    truth: dict[str, np.ndarray]
    log_odds: LogOdds
    prior: Prior | Finite
    noise: Noise = field(default_factory=Noise)

    def pairs(self, table: pl.DataFrame) -> Pairs:
        """Return the rows as positions of items and communities; an id from another world is a ValueError."""
        first, second = (positions(table[name], self.item_ids) for name in ("first_id", "second_id"))
        no_community = np.zeros(len(table), np.int64)
        community = positions(table["community_id"], self.community_ids) if self.community_ids else no_community
        return Pairs(first, second, community)

    def features(self, item_ids: pl.Series) -> Float[np.ndarray, "rows dim"]:
        """Return the features of items by id, for example of the `item_id` column of an item table."""
        return self.items[positions(item_ids, self.item_ids)]

    def true_log_odds(self, table: pl.DataFrame) -> Float[np.ndarray, " rows"]:
        """Return l(user, first, second) of every row under the true parameters."""
        users, pairs = positions(table["user_id"], self.user_ids), self.pairs(table)
        log_odds = np.zeros(len(table))
        for user in np.unique(users):
            rows = np.flatnonzero(users == user)
            own = Pairs(*(part[rows] for part in pairs))
            log_odds[rows] = self.log_odds(self.truth["user"][user : user + 1], own)[0]
        return log_odds

    def flip_rates(self, table: pl.DataFrame) -> Float[np.ndarray, " rows"]:
        """Return each row's true probability of a careless flip."""
        return self.noise.flip_rate * self.truth["careless"][positions(table["user_id"], self.user_ids)]

    def attribute_table(self) -> pl.DataFrame:
        """Return the table with the item features as columns `attr:x0:first`, `attr:x0:second`, ..."""
        sides = {side: self.features(self.table[f"{side}_id"]) for side in ("first", "second")}
        names = (
            (f"attr:x{index}:{side}", sides[side][:, index]) for index in range(self.items.shape[1]) for side in sides
        )
        return self.table.with_columns([pl.Series(name, values) for name, values in names])


def hierarchical(
    *,
    users: int = 60,
    communities: int = 4,
    items: int = 120,
    comparisons_per_user: int = 80,
    prompts: int = 10,
    dim: int = 8,
    population_std: float = 0.5,
    community_std: float = 0.35,
    user_std: float = 0.5,
    communities_per_user: int = 2,
    seed: int = 0,
) -> World:
    """Draw partially pooled users: w = w_0 + d_community(row) + d_user, l = w . (e_first - e_second).

    Every coordinate of the three parts is normal with the stated standard deviation; features are N(0, 1). The
    community belongs to the row: each user writes in `communities_per_user` of them.
    """
    layout = draw_layout(users, items, prompts, seed)
    features = stream(seed, "items").standard_normal((items, dim))
    shared = stream(seed, "shared").standard_normal((1 + communities, dim))
    population, community = population_std * shared[0], community_std * shared[1:]
    rows = random_rows(layout, comparisons_per_user, seed)
    return assemble(
        "hierarchical",
        layout,
        rows,
        features,
        truth={"population": population, "community": community, "user": _gaussian(users, dim, user_std, seed)},
        log_odds=Linear(features, population + community),
        prior=Gaussian(np.zeros(dim), np.full(dim, user_std)),
        community_ids=names("community", communities),
        community=draw_communities(rows.user, users, communities, communities_per_user, seed),
        seed=seed,
    )


def low_rank(
    *,
    users: int = 60,
    items: int = 120,
    comparisons_per_user: int = 80,
    prompts: int = 10,
    dim: int = 16,
    rank: int = 3,
    weights: str = "free",
    concentration: float = 0.5,
    std: float = 2.0,
    scale: float = 2.0,
    seed: int = 0,
) -> World:
    """Draw users r_u(y) = scale e' V w_u with V of `rank` orthonormal columns.

    weights="free": w_u ~ N(0, I), so that the population has no preference; "simplex": w_u ~ Dirichlet(concentration);
    "softmax": w_u = softmax(omega), omega ~ N(0, std^2).
    """
    layout = draw_layout(users, items, prompts, seed)
    features = stream(seed, "items").standard_normal((items, dim))
    basis = np.linalg.qr(stream(seed, "shared").standard_normal((dim, rank)))[0]
    if weights == "free":
        prior, states = Gaussian(np.zeros(rank), np.ones(rank)), _gaussian(users, rank, 1.0, seed)
    elif weights == "simplex":
        prior, states = _dirichlet(users, rank, concentration, seed)
    elif weights == "softmax":
        prior, states = _softmax(users, rank, std, seed)
    else:
        raise ValueError(f"weights={weights!r}: use 'free', 'simplex' or 'softmax'")
    return assemble(
        f"low_rank/{weights}",
        layout,
        random_rows(layout, comparisons_per_user, seed),
        features,
        truth={"basis": basis, "user": states},
        log_odds=Linear(scale * features @ basis, np.zeros((1, rank))),
        prior=prior,
        seed=seed,
    )


def ideal_point(
    *,
    users: int = 60,
    items: int = 120,
    comparisons_per_user: int = 80,
    prompts: int = 10,
    dim: int = 16,
    point: int = 4,
    prototypes: int = 3,
    delta: float = 2.0,
    mixture: str = "dirichlet",
    concentration: float = 0.5,
    std: float = 2.0,
    scale: float | None = 4.0,
    seed: int = 0,
) -> World:
    """Draw users of the ideal-point model (PAL, arXiv 2406.08469).

    l = scale (|f(e_second) - a_u| - |f(e_first) - a_u|), where f is a random linear map from `dim` to `point`
    coordinates and items are N(0, I/dim), so that |f(e)|^2 is about `point`; a_u = sum_k w_uk p_k with prototypes at
    pairwise distance >= `delta`. mixture="dirichlet" draws w_u from Dirichlet(concentration), "softmax" is
    softmax(N(0, std^2)); "one_hot" gives every user one prototype. scale=None makes labels the sign of l.
    """
    layout, shared = draw_layout(users, items, prompts, seed), stream(seed, "shared")
    features = stream(seed, "items").standard_normal((items, dim)) / np.sqrt(dim)
    projection = shared.standard_normal((dim, point))
    centres = _separated(shared, prototypes, point, delta)
    prior, states = _mixture(users, prototypes, mixture, concentration, std, seed)
    return assemble(
        f"ideal_point/{mixture}",
        layout,
        random_rows(layout, comparisons_per_user, seed),
        features,
        truth={"projection": projection, "prototypes": centres, "user": states},
        log_odds=Distance(features @ projection, centres, scale),
        prior=prior,
        seed=seed,
    )


def ideal_direction(
    *,
    users: int = 60,
    items: int = 120,
    comparisons_per_user: int = 80,
    prompts: int = 10,
    dim: int = 16,
    point: int = 4,
    prototypes: int = 3,
    delta: float = 2.0,
    mixture: str = "dirichlet",
    concentration: float = 0.5,
    std: float = 2.0,
    scale: float | None = 6.0,
    seed: int = 0,
) -> World:
    """Draw users of the ideal-direction model (PAL-B, arXiv 2406.08469) whose directions do not depend on the prompt.

    l = scale (cos(f(e_first), z_u) - cos(f(e_second), z_u)) with z_u = sum_k w_uk g_k, w_u as in
    `ideal_point`, f a random linear map and directions g_k at pairwise distance >= `delta`.
    """
    layout, shared = draw_layout(users, items, prompts, seed), stream(seed, "shared")
    features = stream(seed, "items").standard_normal((items, dim)) / np.sqrt(dim)
    projection = shared.standard_normal((dim, point))
    directions = _separated(shared, prototypes, point, delta)
    prior, states = _mixture(users, prototypes, mixture, concentration, std, seed)
    return assemble(
        f"ideal_direction/{mixture}",
        layout,
        random_rows(layout, comparisons_per_user, seed),
        features,
        truth={"projection": projection, "directions": directions, "user": states},
        log_odds=Angle(features @ projection, directions, scale),
        prior=prior,
        seed=seed,
    )


def cyclic(
    *,
    users: int = 60,
    items: int = 90,
    comparisons_per_user: int = 60,
    prompts: int = 5,
    dim: int = 4,
    jitter: float = 0.05,
    reversed_share: float = 0.0,
    scale: float | None = None,
    seed: int = 0,
) -> World:
    """Draw rock-paper-scissors users: an item of type t beats type t + 1 (mod 3); `reversed_share` of the users differ.

    Comparisons come in triangles (one item of each type), and every pair lies in one triangle, which is wholly in one
    cell. So pair types are equally many in every cell, and ANY scalar score, even one number an item, orders at most
    two of three noise-free pairs. Winners are shown first in every other triangle. Features are three directions of a
    random plane plus jitter N(0, jitter^2); scale=None makes labels certain.
    """
    if items % (3 * prompts):
        raise ValueError(f"items={items}: use a multiple of 3 x prompts = {3 * prompts}, equal types in every prompt")
    layout, users_stream = draw_layout(users, items, prompts, seed), stream(seed, "users")
    types = (np.arange(items) // prompts) % 3
    plane = np.linalg.qr(stream(seed, "shared").standard_normal((dim, 2)))[0]
    angles = 2 * np.pi * types / 3
    features = np.stack([np.cos(angles), np.sin(angles)], 1) @ plane.T
    features += jitter * stream(seed, "items").standard_normal((items, dim))
    orientation = np.where(users_stream.random(users) < reversed_share, -1.0, 1.0)[:, None]
    return assemble(
        "cyclic",
        layout,
        triangle_rows(layout, types, comparisons_per_user, seed),
        features,
        truth={"type": types, "user": orientation},
        log_odds=Cycle(types, scale),
        prior=Finite(np.array([[1.0], [-1.0]]), np.array([1.0 - reversed_share, reversed_share])),
        seed=seed,
    )


def noisy(world: World, *, seed: int = 0, **noise: float | str | None) -> World:
    """Return the world with the same users and pairs, answered again under `Noise(**noise)`.

    The careless users are in `truth["careless"]`; `true_log_odds` stays the preference behind the answer.
    """
    law = Noise(**noise)  # pyright: ignore[reportArgumentType]: Noise checks its own fields
    careless = stream(seed, "noise").random(len(world.user_ids)) < law.careless_share
    truth = world.truth | {"careless": careless.astype(float)}
    return _answer(replace(world, noise=law, truth=truth, name=f"{world.name}/noisy"), seed)


def assemble(
    name: str,
    layout: Layout,
    rows: Rows,
    features: Float[np.ndarray, "items dim"],
    *,
    truth: dict[str, np.ndarray],
    log_odds: LogOdds,
    prior: Prior | Finite,
    seed: int,
    community_ids: tuple[str, ...] = (),
    community: Int[np.ndarray, " rows"] | None = None,
) -> World:
    """Put a world together and let its users answer."""
    item_ids, user_ids = names("item", len(features)), names("user", len(layout.seen))
    table = comparisons_table(name, layout, rows, item_ids, user_ids, seed)
    if community is not None:
        table = table.with_columns(community_id=pl.Series(np.array(community_ids)[community], dtype=pl.Utf8))
    truth = truth | {"careless": np.zeros(len(user_ids))}
    world = World(name, table, item_ids, features, user_ids, community_ids, truth, log_odds, prior)
    return _answer(world, seed)


def _answer(world: World, seed: int) -> World:
    """Draw the three-way answers of every row."""
    log_odds = world.true_log_odds(world.table)
    first, tie, _ = world.noise.outcomes(log_odds, world.flip_rates(world.table))
    draw = stream(seed, "answers").random(len(log_odds))
    tied = (draw >= first) & (draw < first + tie)
    target = np.where(tied, 0.5, draw < first)
    return replace(world, table=in_order(world.table.with_columns(target=target, tie=tied, true_log_odds=log_odds)))


def _gaussian(users: int, size: int, std: float, seed: int) -> Float[np.ndarray, "users size"]:
    return std * stream(seed, "users").standard_normal((users, size))


def _dirichlet(users: int, size: int, concentration: float, seed: int):
    prior = Dirichlet(np.full(size, concentration))
    return prior, prior.states(prior.sample(stream(seed, "users"), users))


def _softmax(users: int, size: int, std: float, seed: int):
    prior = Softmax(size, std)
    return prior, prior.states(prior.sample(stream(seed, "users"), users))


def _mixture(users: int, prototypes: int, mixture: str, concentration: float, std: float, seed: int):
    if mixture == "dirichlet":
        return _dirichlet(users, prototypes, concentration, seed)
    if mixture == "softmax":
        return _softmax(users, prototypes, std, seed)
    if mixture != "one_hot":
        raise ValueError(f"mixture={mixture!r}: use 'dirichlet', 'softmax' or 'one_hot'")
    atoms = np.eye(prototypes)
    chosen = stream(seed, "users").integers(prototypes, size=users)
    return Finite(atoms, np.full(prototypes, 1 / prototypes)), atoms[chosen]


def _separated(rng: np.random.Generator, size: int, dim: int, delta: float) -> Float[np.ndarray, "size dim"]:
    """Normal points, drawn again (and slowly spread) until all pairs are at least delta apart."""
    spread = 1.0
    while True:
        points = spread * rng.standard_normal((size, dim))
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + delta * np.eye(size)
        if distance.min() >= delta:
            return points
        spread *= 1.01


def attribute_table(world: str, **sizes: Any) -> pl.DataFrame:
    """Return the table of a world by name with its features as attribute columns: what an experiment's `data` needs.

    >>> attribute_table("hierarchical", users=6, comparisons_per_user=4).height
    24
    """
    makers = {
        "hierarchical": hierarchical,
        "low_rank": low_rank,
        "ideal_point": ideal_point,
        "ideal_direction": ideal_direction,
        "cyclic": cyclic,
    }
    if world not in makers:
        raise ValueError(f"world {world!r} is none of {', '.join(makers)}")
    return makers[world](**sizes).attribute_table()
