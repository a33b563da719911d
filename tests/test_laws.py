"""METHODS section 0: laws that every family passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, INFERRING, items, pick, rows, user

from pluralprefs.adapt import fit_user, laplace_user
from pluralprefs.likelihoods import Logistic
from pluralprefs.models.ideal_point import IdealDirection
from pluralprefs.models.meta_reward import MetaReward
from pluralprefs.train import episode_loss
from pluralprefs.types import Episode, InfersUser, Params, ReducesItems, ScalarReward
from pluralprefs.users import Users, gather, log_odds, ravel

VARIANTS = ("bradley_terry_mlp", "low_rank_mlp", "pal_a_squared", "prefpalette")  # of families that are there too


@pytest.fixture(params=FAMILIES, ids=str)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in FAMILIES], ids=str)
def adapting(request):
    return FAMILIES[request.param]()


def test_log_odds_are_antisymmetric_and_zero_for_one_item(model):
    x, u = items(1), user(model, 2)
    forward = model.log_odds(u, pick(x, 0), pick(x, 1))
    np.testing.assert_allclose(forward, -model.log_odds(u, pick(x, 1), pick(x, 0)), rtol=1e-5, atol=1e-6)
    assert abs(float(forward)) > 1e-4
    assert float(model.log_odds(u, pick(x, 2), pick(x, 2))) == 0.0


def test_scalar_log_odds_are_a_difference_of_rewards(model):
    if not isinstance(model, ScalarReward):
        pytest.skip("no scalar reward")
    x, u = items(3), user(model, 4)
    a, b, c = (model.log_odds(u, pick(x, i), pick(x, j)) for i, j in ((0, 1), (1, 2), (0, 2)))
    np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", [True, False])
def test_reduced_items_have_the_same_log_odds_for_every_user(model, prompt):
    if not isinstance(model, ReducesItems):
        pytest.skip("reduces no items")
    if not prompt and isinstance(model, IdealDirection):
        model = IdealDirection.init(key=jax.random.key(0), dim=4, prototypes=2, point=5)
    x = items(3, prompt=prompt)
    smaller, less = model.reduced(x)
    again, same = smaller.reduced(less)
    for u in (user(model, 4), user(model, 5)):
        expected = [float(model.log_odds(u, pick(x, i), pick(x, i + 1))) for i in range(4)]
        for one, of in ((smaller, less), (again, same)):
            found = [float(one.log_odds(u, pick(of, i), pick(of, i + 1))) for i in range(4)]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_jit_and_vmap_change_nothing(model):
    x, u = items(5), user(model, 6)
    loop = [float(model.log_odds(u, pick(x, i), pick(x, i + 1))) for i in range(4)]
    mapped = jax.jit(jax.vmap(model.log_odds, (None, 0, 0)))(u, pick(x, slice(0, 4)), pick(x, slice(1, 5)))
    np.testing.assert_allclose(mapped, loop, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences(model):
    with jax.enable_x64():
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model)
        x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64) if v.dtype == np.float32 else v, items(7))
        vector, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), user(model, 8))
        )
        value = lambda v: wide.log_odds(unravel(v), pick(x, 0), pick(x, 1))  # noqa: E731
        gradient = np.asarray(jax.grad(value)(vector))
        step = 1e-6
        numeric = [(value(vector + step * e) - value(vector - step * e)) / (2 * step) for e in np.eye(len(vector))]
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)


def test_an_unknown_user_scores_at_the_prior_and_not_as_the_last_user(model):
    table = Users.init(model, users=3, communities=2)
    table = table.replace(user=jax.tree.map(lambda x: x + 1.0, table.user))
    _, deviation = gather(table, jnp.asarray(-1), jnp.asarray(-1))
    assert all(float(jnp.abs(x).max()) == 0.0 for x in jax.tree.leaves(deviation))
    _, last = gather(table, jnp.asarray(-1), jnp.asarray(2))
    assert all(float(jnp.abs(x).min()) == 1.0 for x in jax.tree.leaves(last))


def test_relabelling_users_permutes_results(model):
    x, table = items(9), Users.init(model, users=3, communities=0)
    draw = np.random.default_rng(0)
    table = table.replace(user=jax.tree.map(lambda v: jnp.asarray(draw.normal(size=v.shape), jnp.float32), table.user))
    order = np.array([2, 0, 1])
    moved = table.replace(user=pick(table.user, order))
    row = pick(rows(pick(x, slice(0, 1)), pick(x, slice(1, 2)), [1.0]), 0)
    scores = [float(log_odds(model, table, row.replace(user=jnp.asarray(i)))) for i in range(3)]
    again = [float(log_odds(model, moved, row.replace(user=jnp.asarray(i)))) for i in range(3)]
    np.testing.assert_allclose(again, np.array(scores)[order], rtol=1e-5)


@pytest.mark.parametrize("adapter", [fit_user, laplace_user], ids=["map", "laplace"])
def test_adapting_obeys_the_prior_the_weights_and_no_order(adapting, adapter):
    model = adapting
    if isinstance(model, InfersUser) and not (isinstance(model, MetaReward) and adapter is fit_user):
        pytest.skip("adapted by inference alone")
    adapter = jax.jit(adapter)
    x, table = items(10), Users.init(model, users=0, communities=0, strength=0.7)
    first, second = pick(x, np.array([0, 1, 2, 3])), pick(x, np.array([1, 2, 3, 4]))
    support = rows(first, second, [1.0, 0.0, 1.0, 1.0])
    mean = ravel(adapter(model, support, table).mean)[0]
    assert float(jnp.abs(mean).max()) > 1e-3
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(ravel(adapter(model, pick(support, order), table).mean)[0], mean, atol=2e-4)
    nothing = ravel(adapter(model, support.replace(weight=jnp.zeros(4)), table).mean)[0]
    np.testing.assert_allclose(nothing, 0.0, atol=1e-6)
    padded = jax.tree.map(lambda v: jnp.concatenate([v, v[:2]]), support)
    padded = padded.replace(weight=jnp.asarray([1.0, 1, 1, 1, 0, 0]))
    np.testing.assert_allclose(ravel(adapter(model, padded, table).mean)[0], mean, atol=2e-4)
    rigid = table.replace(user_root=jnp.zeros_like(table.user_root))
    np.testing.assert_allclose(ravel(adapter(model, support, rigid).mean)[0], 0.0, atol=1e-7)


def test_fit_user_lowers_the_support_loss(model):
    if isinstance(model, InfersUser) and not isinstance(model, MetaReward):
        pytest.skip("adapted by inference alone")
    x, table = items(11), Users.init(model, users=0, communities=0, strength=1.0)
    support = rows(pick(x, np.array([0, 1, 2])), pick(x, np.array([3, 4, 5])), [1.0, 1.0, 0.0])
    deviation = fit_user(model, support, table).mean
    fitted = table.replace(user=jax.tree.map(lambda v: v[None], deviation))
    loss = lambda t, u: sum(  # noqa: E731
        float(np.logaddexp(0, -s * log_odds(model, t, pick(support, i).replace(user=jnp.asarray(u)))))
        for i, s in enumerate((1, 1, -1))
    )
    assert loss(fitted, 0) < loss(table, -1)


SHOTS = (np.array([0, 1, 2, 3]), np.array([1, 2, 3, 5]), [1.0, 0.0, 0.7, 1.0])
ODD = ("fast_weights", "fast_weights_sum", "swap_symmetric")


def shots(weight=None):
    x = items(10)
    return rows(pick(x, SHOTS[0]), pick(x, SHOTS[1]), SHOTS[2], weight)


def flat(posterior):
    """The mean of a posterior and the diagonal root of its covariance, as one vector."""
    roots = [] if posterior.covariance is None else [posterior.covariance.root]
    return np.concatenate([jax.flatten_util.ravel_pytree(posterior.mean)[0], *roots])


@pytest.fixture(params=INFERRING, ids=str)
def inferring(request):
    return INFERRING[request.param]()


def test_an_inferred_user_depends_on_the_shots_and_their_weights_alone(inferring):
    assert isinstance(inferring, InfersUser)
    infer = jax.jit(inferring.infer_user)
    support = shots()
    found = flat(infer(support))
    prior = flat(infer(shots(np.zeros(4))))
    assert np.abs(found - prior).max() > 1e-3
    same = lambda other: np.testing.assert_allclose(flat(infer(other)), found, rtol=2e-4, atol=2e-5)  # noqa: E731
    same(pick(support, np.array([2, 0, 3, 1])))
    swapped = support.replace(first=support.second, second=support.first, target=1 - support.target)
    same(swapped)
    longer = jax.tree.map(lambda v: jnp.concatenate([v, v[:2]]), support)
    same(longer.replace(weight=jnp.asarray([1.0, 1, 1, 1, 0, 0]), target=longer.target.at[4:].set(0.0)))
    twice = flat(infer(longer))
    heavy = flat(infer(support.replace(weight=jnp.asarray([2.0, 2, 1, 1]))))
    np.testing.assert_allclose(heavy, twice, rtol=2e-4, atol=2e-5)
    assert np.abs(twice - found).max() > 1e-4


def test_inferring_is_the_same_under_vmap_and_from_no_rows_that_count(inferring):
    many = jax.tree.map(lambda *v: jnp.stack(v), shots(), shots(np.zeros(4)), shots([1, 0, 0, 1]))
    mapped = jax.jit(jax.vmap(inferring.infer_user))(many)
    for i in range(3):
        one = flat(inferring.infer_user(pick(many, i)))
        np.testing.assert_allclose(flat(pick(mapped, i)), one, rtol=2e-4, atol=2e-5)
    reversed_ = pick(many, 1).replace(target=1 - pick(many, 1).target)
    np.testing.assert_array_equal(flat(inferring.infer_user(reversed_)), flat(inferring.infer_user(pick(many, 1))))


@pytest.mark.parametrize("name", ODD)
def test_reversed_labels_reverse_a_family_that_is_odd_by_construction(name):
    model, support = INFERRING[name](), shots()
    found, other = (model.infer_user(s) for s in (support, support.replace(target=1 - support.target)))
    np.testing.assert_allclose(other.mean, -found.mean, rtol=1e-4, atol=1e-6)
    assert np.abs(found.mean).max() > 1e-3
    if found.covariance is not None:
        np.testing.assert_allclose(other.covariance.root, found.covariance.root, rtol=1e-5)
        assert found.covariance.root.max() < 1.0


@pytest.mark.parametrize("name", ["variational", "neural_process", "meta_reward"])
def test_training_by_episodes_has_finite_gradients_where_nothing_is_shown(name):
    inferring = INFERRING[name]()
    episode = jax.tree.map(lambda *v: jnp.stack(v), *(Episode(shots(w), shots()) for w in (np.zeros(4), np.ones(4))))
    gradient = jax.jit(jax.grad(lambda p: episode_loss()(p, (episode, jnp.asarray(1.0)), jax.random.key(0))[0]))
    found = gradient(Params(inferring, (), Logistic()))
    size = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found) if leaf.size]
    assert np.isfinite(size).all()
    assert max(size) > 1e-4
