"""PrefPalette's attribute attention: the paper's equations, its dropout, and what we add to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from families import DIM, FAMILIES, items, pick, rows, user

import pluralprefs as pp
from pluralprefs.data import comparisons
from pluralprefs.likelihoods import Logistic
from pluralprefs.models.attribute_attention import AttributeAttention
from pluralprefs.profiles import over_seeds, profile_table
from pluralprefs.run import load
from pluralprefs.train import attribute_dropout, grouped
from pluralprefs.training import FROZEN
from pluralprefs.types import Params
from pluralprefs.users import Users

ours, paper = FAMILIES["attribute_attention"], FAMILIES["prefpalette"]


def perturbed(model, seed=0):
    """The model with every parameter moved, zeros included."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype), model)


def numpy_reward(model, item, state=None, paper=True):
    """The equations of the module, in NumPy."""
    a, h = np.asarray(item.attributes, float), np.asarray(item.embedding, float)
    wide = lambda x: np.asarray(x, float)  # noqa: E731
    q = h @ wide(model.query["kernel"]) + wide(model.query["bias"])
    k = a @ wide(model.key["kernel"]) + wide(model.key["bias"]) + (0 if paper else wide(model.identity))
    s = np.tanh(q + k) @ wide(model.score["kernel"]) + wide(model.score["bias"])
    s = s if paper else s + np.asarray(state["attention"], float)
    alpha = np.exp(s) / np.exp(s).sum()
    values = a if paper else np.stack([e @ v for e, v in zip(a, wide(model.value), strict=True)])
    reward = wide(model.head) @ (h + float(model.gain) * alpha @ values)
    return alpha, reward if paper else reward + np.asarray(state["preference"], float) @ a[:, 0]


@pytest.mark.parametrize("family", [paper, ours], ids=["paper", "ours"])
def test_rewards_and_attention_follow_the_equations(family):
    model, x = perturbed(family()), items(0)
    state = user(model, 1)
    for i in range(4):
        alpha, reward = numpy_reward(model, pick(x, i), state, paper=model.paper)
        np.testing.assert_allclose(model.attribute_weights(state, pick(x, i)), alpha, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.reward(state, pick(x, i)), reward, rtol=1e-4, atol=1e-5)


def test_zero_states_identities_and_identity_values_give_the_papers_model_back():
    published, x = perturbed(paper()), items(2)
    eye = jnp.broadcast_to(jnp.eye(DIM), (3, DIM, DIM))
    model = published.replace(paper=False, identity=jnp.zeros_like(published.identity), value=eye)
    for i in range(4):
        item = pick(x, i)
        np.testing.assert_allclose(
            model.reward(model.init_user(), item), published.reward(published.init_user(), item), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", [paper, ours], ids=["paper", "ours"])
def test_attention_sums_to_one_over_the_attributes_at_hand(family):
    model, x = perturbed(family()), items(3)
    state = user(model, 4)
    assert float(model.attribute_weights(state, pick(x, 0)).sum()) == pytest.approx(1.0, abs=1e-6)
    some = pick(x, 0).replace(attribute_mask=jnp.array([True, False, True]))
    weights = model.attribute_weights(state, some)
    assert float(weights[1]) == 0.0
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("family", [paper, ours], ids=["paper", "ours"])
def test_without_attributes_the_reward_is_the_head_alone_exactly(family):
    model, x = perturbed(family()), items(5)
    state, item = user(model, 6), pick(x, 0)
    alone = model.head @ item.embedding
    assert float(model.reward(state, item.replace(attribute_mask=jnp.zeros(3, bool)))) == float(alone)
    assert float(model.reward(state, item.replace(attributes=None, attribute_mask=None))) == float(alone)
    assert float(model.replace(gain=jnp.zeros(())).reward(model.init_user(), item)) == float(alone)


@pytest.mark.parametrize("slope", [jax.jacfwd, jax.grad])
def test_without_attributes_no_user_moves_the_reward(slope):
    """Its slopes are 0, forwards and backwards: they were not a number, and so were log-odds of users without them."""
    model, item = perturbed(FAMILIES["attribute_attention"]()), pick(items(1), 0)
    item = item.replace(attribute_mask=jnp.zeros_like(item.attribute_mask))
    found = slope(lambda user: model.reward(user, item))(model.init_user())
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), found)


