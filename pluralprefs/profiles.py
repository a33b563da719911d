"""Attribute profiles: what a community, or a user, likes and looks at, with intervals.

One row per community (and user, on request), attribute and kind:

    preference   signed weight of the attribute: the slope of the log-odds on the difference of the attribute's scores,
                 the other attributes held fixed, over the training comparisons. Interval: the empirical-Bayes posterior
                 of the community, plus what the shared parameters leave open (half of the users against the other),
                 widened by the spread between seeds; of the population, from which communities depart (it is not
                 their mean), the latter two
    attention    mean attention alpha over the responses that the community judged. Interval: over its responses
    ablation     nats per comparison that are lost when the attribute is taken away, on test rows. Interval: over users
    shapley      the same nats shared out over all orders in which attributes could be added (Shapley 1953); exact, for
                 `FEW` attributes or fewer

Attention says where a model looks, not which way it pulls nor whether it matters: an attribute with constant score may
get all of it. Preference says the direction, ablation the worth; they stand side by side (PrefPalette, arXiv
2507.13541, uses attention alone). A preference is a slope, not a parameter, because parameters alone are not
identified: what `preference` says of all people, the head can say as well. Attributes go by name, never by position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import comb
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.adapt import left_open, variance
from pluralprefs.adapting import predict_rows, seen_on
from pluralprefs.communities import community_posteriors
from pluralprefs.fitting import Fitted, Rows, gathered, take
from pluralprefs.intervals import estimate_mean
from pluralprefs.types import Comparisons, Covariance, Item, UserPosterior
from pluralprefs.users import Deviation, Users, deviating_log_odds, gather, neutral, ravel

NORMAL = 1.959964
FEW = 6  # attributes whose every subset is tried
RCOND = 1e-4  # scores are float32: what they do not tell apart is not divided by
BORROWED = 4  # communities' worth of the mean over attributes in the variance of one
SLOPE_ROWS = 4096  # comparisons that a slope is taken over, at most
SCHEMA = {
    "community": pl.String, "user": pl.String, "attribute": pl.String, "kind": pl.String, "mean": pl.Float64,
    "ci_low": pl.Float64, "ci_high": pl.Float64, "n": pl.Int64, "seed": pl.Int64,
}  # fmt: skip
Slopes = tuple[Float[np.ndarray, " attributes"], Float[np.ndarray, " attributes"]]  # mean and variance


class Sample(NamedTuple):
    """Comparisons that slopes are taken over, and what turns their log-odds into slopes: made once for all users."""

    rows: Comparisons[Item]
    inverse: Float[jax.Array, "attributes rows"]

    @classmethod
    def of(cls, items: Item, rows: Rows) -> Sample:
        """Gather the rows and solve least squares on the differences of their scores, all attributes at once.

        An attribute whose scores never differ gets slope 0; collinear attributes share theirs.
        """
        score = np.asarray(_scores(items), np.float64)
        difference = score[np.asarray(rows.first)] - score[np.asarray(rows.second)]
        spread = np.sqrt((difference**2).mean(0))
        spread = np.where(spread > 0, spread, 1.0)
        inverse = np.linalg.pinv(difference / spread, rcond=RCOND) / spread[:, None]
        return cls(gathered(items, jax.tree.map(jnp.asarray, rows)), jnp.asarray(inverse, jnp.float32))


def attribute_weights(
    fitted: Fitted, items: Item, test: Rows, communities: Sequence[str], attributes: Sequence[str], *, seed: int = 0,
    asked: Sequence[int] | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Profile every community of one fit; `test` are held-out rows of seen users. "" is the population.

    `asked` are the numbers of the communities to profile, where that is not all and the population. Raises TypeError
    for a family without attributes.
    """
    _require_attributes(fitted.model, items)
    fitted = _without_stand_in(fitted)
    numbers = range(-1, len(communities)) if asked is None else asked
    names = {number: communities[number] if number >= 0 else "" for number in numbers}
    found = [*_preferences(fitted, items, names), *_attention(fitted, items, names)]
    if len(test.target):
        community, users = np.asarray(test.community), pl.Series(np.asarray(test.user)).replace(-1, None)
        predicted = seen_on(fitted, items, test)
        for kind, at, lost in _worth(lambda view: _nats(*predicted(view), test), items):
            for number, name in names.items():
                own = community == number if number >= 0 else np.ones(len(community), bool)
                found += [
                    (at, row) for row in _mean_row({"community": name}, kind, lost[own], users.filter(pl.Series(own)))
                ]
    return _table(found, attributes, seed)


