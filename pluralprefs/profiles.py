"""Attribute profiles: what a community, or a user, likes and looks at, with intervals.

One row per community, attribute and kind:

    preference   signed weight of the attribute, in log-odds per unit of its score: population plus community. Interval:
                 the community's empirical-Bayes posterior, widened by the spread between seeds
    attention    mean attention alpha over the responses that the community judged. Interval: over its responses
    ablation     nats per comparison that are lost when the attribute is taken away, on test rows. Interval: over users

Attention says where a model looks, not which way it pulls nor whether it matters: an attribute with constant score may
get all of it. Preference says the direction, ablation the worth; they stand side by side (METHODS of PrefPalette,
arXiv 2507.13541, uses attention alone). Attributes go by name, never by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.adapting import predict_seen
from pluralprefs.fitting import Fitted, Rows, solve_level, strangers
from pluralprefs.intervals import estimate_mean
from pluralprefs.types import Item
from pluralprefs.users import neutral, part_names

NORMAL = 1.959964
SCHEMA = {
    "community": pl.String, "attribute": pl.String, "kind": pl.String, "mean": pl.Float64, "ci_low": pl.Float64,
    "ci_high": pl.Float64, "n": pl.Int64, "seed": pl.Int64,
}  # fmt: skip


def attribute_weights(
    fitted: Fitted, items: Item, test: Rows, communities: Sequence[str], attributes: Sequence[str], *, seed: int = 0
) -> pl.DataFrame:
    """Profile every community of one fit; `test` are held-out rows of seen users. "" is the population.

    Raises TypeError for a family without attributes.
    """
    if items.attributes is None or not hasattr(fitted.model, "attribute_weights"):
        raise TypeError(f"{type(fitted.model).__name__} has no attributes to profile: fit attribute_attention")
    names = ["", *communities]
    found = [
        *_preferences(fitted, items, names),
        *_attention(fitted, items, names),
        *_ablation(fitted, items, test, names),
    ]
    rows = [{"attribute": attributes[at], "seed": seed, **row} for at, row in found]
    return pl.DataFrame(rows, schema=SCHEMA)


def over_seeds(weights: pl.DataFrame) -> pl.DataFrame:
    """Average profiles over seeds; an interval is widened by the spread between them. `seed` is null then."""
    half = (pl.col("ci_high") - pl.col("ci_low")) / 2 / NORMAL
    grouped = weights.group_by("community", "attribute", "kind", maintain_order=True).agg(
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
        raise ValueError(f"kind {kind!r}: the profile has {', '.join(sorted(weights['kind'].unique()))}")
    names = list(dict.fromkeys(chosen["community"]))
    lines = [[kind, *(name or "population" for name in names)]]
    for attribute in dict.fromkeys(chosen["attribute"]):
        own = {row["community"]: row for row in chosen.filter(attribute=attribute).iter_rows(named=True)}
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


def community_posterior(
    fitted: Fitted, items: Item, count: int
) -> tuple[Float[np.ndarray, "communities size"], Float[np.ndarray, "communities size"]]:
    """Mean and standard deviation of the communities' deviations, given the training rows."""
    users, rows = fitted.users, fitted.rows
    root = np.asarray(users.community_root)
    empty = users.replace(community=jax.tree.map(lambda x: x[:0], users.community))
    flat = strangers(rows).replace(community=np.full_like(rows.community, -1))
    moments = solve_level(fitted.model, empty, items, flat, np.asarray(rows.community), count, root)
    return moments.mean * root, np.sqrt(moments.variance) * root


def _preferences(fitted: Fitted, items: Item, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Population and communities, multiplied by the scale of the log-odds."""
    parts = np.array(part_names(neutral(fitted.model)))
    scale = float(fitted.users.scale)
    population = np.asarray(fitted.users.population["preference"], float)
    mean, deviation = community_posterior(fitted, items, len(names) - 1)
    judged = np.bincount(np.asarray(fitted.rows.community)[fitted.rows.community >= 0], minlength=len(names) - 1)
    own, spread = mean[:, parts == "preference"], deviation[:, parts == "preference"]
    for number, name in enumerate(names):
        value = population + (own[number - 1] if number else 0.0)
        half = NORMAL * (spread[number - 1] if number else np.zeros(len(population)))
        n = int(judged[number - 1]) if number else len(fitted.rows.target)
        for at in range(len(population)):
            low, high = value[at] - half[at], value[at] + half[at]
            yield at, _row(name, "preference", scale * value[at], scale * low, scale * high, n)


def _attention(fitted: Fitted, items: Item, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = fitted.rows
    community = np.asarray(rows.community)
    for number, name in enumerate(names):
        chosen = community == number - 1 if number else np.ones(len(community), bool)
        responses = np.unique(np.concatenate([rows.first[chosen], rows.second[chosen]]))
        if not len(responses):
            continue
        own = jax.tree.map(lambda x, i=number: x[i - 1] if i else 0.0 * x[:1].sum(0), fitted.users.community.state)
        state = jax.tree.map(jnp.add, fitted.users.population, own)
        weights = np.asarray(_alpha(fitted.model, state, jax.tree.map(lambda x, r=responses: x[r], items)))
        mean, error = weights.mean(0), weights.std(0) / np.sqrt(len(weights))
        for at in range(weights.shape[1]):
            low, high = mean[at] - NORMAL * error[at], mean[at] + NORMAL * error[at]
            yield at, _row(name, "attention", mean[at], low, high, len(weights))


@jax.jit
def _alpha(model: Any, state: Any, items: Item) -> jax.Array:
    return jax.lax.map(lambda item: model.attribute_weights(state, item), items, batch_size=1024)


def _ablation(fitted: Fitted, items: Item, test: Rows, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Nats with an attribute masked minus nats with all, users adapted with all of them."""
    if not len(test.target) or items.attributes is None:
        return
    plain = _nats(fitted, items, items, test)
    community, users = np.asarray(test.community), pl.Series(np.asarray(test.user))
    mask = np.ones(items.attributes.shape[:-1], bool) if items.attribute_mask is None else items.attribute_mask
    for at in range(items.attributes.shape[-2]):
        without = items.replace(attribute_mask=jnp.asarray(mask).at[:, at].set(False))
        lost = _nats(fitted, items, without, test) - plain
        for number, name in enumerate(names):
            chosen = community == number - 1 if number else np.ones(len(community), bool)
            if chosen.any():
                found = estimate_mean(lost[chosen], users.filter(pl.Series(chosen)), np.ones(chosen.sum()), 1000, 0)
                yield at, _row(name, "ablation", found.value, found.ci_low, found.ci_high, int(chosen.sum()))


def _nats(fitted: Fitted, items: Item, asked: Item, test: Rows) -> Float[np.ndarray, " rows"]:
    """Nats of each test row, its user adapted on `items` and predicted on `asked`."""
    count = int(items.embedding.shape[0])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), items, asked)
    query = test.replace(first=test.first + count, second=test.second + count)
    mean, variance = predict_seen(fitted, both, query)
    logits, target = mean / np.sqrt(1 + np.pi * variance / 8), np.asarray(test.target)
    return target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)


def _row(community: str, kind: str, mean: float, low: float | None, high: float | None, n: int) -> dict[str, Any]:
    return {"community": community, "kind": kind, "mean": float(mean), "ci_low": low, "ci_high": high, "n": n}