def test_a_masked_attribute_changes_nothing_whatever_its_value():
    model, x = perturbed(ours()), items(7)
    item = pick(x, 0).replace(attribute_mask=jnp.array([True, False, True]))
    moved = item.replace(attributes=item.attributes.at[1].set(jnp.nan))
    state = user(model, 8)
    assert float(model.reward(state, item)) == float(model.reward(state, moved))
    gradient = jax.grad(lambda s: model.reward(s, moved))(state)
    assert all(bool(jnp.isfinite(g).all()) for g in gradient.values())


@pytest.mark.parametrize("family", [paper, ours], ids=["paper", "ours"])
def test_with_some_attributes_away_the_reward_is_that_of_the_others_alone(family):
    """The equations over the attributes that dropout leaves, in NumPy; of none, the head alone."""
    model, x = perturbed(family()), items(21)
    state = user(model, 22)
    batch = rows(x, x, np.ones(len(x.embedding)))
    left = attribute_dropout(batch, jax.random.key(3), jnp.asarray(1000), steps=1000, most=0.5, each=True).first
    assert 0 < np.asarray(left.attribute_mask).mean() < 1
    for i, mask in enumerate(np.asarray(left.attribute_mask)):
        kept = np.flatnonzero(mask)
        less = {name: getattr(model, name) if model.paper else getattr(model, name)[kept]
                for name in ("identity", "value")}  # fmt: skip
        alone = {name: leaf[kept] for name, leaf in state.items() if getattr(leaf, "shape", ()) == (3,)}
        item = pick(x, i)
        item = item.replace(attributes=item.attributes[kept])
        expected = float(model.head @ item.embedding)
        if len(kept):
            _, expected = numpy_reward(model.replace(**less), item, {**state, **alone}, paper=model.paper)
        assert float(model.reward(state, pick(left, i))) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", [paper, ours], ids=["paper", "ours"])
def test_rewards_of_bfloat16_features_and_parameters_are_float32(family):
    """Head and attention are computed wide: as of the same numbers in float32, not in steps of 1/256."""
    narrow, wide = (lambda tree, one=one, other=other: jax.tree.map(
        lambda leaf: leaf.astype(other) if leaf.dtype == one else leaf, tree)
        for one, other in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)))  # fmt: skip
    model = narrow(perturbed(family()))
    state, item = user(model, 24), narrow(pick(items(23), 0))
    found = model.reward(state, item)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide(model).reward(wide(state), wide(item)), rtol=1e-5)


def test_permuting_attributes_permutes_attention_and_leaves_the_reward():
    model, x, order = perturbed(ours()), items(9), jnp.array([2, 0, 1])
    state, item = user(model, 10), pick(x, 0)
    moved = model.replace(identity=model.identity[order], value=model.value[order])
    other = item.replace(attributes=item.attributes[order], attribute_mask=item.attribute_mask[order])
    states = {name: v[order] for name, v in state.items()}
    np.testing.assert_allclose(
        moved.attribute_weights(states, other), model.attribute_weights(state, item)[order], rtol=1e-5
    )
    np.testing.assert_allclose(moved.reward(states, other), model.reward(state, item), rtol=1e-5)


def test_predictors_get_no_gradient():
    model, x = perturbed(ours()), items(11)
    state, item = user(model, 12), pick(x, 0)
    gradient = jax.grad(lambda a: model.reward(state, item.replace(attributes=a)))(item.attributes)
    assert float(jnp.abs(gradient).max()) == 0.0