def user_weights(
    fitted: Fitted, items: Item, users: Mapping[str, tuple[int, UserPosterior, int | None]], communities: Sequence[str],
    attributes: Sequence[str], *, seed: int = 0, test: Mapping[str, Rows] | None = None,
) -> pl.DataFrame:  # fmt: skip
    """Profile users, each (number of the community or -1, posterior, comparisons behind it): preference and attention.

    The interval of a preference holds the user's posterior, the community's and the shared parameters' variance: it is
    too wide rather than too narrow, for what a user's own comparisons say of the community is counted twice.
    Attention is over the responses of the training rows. `test` are held-out rows of users, which ablation and Shapley
    values are taken on: intervals are over the rows, as if each were judged on its own, which the pairs of one ordering
    are not. Raises TypeError for a family without attributes.
    """
    _require_attributes(fitted.model, items)
    fitted = _without_stand_in(fitted)
    rows = _spread(fitted.rows)
    sample = Sample.of(items, rows)
    around = _community_slopes(fitted, items, sample, {community for community, *_ in users.values()})
    responses = jax.tree.map(lambda x: x[np.unique(np.concatenate([rows.first, rows.second]))], items)
    found = []
    for name, (community, posterior, n) in users.items():
        value, spread = slopes(fitted.model, fitted.users, sample, posterior, community)
        own = jax.tree.map(jnp.add, gather(fitted.users, jnp.asarray(community), jnp.asarray(-1))[0],
                           posterior.mean.state)  # fmt: skip
        alpha = np.asarray(_alpha(fitted.model, own, responses))
        place = {"community": communities[community] if community >= 0 else "", "user": name}
        half = NORMAL * np.sqrt(spread + np.nan_to_num(around[community][1]))
        error = NORMAL * alpha.std(0) / np.sqrt(len(alpha))
        for at in range(len(attributes)):
            found.append((at, _row(place, "preference", value[at], half[at], n)))
            found.append((at, _row(place, "attention", alpha[:, at].mean(), error[at], len(alpha))))
        if (asked := (test or {}).get(name)) is not None:
            nobody = pl.Series([None] * len(asked.target), dtype=pl.Int64)
            for kind, at, lost in _worth(partial(_own_nats, fitted, posterior, asked), items):
                found += [(at, row) for row in _mean_row(place, kind, lost, nobody)]
    return _table(found, attributes, seed)


def over_seeds(weights: pl.DataFrame) -> pl.DataFrame:
    """Average profiles over seeds; an interval is widened by the spread between them. `seed` is null then.

    Runs from before users had profiles have tables without the column `user`: all their rows are of communities.
    """
    if "user" not in weights.columns:
        weights = weights.with_columns(user=pl.lit(None, pl.String))
    half = (pl.col("ci_high") - pl.col("ci_low")) / 2 / NORMAL
    grouped = weights.group_by("community", "user", "attribute", "kind", maintain_order=True).agg(
        pl.col("mean").mean(), within=(half**2).mean(), between=pl.col("mean").var().fill_null(0.0), n=pl.col("n").max()
    )
    half_width = NORMAL * (pl.col("within") + pl.col("between")).sqrt()
    wide = grouped.with_columns(
        ci_low=pl.col("mean") - half_width, ci_high=pl.col("mean") + half_width, seed=pl.lit(None, pl.Int64)
    )
    return wide.select(list(SCHEMA))


