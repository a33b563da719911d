"""Profiles of communities are recomputed by hand from a model whose parameters are known."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from families import FAMILIES, items, pick, rows

from pluralprefs.fitting import Fitted
from pluralprefs.profiles import SCHEMA, attribute_weights, over_seeds
from pluralprefs.types import Item
from pluralprefs.users import Users

NAMES = ("warmth", "length", "wit")


def fitted_and_items(count=6, judged=80, strength=0.7):
    draw = np.random.default_rng(0)
    model = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * draw.normal(size=x.shape), x.dtype), FAMILIES["attribute_attention"]()
    )
    x = items(1, count=count)
    table = Users.init(model, users=4, communities=2, strength=strength)
    population = {"attention": jnp.asarray([0.3, -0.2, 0.1]), "preference": jnp.asarray([1.0, 0.0, -1.0])}
    table = table.replace(population=population, user_root=jnp.zeros(7), scale=jnp.float32(1.5))
    first, second = draw.integers(0, count, (2, judged))
    judgements = jax.tree.map(np.asarray, rows(first, second, draw.integers(0, 2, judged).astype(float)))
    community = (np.arange(judged) % 2).astype(np.int32)
    judgements = judgements.replace(user=(np.arange(judged) % 4).astype(np.int32), community=community)
    return Fitted(model, table, judgements), x


def of(weights, community, kind):
    """The means of a community and kind, in the order of NAMES."""
    part = weights.filter(pl.col("community") == community, pl.col("kind") == kind)
    return np.array([part.filter(pl.col("attribute") == name)["mean"][0] for name in NAMES])


def test_every_community_attribute_and_kind_has_one_row_with_an_interval():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES, seed=3)
    assert dict(found.schema) == SCHEMA
    assert found.height == 3 * 3 * 3
    assert found.select("community", "attribute", "kind").is_unique().all()
    assert ((found["ci_low"] <= found["mean"]) & (found["mean"] <= found["ci_high"])).all()
    assert found["seed"].unique().to_list() == [3]


def test_preference_is_population_plus_community_in_log_odds_per_unit_of_score():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    np.testing.assert_allclose(of(found, "", "preference"), 1.5 * np.array([1.0, 0.0, -1.0]), rtol=1e-6)
    tight, _ = fitted_and_items(strength=1e-4)
    near = attribute_weights(tight, x, tight.rows, ("cats", "dogs"), NAMES)
    np.testing.assert_allclose(of(near, "cats", "preference"), 1.5 * np.array([1.0, 0.0, -1.0]), atol=1e-3)
    assert np.abs(of(found, "cats", "preference") - of(found, "dogs", "preference")).max() > 0.05


def test_a_community_without_comparisons_is_at_its_prior():
    fitted, x = fitted_and_items()
    fitted.rows = fitted.rows.replace(community=np.zeros_like(fitted.rows.community))
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    dogs = found.filter(pl.col("community") == "dogs", pl.col("kind") == "preference")
    np.testing.assert_allclose(dogs["mean"], 1.5 * np.array([1.0, 0.0, -1.0]), atol=1e-5)
    np.testing.assert_allclose((dogs["ci_high"] - dogs["ci_low"]) / 2, 1.959964 * 1.5 * 0.7, rtol=1e-4)
    assert found.filter(pl.col("community") == "dogs", pl.col("kind") == "attention").height == 0


def test_attention_is_the_mean_over_responses_and_sums_to_one():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    seen = np.unique(np.concatenate([fitted.rows.first, fitted.rows.second]))
    own = [fitted.model.attribute_weights(fitted.users.population, pick(x, i)) for i in seen]
    np.testing.assert_allclose(of(found, "", "attention"), np.mean(own, axis=0), rtol=1e-5)
    for community in ("", "cats", "dogs"):
        assert of(found, community, "attention").sum() == pytest.approx(1.0, abs=1e-5)


def test_ablation_is_the_rise_in_nats_when_the_attribute_is_masked():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)

    def nats(mask):
        one = x.replace(attribute_mask=jnp.broadcast_to(jnp.asarray(mask), (6, 3)))
        user = fitted.users.population
        lost = []
        for a, b, t in zip(fitted.rows.first, fitted.rows.second, fitted.rows.target, strict=True):
            logit = 1.5 * float(fitted.model.log_odds(user, pick(one, int(a)), pick(one, int(b))))
            lost.append(np.logaddexp(0, -logit) if t else np.logaddexp(0, logit))
        return np.mean(lost)

    whole = nats([True, True, True])
    expected = [nats([i != at for i in range(3)]) - whole for at in range(3)]
    np.testing.assert_allclose(of(found, "", "ablation"), expected, atol=2e-5)


def test_seeds_are_averaged_and_widen_the_interval():
    base = {"community": "cats", "attribute": "wit", "kind": "preference", "n": 10}
    rows_of = [
        base | {"mean": m, "ci_low": m - 1.959964, "ci_high": m + 1.959964, "seed": s} for s, m in enumerate((0.0, 2.0))
    ]
    found = over_seeds(pl.DataFrame(rows_of, schema=SCHEMA))
    assert found["mean"].to_list() == [1.0]
    assert found["ci_high"][0] == pytest.approx(1.0 + 1.959964 * np.sqrt(1.0 + 2.0))
    assert found["seed"].to_list() == [None]


def test_a_family_without_attributes_is_refused():
    fitted, x = fitted_and_items()
    fitted.model = FAMILIES["low_rank_free"]()
    with pytest.raises(TypeError, match="attribute_attention"):
        attribute_weights(fitted, Item(embedding=x.embedding), fitted.rows, ("cats", "dogs"), NAMES)