def test_a_user_moves_the_reward_by_preference_times_score():
    model, x = perturbed(ours()), items(13)
    state = model.init_user()
    likes = state | {"preference": jnp.array([0.0, 2.0, 0.0])}
    for i in range(3):
        difference = model.reward(likes, pick(x, i)) - model.reward(state, pick(x, i))
        assert float(difference) == pytest.approx(2.0 * float(x.attributes[i, 1, 0]), rel=1e-4)


def test_the_papers_ablation_without_context_ignores_the_response():
    model, x = perturbed(ours().replace(context=False)), items(14)
    state = user(model, 15)
    item = pick(x, 0)
    other = item.replace(embedding=item.embedding + 1.0)
    np.testing.assert_array_equal(model.attribute_weights(state, item), model.attribute_weights(state, other))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs attributes"):
        AttributeAttention.init(key=jax.random.key(0), dim=4, attributes=0)
    with pytest.raises(ValueError, match="must be equal"):
        AttributeAttention.init(key=jax.random.key(0), dim=4, attributes=2, attribute_dim=3, paper=True)


def dropped(step, each, most=0.4, steps=1000, count=4000):
    x = items(16, count=count)
    batch = rows(x, x, np.ones(count))
    found = attribute_dropout(batch, jax.random.key(step), jnp.asarray(step), steps=steps, most=most, each=each)
    np.testing.assert_array_equal(found.first.attribute_mask, found.second.attribute_mask)
    return ~np.asarray(found.first.attribute_mask)


@pytest.mark.parametrize("each", [False, True])
def test_dropout_rises_to_its_most_at_three_quarters_of_it_in_optimiser_steps(each):
    assert not dropped(0, each).any()
    assert dropped(150, each).mean() == pytest.approx(0.2, abs=0.03)
    assert dropped(299, each).mean() == pytest.approx(299 / 750, abs=0.03)
    for step in (300, 1000):  # 0.75 * 0.4 * 1000
        assert dropped(step, each).mean() == pytest.approx(0.4, abs=0.03)


def test_dropout_takes_all_attributes_of_a_comparison_or_each_on_its_own():
    assert (np.ptp(dropped(1000, False).astype(int), axis=1) == 0).all()
    assert (np.ptp(dropped(1000, True).astype(int), axis=1) == 1).mean() > 0.5