def profile_table(weights: pl.DataFrame, kind: str = "preference") -> str:
    """Lay one kind out in text: attributes down, communities across, mean [low, high]; * where that excludes zero.

    Raises ValueError for a kind that the rows do not have.
    """
    chosen = weights.filter(kind=kind)
    if not chosen.height:
        raise ValueError(f"kind {kind!r}: the profile has {', '.join(sorted(weights['kind'].unique()))}; ablation and "
                         "shapley (six attributes or fewer) want held-out comparisons: --test, test=")  # fmt: skip
    everybody = "(population)" if "population" in chosen["community"] else "population"
    place = pl.when(pl.col("user").is_not_null()).then("user").when(pl.col("community") == "").then(pl.lit(everybody))
    chosen = chosen.with_columns(place=place.otherwise("community"))
    names = list(dict.fromkeys(chosen["place"]))
    lines = [[kind, *names]]
    for attribute in dict.fromkeys(chosen["attribute"]):
        own = {row["place"]: row for row in chosen.filter(attribute=attribute).iter_rows(named=True)}
        lines.append([attribute, *(_cell(own.get(name)) for name in names)])
    width = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    text = ["  ".join(field.ljust(n) for field, n in zip(line, width, strict=True)).rstrip() for line in lines]
    return "\n".join(text)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    star = "*" if row["ci_low"] is not None and row["ci_low"] * row["ci_high"] > 0 else " "
    low, high = (float("nan") if row[end] is None else row[end] for end in ("ci_low", "ci_high"))
    return f"{row['mean']:+.2f}{star}[{low:+.2f}, {high:+.2f}]"


def slopes(model: Any, users: Users, sample: Sample, posterior: UserPosterior, community: int = -1) -> Slopes:
    """Slope of the log-odds on each attribute's score difference, and its variance, under a user's posterior.

    The user departs from `community` (-1: from the population).
    """
    found, spread = _slopes(model, users, *sample, posterior.replace(base=""), jnp.asarray(community))
    return np.asarray(found, np.float64), np.asarray(spread, np.float64)


@jax.jit
def _slopes(
    model: Any, users: Users, rows: Comparisons[Item], inverse: Any, posterior: UserPosterior, community: Any
) -> tuple[jax.Array, jax.Array]:
    vector, unravel = ravel(posterior.mean)
    base, _ = gather(users, community, jnp.asarray(-1))

    def value(v: Any, row: Comparisons[Item]) -> jax.Array:
        return deviating_log_odds(model, base, unravel(v), row.replace(offset=jnp.zeros(())), users.scale)

    found = inverse @ jax.vmap(partial(value, vector))(rows)
    gradients = inverse @ jax.vmap(lambda row: jax.grad(value)(vector, row))(rows)
    here = rows.replace(community=jnp.full_like(rows.community, community))
    beside = jnp.sum((inverse @ jax.vmap(lambda row: left_open(model, users, posterior, row))(here)) ** 2, axis=1)
    if posterior.covariance is None:
        return found, beside
    return found, beside + jax.vmap(partial(variance, posterior.covariance))(gradients)


def community_slopes(fitted: Fitted, items: Item, count: int, rows: Rows | None = None) -> list[Slopes]:
    """Slopes of the population (first, variance of the shared parameters alone) and of each community.

    They are taken over `rows`, the training rows by default: of a model that is not linear in the scores they depend on
    the comparisons. The population's variance is NaN where no halves of the users could be compared: it is unknown, not
    zero. Communities have the variance of their own posterior then, which is too little.
    """
    sample = Sample.of(items, _spread(fitted.rows if rows is None else rows))
    return list(_community_slopes(fitted, items, sample, range(-1, count)).values())


