"""Profiles of communities are recomputed by hand from a model whose parameters are known."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from families import FAMILIES, items, pick, rows

from pluralprefs import adapting, communities
from pluralprefs.adapting import adapt_units
from pluralprefs.fitting import Fitted, take
from pluralprefs.profiles import (
    SCHEMA,
    Sample,
    attribute_weights,
    over_seeds,
    preference_variance,
    profile_table,
    slopes,
    user_weights,
)
from pluralprefs.types import Covariance, Item, UserPosterior
from pluralprefs.users import Users, neutral

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


def slopes_by_hand(fitted, x, state, step=1e-3):
    """Least-squares slopes of the log-odds on score differences, and their derivatives by each number of the state."""
    first, second = np.asarray(fitted.rows.first), np.asarray(fitted.rows.second)
    z = np.asarray(x.attributes, float)[..., 0]

    def values(vector):
        user = {"attention": jnp.asarray(vector[:3]), "preference": jnp.asarray(vector[3:])}
        reward = np.array([float(fitted.model.reward(user, pick(x, i))) for i in range(len(z))])
        logits = float(fitted.users.scale) * (reward[first] - reward[second])
        return np.linalg.lstsq(z[first] - z[second], logits, rcond=None)[0]

    start = np.concatenate([np.asarray(state["attention"], float), np.asarray(state["preference"], float)])
    ends = [(values(start + step * e) - values(start - step * e)) / (2 * step) for e in np.eye(6)]
    return values(start), np.stack(ends, axis=1)


def half_width(weights, community):
    part = weights.filter(pl.col("community") == community, pl.col("kind") == "preference")
    return ((part["ci_high"] - part["ci_low"]) / 2).to_numpy()


def test_every_community_attribute_and_kind_has_one_row_with_an_interval():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES, seed=3)
    assert dict(found.schema) == SCHEMA
    assert found.height == 3 * 3 * 4
    assert found.select("community", "attribute", "kind").is_unique().all()
    assert ((found["ci_low"] <= found["mean"]) & (found["mean"] <= found["ci_high"])).all()
    assert found["seed"].unique().to_list() == [3]


def test_preference_is_the_slope_of_the_log_odds_on_the_scores():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    expected, _ = slopes_by_hand(fitted, x, fitted.users.population)
    np.testing.assert_allclose(of(found, "", "preference"), expected, rtol=1e-3, atol=1e-4)
    tight, _ = fitted_and_items(strength=1e-4)
    near = attribute_weights(tight, x, tight.rows, ("cats", "dogs"), NAMES)
    np.testing.assert_allclose(of(near, "cats", "preference"), expected, atol=2e-3)
    assert np.abs(of(found, "cats", "preference") - of(found, "dogs", "preference")).max() > 0.05


def test_what_the_head_says_of_all_people_counts_as_their_preference():
    """A head that rewards what the scores say, and a preference that says the same, have the same profile."""
    fitted, x = fitted_and_items()
    x = x.replace(embedding=x.attributes[:, :, 0] @ jnp.eye(3, 4))
    plain = fitted.model.replace(gain=jnp.zeros(()), head=jnp.zeros(4))
    weights = jnp.asarray([0.7, -0.4, 0.2])
    by_head = Fitted(plain.replace(head=weights @ jnp.eye(3, 4)), fitted.users, fitted.rows)
    by_preference = Fitted(plain, fitted.users.replace(population=fitted.users.population | {
        "preference": fitted.users.population["preference"] + weights}), fitted.rows)  # fmt: skip
    one, other = (attribute_weights(f, x, f.rows, ("cats", "dogs"), NAMES) for f in (by_head, by_preference))
    for community in ("", "cats"):
        np.testing.assert_allclose(of(one, community, "preference"), of(other, community, "preference"), rtol=1e-3)


def test_a_community_without_comparisons_is_at_its_prior():
    fitted, x = fitted_and_items()
    fitted.rows = fitted.rows.replace(community=np.zeros_like(fitted.rows.community))
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    dogs = found.filter(pl.col("community") == "dogs", pl.col("kind") == "preference")
    expected, by_state = slopes_by_hand(fitted, x, fitted.users.population)
    np.testing.assert_allclose(dogs["mean"], expected, rtol=1e-3, atol=1e-4)
    wide = 1.959964 * 0.7 * np.sqrt((by_state**2).sum(1))
    np.testing.assert_allclose(half_width(found, "dogs"), wide, rtol=1e-2)
    assert found.filter(pl.col("community") == "dogs", pl.col("kind") == "attention").height == 0


def test_an_interval_holds_what_members_and_shared_parameters_leave_open():
    """Nobody deviates but the members, two of equal share a community; then half of the users differ from the rest."""
    fitted, x = fitted_and_items(strength=1e-6)
    fitted.users = fitted.users.replace(user_root=jnp.full(7, 0.5))
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    user = UserPosterior(neutral(fitted.model), Covariance(fitted.users.user_root, jnp.zeros((0, 7))))
    _, spread = slopes(fitted.model, fitted.users, Sample.of(x, fitted.rows), user, 0)
    np.testing.assert_allclose(half_width(found, "cats"), 1.959964 * np.sqrt(spread / 2), rtol=1e-2)
    assert found.filter(community="", kind="preference")["ci_low"].is_null().all()  # unknown, not certain
    other = Fitted(fitted.model, fitted.users.replace(population=fitted.users.population | {
        "preference": fitted.users.population["preference"] + jnp.asarray([0.2, 0.2, 0.2])}), fitted.rows)  # fmt: skip
    shared = preference_variance([fitted, other], x, 2)
    assert shared["population"] == pytest.approx((1.5 * 0.2) ** 2 / 4, rel=1e-3)
    np.testing.assert_allclose(shared["community"], shared["population"], rtol=1e-3)
    first = fitted.users.population["preference"] + jnp.asarray([0.2, 0.0, 0.0])
    other.users = fitted.users.replace(population=fitted.users.population | {"preference": first})
    own = preference_variance([fitted, other], x, 2)["community"]
    mean = shared["population"] / 3
    np.testing.assert_allclose(own, [(2 * 3 * mean + 4 * mean) / 6, 4 * mean / 6, 4 * mean / 6], rtol=1e-2)
    fitted.notes["preference_variance"] = shared
    again = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    np.testing.assert_allclose(half_width(again, ""), 1.959964 * 0.15, rtol=1e-3)


def test_collinear_attributes_share_their_slope():
    fitted, x = fitted_and_items()
    score = x.attributes[:, 0, 0]
    twin = x.replace(attributes=x.attributes.at[:, 1, 0].set(score * (1 + 1e-7)))
    found = of(attribute_weights(fitted, twin, fitted.rows, ("cats", "dogs"), NAMES), "", "preference")
    assert np.abs(found).max() < 10
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.slow
def test_a_user_has_a_profile_as_wide_as_what_is_known(monkeypatch):
    fitted, x = fitted_and_items()
    fitted.users = fitted.users.replace(user_root=jnp.full(7, 0.5))
    prior = UserPosterior(neutral(fitted.model), Covariance(fitted.users.user_root, jnp.zeros((0, 7))))
    judged = take(fitted.rows, np.flatnonzero(fitted.rows.user == 2))
    known = adapt_units(fitted.model, fitted.users, x, judged, np.zeros(len(judged.target), int))[0]
    found = user_weights(
        fitted, x, {"ana": (0, known, 20), "new": (0, prior, None), "far": (-1, prior, None)}, ("cats", "dogs"), NAMES
    )
    assert dict(found.schema) == SCHEMA
    assert found.height == 3 * 3 * 2
    width = {
        name: (part["ci_high"] - part["ci_low"]).mean()
        for (name,), part in found.filter(kind="preference").group_by("user")
    }
    assert width["ana"] < width["new"]
    whole = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)
    far = found.filter(pl.col("user") == "far", pl.col("kind") == "preference")
    np.testing.assert_allclose(far["mean"], of(whole, "", "preference"), rtol=1e-5)
    assert found.filter(pl.col("user") == "ana", pl.col("kind") == "attention")["mean"].sum() == pytest.approx(1.0)
    inverses, adapted = [], []
    pinv, adapt = np.linalg.pinv, communities.adapt_units
    monkeypatch.setattr(np.linalg, "pinv", lambda *given, **options: inverses.append(1) or pinv(*given, **options))
    monkeypatch.setattr(communities, "adapt_units", lambda *given: adapted.append(set(given[4])) or adapt(*given))
    one = user_weights(fitted, x, {"ana": (0, known, 20)}, ("cats", "dogs"), NAMES)
    assert len(inverses) == 1
    assert adapted == [{0}]  # the community of the one user, and no other
    for column in ("mean", "ci_low", "ci_high"):
        np.testing.assert_allclose(one[column], found.filter(user="ana")[column], rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow
def test_comparisons_of_unknown_users_are_each_somebody_else():
    fitted, x = fitted_and_items()
    unknown = fitted.rows.replace(user=np.full_like(fitted.rows.user, -1))
    named = fitted.rows.replace(user=np.arange(len(unknown.user), dtype=np.int32) + 4)  # strangers to the table too
    ends = pl.col("kind") == "ablation", pl.col("community") == ""
    one, other = (
        attribute_weights(fitted, x, test, ("cats", "dogs"), NAMES).filter(*ends) for test in (unknown, named)
    )
    assert one["ci_low"].null_count() == 0
    assert one.drop("n").equals(other.drop("n"))


def test_users_are_adapted_once_for_all_that_is_taken_away(monkeypatch):
    """They were adapted again for each of the subsets of attributes, 64 times for six."""
    fitted, x = fitted_and_items()
    fitted.users = fitted.users.replace(user_root=jnp.full(7, 0.5))
    calls, original = [], adapting._adapt
    monkeypatch.setattr(adapting, "_adapt", lambda *given: calls.append(1) or original(*given))
    predicted = adapting.seen_on(fitted, x, fitted.rows)
    once = len(calls)
    hidden = x.replace(attribute_mask=x.attribute_mask.at[:, 0].set(values=False))
    found = [predicted(view) for view in (x, hidden)]
    assert len(calls) == once == 1
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, hidden)
    asked = fitted.rows.replace(first=fitted.rows.first + 6, second=fitted.rows.second + 6)
    expected = [adapting.predict_seen(fitted, x, fitted.rows), adapting.predict_seen(fitted, both, asked)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.abs(found[0][0] - found[1][0]).max() > 0.05


def test_an_attribute_whose_scores_never_differ_has_slope_zero_and_spoils_no_other():
    fitted, x = fitted_and_items()
    flat = x.attributes.at[:, 1].set(0.25)
    whole = Sample.of(x.replace(attributes=flat), fitted.rows)
    less = Sample.of(x.replace(attributes=flat[:, [0, 2]], attribute_mask=x.attribute_mask[:, [0, 2]]), fitted.rows)
    np.testing.assert_array_equal(whole.inverse[1], 0.0)
    np.testing.assert_allclose(whole.inverse[jnp.asarray([0, 2])], less.inverse, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_shapley_values_share_out_what_all_attributes_save():
    fitted, x = fitted_and_items()
    found = attribute_weights(fitted, x, fitted.rows, ("cats", "dogs"), NAMES)

    def nats(present):
        mask = jnp.broadcast_to(jnp.asarray([i in present for i in range(3)]), (6, 3))
        one = x.replace(attribute_mask=mask)
        lost = []
        for a, b, t in zip(fitted.rows.first, fitted.rows.second, fitted.rows.target, strict=True):
            logit = 1.5 * float(fitted.model.log_odds(fitted.users.population, pick(one, int(a)), pick(one, int(b))))
            lost.append(np.logaddexp(0, -logit) if t else np.logaddexp(0, logit))
        return np.mean(lost)

    expected = np.zeros(3)
    for order in permutations(range(3)):
        for place, at in enumerate(order):
            expected[at] += (nats(order[:place]) - nats(order[: place + 1])) / 6
    np.testing.assert_allclose(of(found, "", "shapley"), expected, atol=2e-5)
    assert of(found, "", "shapley").sum() == pytest.approx(nats(()) - nats((0, 1, 2)), abs=2e-5)


def test_seeds_are_averaged_and_widen_the_interval():
    base = {"community": "cats", "user": None, "attribute": "wit", "kind": "preference", "n": 10}
    rows_of = [
        base | {"mean": m, "ci_low": m - 1.959964, "ci_high": m + 1.959964, "seed": s} for s, m in enumerate((0.0, 2.0))
    ]
    found = over_seeds(pl.DataFrame(rows_of, schema=SCHEMA))
    assert found["mean"].to_list() == [1.0]
    assert found["ci_high"][0] == pytest.approx(1.0 + 1.959964 * np.sqrt(1.0 + 2.0))
    assert found["seed"].to_list() == [None]
    old = pl.DataFrame(rows_of, schema=SCHEMA).drop("user")  # of a run from before users had profiles
    assert over_seeds(old).equals(found)


def test_a_community_may_be_called_population():
    fitted, x = fitted_and_items()
    text = profile_table(attribute_weights(fitted, x, fitted.rows, ("population", "dogs"), NAMES))
    assert text.splitlines()[0].split() == ["preference", "(population)", "population", "dogs"]


def test_a_family_without_attributes_is_refused():
    fitted, x = fitted_and_items()
    fitted.model = FAMILIES["low_rank_free"]()
    with pytest.raises(TypeError, match="attribute_attention"):
        attribute_weights(fitted, Item(embedding=x.embedding), fitted.rows, ("cats", "dogs"), NAMES)


def test_ablation_takes_an_attribute_away_and_lets_nothing_stand_in_for_it():
    fitted, x = fitted_and_items()
    draw = np.random.default_rng(5)
    stand_in = {"kernel": draw.normal(size=(4, 3, 4)), "bias": draw.normal(size=(3, 4))}
    with_it = fitted.model.replace(stand_in={name: jnp.asarray(leaf, jnp.float32) for name, leaf in stand_in.items()})
    plain, other = (
        attribute_weights(Fitted(model, fitted.users, fitted.rows), x, fitted.rows, ["a", "b"], NAMES)
        for model in (fitted.model, with_it)
    )
    for kind in ("ablation", "shapley"):
        np.testing.assert_allclose(of(other, "", kind), of(plain, "", kind), atol=1e-6)