@pytest.mark.slow
def test_a_run_learns_what_each_community_likes_and_says_what_attributes_are_worth(tmp_path):
    """Two communities with opposite tastes for one of two attribute columns, from a table to a loaded run."""
    draw = np.random.default_rng(0)
    n = 600
    user_number = draw.integers(0, 12, n)
    taste = np.where(user_number % 2 == 0, 3.0, -3.0)
    first, second = draw.normal(size=(2, n, 2))
    target = (draw.random(n) < 1 / (1 + np.exp(-taste * (first - second)[:, 0]))).astype(float)
    table = pl.DataFrame(
        {
            "prompt": "p", "first": [f"a{i}" for i in range(n)], "second": [f"b{i}" for i in range(n)],
            "target": target, "user_id": [f"u{u}" for u in user_number],
            "community_id": np.where(user_number % 2 == 0, "plus", "minus"),
            "attr:x:first": first[:, 0], "attr:x:second": second[:, 0],
            "attr:y:first": first[:, 1], "attr:y:second": second[:, 1],
        }
    )  # fmt: skip
    settings = ["epochs=10", "shots=[0,4]", "draws=1", "users.rounds=2", "users.cross_fit=null"]
    found = pp.fit(table, model="attribute_attention", encoder="attributes", root=tmp_path, overrides=settings)
    preference = np.asarray(found.users.population["preference"]) + np.asarray(
        found.users.community.state["preference"]
    )
    liked = dict(zip(found.vocabulary.communities, preference[:, found.attributes.names.index("x")], strict=True))
    assert liked["plus"] > 0.5
    assert liked["minus"] < -0.5
    weights = found.folder.table("attribute_weights")
    plus = weights.filter(community="plus", attribute="x", kind="preference").row(0, named=True)
    assert 0.5 < plus["ci_low"] < plus["mean"]
    shown = profile_table(over_seeds(weights)).splitlines()
    assert [line.split()[0] for line in shown] == ["preference", *found.attributes.names]
    assert "+" in shown[1]
    assert "*" in shown[1]
    metrics = found.folder.table("metrics")
    gain = metrics.filter(pl.col("metric") == "attribute_gain")
    assert gain["value"].max() > 0.1
    again = load(found.folder.path)
    asked = comparisons.from_trl(table.head(5))
    scores = [run.score(asked)["log_odds"] for run in (found, again)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def standing_in(seed=0):
    """A model with a stand-in, and items whose attributes are linear in their embeddings."""
    model = AttributeAttention.init(key=jax.random.key(seed), dim=DIM, attributes=3, attribute_dim=2, stand_in=True)
    kernel = np.random.default_rng(seed).normal(size=(DIM, 3, 2)).astype(np.float32)
    x = items(seed, count=200)
    return model, x.replace(attributes=jnp.einsum("nh,hae->nae", x.embedding, kernel) + 0.5), kernel


def test_a_stand_in_that_is_taught_takes_the_place_of_predictors():
    model, x, kernel = standing_in()
    model = model.taught(x)
    np.testing.assert_allclose(model.stand_in["kernel"], kernel, rtol=1e-2, atol=1e-3)
    state, item = user(model, 17), pick(x, 0)
    for absent in (item.replace(attribute_mask=jnp.zeros(3, bool)), item.replace(attributes=None, attribute_mask=None)):
        assert float(model.reward(state, absent)) == pytest.approx(float(model.reward(state, item)), rel=1e-3)
    one = item.replace(attribute_mask=jnp.array([True, False, True]), attributes=item.attributes + 1.0)
    mixed = item.replace(attributes=item.attributes + jnp.array([1.0, 0.0, 1.0])[:, None])
    assert float(model.reward(state, one)) == pytest.approx(float(model.reward(state, mixed)), rel=1e-3)
    assert float(model.replace(stand_in=None).reward(state, pick(x, 0))) == float(model.reward(state, item))


def test_a_stand_in_learns_an_attribute_from_the_items_that_have_it():
    model, x, kernel = standing_in(1)
    mask = np.ones((200, 3), bool)
    mask[:100, 1], mask[:, 2] = False, False
    hidden = jnp.where(mask[:, :, None], x.attributes, jnp.nan)
    found = model.taught(x.replace(attributes=hidden, attribute_mask=jnp.asarray(mask))).stand_in
    np.testing.assert_allclose(found["kernel"][:, :2], kernel[:, :2], rtol=1e-2, atol=1e-3)
    assert not np.asarray(found["kernel"][:, 2]).any()


def test_comparisons_never_move_a_stand_in():
    model, x, _ = standing_in(2)
    model = model.taught(x)
    state = user(model, 18)

    def reward(stand_in):
        return model.replace(stand_in=stand_in).reward(state, pick(x, 0).replace(attribute_mask=jnp.zeros(3, bool)))

    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(jax.grad(reward)(model.stand_in)))
    update = grouped({"all": optax.adamw(1e-2, weight_decay=0.1)}, FROZEN, default="all")
    params = Params(model, Users.init(model, users=1, communities=1), Logistic())
    moved, _ = update.update(jax.tree.map(jnp.ones_like, params), update.init(params), params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(moved.model.stand_in))
    assert np.asarray(moved.model.head).all()


def test_the_published_model_has_no_stand_in():
    with pytest.raises(ValueError, match="no stand-in"):
        AttributeAttention.init(key=jax.random.key(0), dim=4, attributes=2, attribute_dim=4, paper=True, stand_in=True)
    published = paper()
    assert published.taught(items(0)) is published