def _community_slopes(fitted: Fitted, items: Item, sample: Sample, asked: Collection[int]) -> dict[int, Slopes]:
    """Slopes of the communities asked for, by number, the population as -1 first."""
    shared = fitted.notes.get("preference_variance", {})
    value, none = slopes(fitted.model, fitted.users, sample, _point(fitted.model))
    found = {-1: (value, none + shared.get("population", np.nan))}
    alone, posteriors = community_posteriors(fitted, items, sorted(set(asked) - {-1}))
    size = fitted.users.user_root.shape[0]
    anyone = UserPosterior(neutral(fitted.model), Covariance(fitted.users.user_root, jnp.zeros((0, size))))
    for number, posterior in posteriors.items():
        mean, spread = slopes(fitted.model, alone, sample, posterior)
        _, of_users = slopes(fitted.model, fitted.users, sample, anyone, number)
        share = _shares(fitted.rows, number)
        found[number] = mean, spread + np.asarray(shared.get("community", 0.0)) + of_users * (share**2).sum()
    return found


def _shares(rows: Rows, community: int) -> Float[np.ndarray, " users"]:
    """Share of a community's training rows that each of its users judged; nobody's where there are none.

    A community is known through its members: its slope holds the members' deviations in these shares.
    """
    users = np.asarray(rows.user)[np.asarray(rows.community) == community]
    known = np.unique(users[users >= 0], return_counts=True)[1]
    count = np.concatenate([known, np.ones((users < 0).sum(), int)])  # a row without a user is somebody's alone
    return count / max(len(users), 1)


def preference_variance(halves: Sequence[Fitted], items: Item, count: int) -> dict[str, Any]:
    """Variance of slopes that comes from the shared parameters: of the population, and of communities by attribute.

    `halves` are fits whose shared parameters are those of half of the users each: their difference has four times the
    variance of a fit to all (see `pooling.shared_variance`). An attribute's is the mean over `count` communities and
    `BORROWED` that stand at the mean of all attributes: shared parameters know some attributes less well than others.
    """
    plain = map(_without_stand_in, halves)
    one, other = (np.stack([mean for mean, _ in community_slopes(half, items, count)]) for half in plain)
    square = (one - other) ** 2 / 4
    found = (square[1:].sum(0) + BORROWED * square[1:].mean()) / (count + BORROWED) if count else 0.0 * square[0]
    return {"population": float(square[0].mean()), "community": found.tolist()}


def _without_stand_in(fitted: Fitted) -> Fitted:
    """The fit whose attributes are gone where they are taken away, not read from the text instead."""
    if getattr(fitted.model, "stand_in", None) is None:
        return fitted
    return replace(fitted, model=fitted.model.replace(stand_in=None))


def _preferences(fitted: Fitted, items: Item, names: Mapping[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    community = np.asarray(fitted.rows.community)
    found = _community_slopes(fitted, items, Sample.of(items, _spread(fitted.rows)), set(names))
    for number, name in names.items():
        value, spread = found[number]
        n = int((community == number).sum()) if number >= 0 else len(community)
        half = NORMAL * np.sqrt(spread)
        for at in range(len(value)):
            yield at, _row({"community": name}, "preference", value[at], half[at], n)


def _spread(rows: Rows) -> Rows:
    """Training rows that all slopes are taken over, spread evenly."""
    count = len(rows.target)
    return take(rows, np.linspace(0, count - 1, min(count, SLOPE_ROWS)).astype(int))


def _scores(items: Item) -> Any:
    """Calibrated scores of the items' attributes, 0 where one is not at hand: [items, attributes]."""
    score = items.attributes[..., 0]  # pyright: ignore[reportOptionalSubscript]
    return score if items.attribute_mask is None else jnp.where(items.attribute_mask, score, 0.0)


def _point(model: Any) -> UserPosterior:
    """Nobody's deviation, for certain."""
    return UserPosterior(Deviation(model.init_user(), jnp.zeros(())))


def _attention(fitted: Fitted, items: Item, names: Mapping[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = fitted.rows
    community = np.asarray(rows.community)
    for number, name in names.items():
        chosen = community == number if number >= 0 else np.ones(len(community), bool)
        responses = np.unique(np.concatenate([rows.first[chosen], rows.second[chosen]]))
        if not len(responses):
            continue
        state, _ = gather(fitted.users, jnp.asarray(number), jnp.asarray(-1))
        weights = np.asarray(_alpha(fitted.model, state, jax.tree.map(lambda x, r=responses: x[r], items)))
        mean, error = weights.mean(0), weights.std(0) / np.sqrt(len(weights))
        for at in range(weights.shape[1]):
            yield at, _row({"community": name}, "attention", mean[at], NORMAL * error[at], len(weights))


@jax.jit
def _alpha(model: Any, state: Any, items: Item) -> jax.Array:
    return jax.lax.map(lambda item: model.attribute_weights(state, item), items, batch_size=1024)


def _worth(nats: Callable[[Item], np.ndarray], items: Item) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (kind, attribute, what the attribute is worth on each test row), given the nats that items cost there.

    Ablation: nats with the attribute masked minus nats with all, users adapted with all of them. Shapley: nats that it
    saves on average over the orders of adding attributes; they sum to what all save.
    """
    count = _mask(items).shape[-1]
    every = frozenset(range(count))
    subsets = [frozenset(s) for size in range(count + 1) for s in combinations(range(count), size)]
    asked = subsets if count <= FEW else [every, *(every - {at} for at in range(count))]
    cost = {subset: nats(_with_only(items, subset)) for subset in asked}
    for at in range(count):
        yield "ablation", at, cost[every - {at}] - cost[every]
    for at in range(count if count <= FEW else 0):
        saved = np.zeros_like(cost[every])
        for subset in subsets:
            if at not in subset:
                weight = 1 / (count * comb(count - 1, len(subset)))
                saved += weight * (cost[subset] - cost[subset | {at}])
        yield "shapley", at, saved


def _mean_row(place: Mapping[str, str], kind: str, values: np.ndarray, users: pl.Series) -> list[dict[str, Any]]:
    """The mean of a value of each test row with its interval over users, or rows where users are unknown; no row
    where there is no test row."""
    if not len(values):
        return []
    found = estimate_mean(values, users, np.ones(len(values)), 1000, 0)
    row = _row(place, kind, found.value, 0.0, len(values))
    return [row | {"ci_low": found.ci_low, "ci_high": found.ci_high}]


def _mask(items: Item) -> np.ndarray:
    """Which attributes are at hand: [items, attributes]."""
    shape = items.attributes.shape[:-1]  # pyright: ignore[reportOptionalMemberAccess]
    return np.ones(shape, bool) if items.attribute_mask is None else np.asarray(items.attribute_mask)


def _with_only(items: Item, subset: Any) -> Item:
    """The items with all attributes but these taken away."""
    keep = np.isin(np.arange(_mask(items).shape[-1]), list(subset))
    return items.replace(attribute_mask=jnp.asarray(_mask(items) & keep))


def _own_nats(fitted: Fitted, posterior: UserPosterior, test: Rows, asked: Item) -> Float[np.ndarray, " rows"]:
    """Nats of each test row of one adapted user, predicted on `asked`."""
    return _nats(*predict_rows(fitted.model, fitted.users, asked, posterior, test), test)


def _nats(mean: np.ndarray, variance: np.ndarray, test: Rows) -> Float[np.ndarray, " rows"]:
    logits, target = mean / np.sqrt(1 + np.pi * variance / 8), np.asarray(test.target)
    return target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)


def _require_attributes(model: Any, items: Item) -> None:
    if items.attributes is None or not hasattr(model, "attribute_weights"):
        raise TypeError(f"{type(model).__name__} has no attributes to profile: fit attribute_attention")


def _table(found: Sequence[tuple[int, dict[str, Any]]], attributes: Sequence[str], seed: int) -> pl.DataFrame:
    rows = [{"user": None, "attribute": attributes[at], "seed": seed, **row} for at, row in found]
    return pl.DataFrame(rows, schema=SCHEMA)


def _row(place: Mapping[str, str], kind: str, mean: float, half: float, n: int | None) -> dict[str, Any]:
    mean, half = float(mean), float(half)
    low, high = (None, None) if np.isnan(half) else (mean - half, mean + half)
    return {**place, "kind": kind, "mean": mean, "ci_low": low, "ci_high": high, "n": n}
