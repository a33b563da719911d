"""Laplace oracles: prior, dense inverse Hessian, likelihood limit, the two routes, coverage."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, arrays, items, pick, rows
from scipy.optimize import minimize
from threadpoolctl import threadpool_info, threadpool_limits

from pluralprefs.adapt import laplace_user, mode_user, predict, solve_items, solve_many, solve_rows
from pluralprefs.adapting import predict_seen
from pluralprefs.blas import one_blas_thread
from pluralprefs.fitting import CERTAIN, Fitted, _at_most, buckets, fit_strength, initial_root, solve_level, take
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.ideal_point import IdealPoint
from pluralprefs.newton import AWAY, Judgements, newton, newton_by_coordinates
from pluralprefs.pooling import fit_pooled, half_fits, population_by_newton, residual_variance, shared_variance
from pluralprefs.types import Item
from pluralprefs.users import Peers, Pooled, Users, apply_root, part_names, ravel


def linear(dim):
    return BradleyTerry.init(key=jax.random.key(0), dim=dim, item_effects=False)


def problem(dim, n, seed=0, full=False):
    draw = np.random.default_rng(seed)
    a, b = (draw.normal(size=(n, dim)).astype(np.float32) for _ in range(2))
    model = linear(dim)
    root = np.abs(draw.normal(size=dim + 1)).astype(np.float32) + 0.2
    root[0] = 0.0  # the gain comes first in the raveled deviation where it is named first
    table = Users.init(model, users=0, communities=0)
    names_first = ravel(jax.tree.map(jnp.ones_like, table_deviation(model)))[0]
    assert names_first.shape == (dim + 1,)
    matrix = (
        np.diag(root)
        if not full
        else np.tril(draw.normal(size=(dim + 1, dim + 1)) * 0.3 + np.diag(root)).astype(np.float32)
    )
    table = table.replace(user_root=jnp.asarray(matrix if full else root))
    target = (draw.random(n) < 0.5).astype(np.float32)
    return model, table, rows(Item(embedding=a), Item(embedding=b), target), a - b, matrix.astype(np.float64)


def table_deviation(model):
    from pluralprefs.users import neutral

    return neutral(model)


def dense(x, target, root, steps=60):
    """Posterior mode and covariance by an independent NumPy Newton on the whitened problem, in float64.

    The base log-odds are 0, so the gain has no effect and its feature is 0.
    """
    f = feature_columns(x) @ root
    beta = np.zeros(root.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-f @ beta))
        hessian = np.eye(len(beta)) + f.T @ (f * (p * (1 - p))[:, None])
        beta += np.linalg.solve(hessian, f.T @ (target - p) - beta)
    return root @ beta, root @ np.linalg.inv(hessian) @ root.T


def feature_columns(x):
    """Columns of the raveled deviation: state and gain, in the order that ravel gives them."""
    model = linear(x.shape[1])
    marked = table_deviation(model).replace(gain=jnp.ones(()))
    gain = int(np.argmax(np.asarray(ravel(marked)[0])))
    return np.insert(x.astype(np.float64), gain, 0.0, axis=1)


@pytest.mark.parametrize("seed", [0, 3, 11])
def test_rows_that_repeat_and_contradict_each_other_are_solved_under_a_wide_prior(seed):
    draw = np.random.default_rng(seed)
    half = draw.normal(size=(6, 40)).astype(np.float32)
    a = jnp.asarray(1000 * np.concatenate([half, half]) / np.linalg.norm(half, axis=1).mean())
    target, none = jnp.asarray(draw.integers(0, 2, 12), jnp.float32), jnp.zeros(12)
    unit = Judgements(jnp.arange(12), jnp.full(12, -1), none, none, target, jnp.ones(12))
    nats = lambda x: float(jnp.sum(jax.nn.softplus(a @ x) - target * (a @ x)) + 0.5 * x @ x)  # noqa: E731
    dual, other = (newton(lambda x: a @ x, of, unit, 40, rounds=0) for of in (a, lambda _: a))
    assert nats(dual.mean) < nats(other.mean) + 0.01


def test_no_rows_at_all_give_the_prior():
    for name in ("bradley_terry", "low_rank_free", "pal_a"):
        model = FAMILIES[name]()
        x = items(0)
        none = jax.tree.map(lambda leaf: leaf[:0], rows(pick(x, slice(0, 2)), pick(x, slice(2, 4)), [1.0, 0.0]))
        found = laplace_user(model, none, Users.init(model, users=0, communities=0))
        np.testing.assert_allclose(ravel(found.mean)[0], 0.0, atol=1e-6)


def test_a_map_is_at_the_mode_however_many_comparisons_there_are():
    model, table, support, x, root = problem(8, 60)
    mode, _ = dense(x, np.asarray(support.target, np.float64), root)
    found = mode_user(model, support, table)
    assert found.covariance is None
    np.testing.assert_allclose(ravel(found.mean)[0], mode, atol=2e-4)
    among = table.replace(peers=Peers.empty(model, 3))  # a mode knows one Gaussian prior, that of the table
    np.testing.assert_allclose(ravel(mode_user(model, support, among).mean)[0], mode, atol=2e-4)


@pytest.mark.parametrize(("dim", "n"), [(3, 12), (12, 3)], ids=["primal", "dual"])
@pytest.mark.parametrize("full", [False, True], ids=["diagonal prior", "full prior"])
def test_laplace_equals_the_dense_newton_solution(dim, n, full):
    model, table, support, x, root = problem(dim, n, full=full)
    found = laplace_user(model, support, table, steps=20, rounds=0)
    mean, covariance = dense(x, np.asarray(support.target, np.float64), root)
    np.testing.assert_allclose(ravel(found.mean)[0], mean, atol=2e-4)
    r, d = np.asarray(found.covariance.root, np.float64), np.asarray(found.covariance.downdate, np.float64)
    r = np.diag(r) if r.ndim == 1 else r
    np.testing.assert_allclose(r @ r.T - d.T @ d, covariance, atol=2e-4)
    row = pick(support, 0)
    _, variance = predict(model, table, found, row)
    direction = feature_columns(x)[0]
    np.testing.assert_allclose(variance, direction @ covariance @ direction, rtol=2e-3, atol=1e-4)


def test_no_data_returns_the_prior():
    model, table, support, _, root = problem(4, 3)
    found = laplace_user(model, support.replace(weight=jnp.zeros(3)), table)
    np.testing.assert_allclose(ravel(found.mean)[0], 0.0, atol=1e-7)
    r, d = np.asarray(found.covariance.root), np.asarray(found.covariance.downdate)
    r = np.diag(r) if r.ndim == 1 else r
    np.testing.assert_allclose(r @ r.T - d.T @ d, root @ root.T, atol=1e-5)


def test_the_route_through_items_equals_the_route_through_rows():
    draw = np.random.default_rng(3)
    model = linear(3)
    x = Item(embedding=draw.normal(size=(5, 3)).astype(np.float32))
    a, b = draw.integers(0, 5, 20), draw.integers(0, 5, 20)
    target = draw.random(20).astype(np.float32)
    table = Users.init(model, users=0, communities=0, strength=0.8)
    table = table.replace(population={"linear": jnp.asarray([0.5, -1.0, 0.3])})
    support = rows(pick(x, a), pick(x, b), target, weight=0.5 + draw.random(20))
    fixed = ((x.embedding[a] - x.embedding[b]) @ np.array([0.5, -1.0, 0.3])).astype(np.float32)
    judged = Judgements(a, b, fixed, fixed, support.target, support.weight)
    by_rows = solve_rows(model, support, table, table.user_root, steps=20)
    by_items = solve_items(model, arrays(x), judged, table.user_root, table.scale, steps=20)
    np.testing.assert_allclose(by_rows.mean, by_items.mean, atol=2e-4)
    np.testing.assert_allclose(by_rows.evidence, by_items.evidence, rtol=1e-4)
    whitened = [np.eye(4) - np.asarray(s.jacobian.T @ s.precision @ s.jacobian) for s in (by_rows, by_items)]
    np.testing.assert_allclose(*whitened, atol=2e-4)


def test_the_route_through_row_differences_equals_the_route_through_items():
    draw = np.random.default_rng(4)
    model = linear(3)
    x = arrays(Item(embedding=draw.normal(size=(6, 3)).astype(np.float32)))
    a, b = draw.integers(0, 6, 5), draw.integers(0, 6, 5)
    zero, target, one = np.zeros(5, np.float32), draw.random(5).astype(np.float32), np.ones(5, np.float32)
    root, scale = jnp.full(4, 0.8), jnp.ones(())
    through_items = solve_items(model, x, Judgements(a, b, zero, zero, target, one), root, scale, steps=20)
    place = Judgements(np.arange(5), np.full(5, -1), zero, zero, target, one)
    through_rows = solve_items(model, pick(x, a), place, root, scale, minus=pick(x, b), steps=20)
    np.testing.assert_allclose(through_items.mean, through_rows.mean, atol=2e-4)
    np.testing.assert_allclose(through_items.evidence, through_rows.evidence, rtol=1e-4)


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_the_route_through_coordinates_equals_the_route_through_items(rounds, full):
    draw = np.random.default_rng(5)
    model = linear(3)
    x = arrays(Item(embedding=draw.normal(size=(40, 3)).astype(np.float32)))
    a, b = draw.integers(0, 40, 64), draw.integers(0, 40, 64)
    weight = np.where(np.arange(64) < 50, draw.random(64), 0.0).astype(np.float32)
    fixed, target = draw.normal(size=64).astype(np.float32), draw.random(64).astype(np.float32)
    judged = Judgements(a, b, fixed, fixed, target, weight)
    square = np.linalg.cholesky(np.diag([0.5, 1.0, 0.7, 0.3]) + 0.1).astype(np.float32)
    root = jnp.asarray(square if full else np.diag(square))
    settings = {"steps": 20, "rounds": rounds}
    by_items = solve_items(model, x, judged, root, jnp.float32(1.5), **settings)
    by_coordinates = solve_many(model, x, judged, root, jnp.float32(1.5), chunk=16, **settings)
    np.testing.assert_allclose(by_items.mean, by_coordinates.mean, atol=2e-4)
    np.testing.assert_allclose(by_items.evidence, by_coordinates.evidence, rtol=1e-4)
    whitened = [np.eye(4) - np.asarray(s.jacobian.T @ s.precision @ s.jacobian) for s in (by_items, by_coordinates)]
    np.testing.assert_allclose(*whitened, atol=2e-4)


@pytest.mark.slow
def test_hundreds_of_users_with_more_comparisons_than_unknowns_do_not_deadlock():
    """A batched Cholesky solve in Newton's loop hung at 0 % CPU on jax 0.10; a process of its own can be killed."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from pluralprefs.newton import AWAY, Judgements, newton
from pluralprefs.fitting import _solve_item_bucket
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.ideal_point import IdealPoint
from pluralprefs.types import Item
draw, units, size, n = np.random.default_rng(0), 809, 33, 64
items = Item(embedding=jnp.asarray(draw.normal(size=(300, size)), jnp.float32))
model = BradleyTerry.init(key=jax.random.key(0), dim=size, item_effects=False)
one, zero = np.ones((units, n), np.float32), np.zeros((units, n), np.float32)
rows = Judgements(draw.integers(0, n, (units, n)), draw.integers(0, n, (units, n)), zero, zero, one, one)
local = draw.integers(0, 300, (units, n))
for _ in range(3):
    found = _solve_item_bucket(model, items, local, None, rows, jnp.full(size + 1, 0.1), jnp.float32(1), False)
few, root = jax.tree.map(lambda x: x[:, :16] % 16, rows), jnp.full(size + 1, 0.1)  # fewer items than coordinates: dual
for _ in range(3):
    dual = _solve_item_bucket(model, items, local[:, :16], None, few, root, jnp.float32(1), False)
print(float(found[3] + dual[3]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert np.isfinite(float(done.stdout))


def test_many_comparisons_leave_a_variance_that_is_small_but_not_lost():
    """One user, 20,000 comparisons of 100 items: variances are those of a dense float64 inverse."""
    draw = np.random.default_rng(12)
    n, dim, count = 20_000, 20, 100
    x = draw.normal(size=(count, dim)).astype(np.float32)
    first, second = draw.integers(0, count, (2, n))
    target, zero = (draw.random(n) < 0.5).astype(np.float32), np.zeros(n, np.float32)
    judged = Judgements(first, second, zero, zero, target, np.ones(n, np.float32))
    root = jnp.full(dim + 1, 3.0)
    found = jax.jit(solve_items, static_argnames="rounds")(linear(dim), Item(embedding=x), judged, root, 1.0, rounds=0)
    slope = 3.0 * feature_columns((x[first] - x[second]).astype(float))
    p = 1 / (1 + np.exp(-slope @ np.asarray(found.mean, float)))
    expected = np.diag(np.linalg.inv(np.eye(dim + 1) + slope.T @ ((p * (1 - p))[:, None] * slope)))
    a, m = np.asarray(found.jacobian, float), np.asarray(found.precision, float)
    np.testing.assert_allclose(np.diag(np.eye(dim + 1) - a.T @ m @ a), expected, rtol=1e-2)


def test_ninety_per_cent_intervals_cover_users_drawn_from_the_prior():
    """Bradley-Terry users drawn from the prior, 10 comparisons each: held-out log-odds are covered as often as said."""
    draw = np.random.default_rng(5)
    users, n, dim = 300, 10, 4
    model = linear(dim)
    table = Users.init(model, users=0, communities=0, strength=1.0)
    gain = int(np.argmax(np.asarray(ravel(table_deviation(model).replace(gain=jnp.ones(())))[0])))
    table = table.replace(user_root=table.user_root.at[gain].set(0.0))
    w = draw.normal(size=(users, dim))
    x = draw.normal(size=(users, n + 1, dim)).astype(np.float32)
    truth = np.einsum("ud,und->un", w, x)
    target = (draw.random(truth.shape) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    zero = np.zeros((n + 1, dim), np.float32)

    def one(x, target):
        support = rows(Item(embedding=x), Item(embedding=zero), np.zeros(n + 1)).replace(target=target)
        found = laplace_user(model, pick(support, slice(0, n)), table)
        return predict(model, table, found, pick(support, n))

    mean, variance = jax.jit(jax.vmap(one))(x, target)
    inside = np.abs(np.asarray(mean) - truth[:, n]) < 1.645 * np.sqrt(np.asarray(variance))
    assert 0.86 <= inside.mean() <= 0.94


def test_whitened_rows_and_columns_agree():
    root = np.tril(np.random.default_rng(0).normal(size=(3, 3))).astype(np.float32)
    v = np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(apply_root(jnp.asarray(root), jnp.asarray(v)), root @ v, rtol=1e-5)


def test_the_strength_of_users_is_recovered():
    """160 users with weights of standard deviation 0.5, 60 comparisons each: empirical Bayes finds 0.5 within 5 %."""
    draw = np.random.default_rng(6)
    users, n, dim = 160, 60, 6
    x = draw.normal(size=(200, dim)).astype(np.float32)
    w = 0.5 * draw.normal(size=(users, dim))
    first, second = draw.integers(0, 200, (2, users * n))
    unit = np.repeat(np.arange(users), n)
    truth = ((x[first] - x[second]) * w[unit]).sum(1)
    target = (draw.random(users * n) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    judged = jax.tree.map(np.asarray, rows(first, second, target))
    model = linear(dim)
    table = Users.init(model, users=0, communities=0)
    start = np.where(np.array(part_names(table_deviation(model))) == "gain", 0.0, 0.1).astype(np.float32)
    root, _ = fit_strength(model, table, arrays(Item(embedding=x)), judged, unit, users, start, rounds=8)
    assert abs(root.max() / w.std() - 1) < 0.05


def test_batches_of_small_systems_are_solved_with_one_blas_thread(monkeypatch):
    seen = []

    def watched(*arguments):
        seen.append({library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"})
        return buckets(*arguments)

    monkeypatch.setattr("pluralprefs.fitting.buckets", watched)
    model, table, support, _, _ = problem(2, 4)
    items = arrays(Item(embedding=jnp.concatenate([support.first.embedding, support.second.embedding])))
    judged = jax.tree.map(np.asarray, support.replace(first=np.arange(4), second=4 + np.arange(4)))
    with threadpool_limits(2, user_api="blas"):
        solve_level(model, table, items, judged, np.zeros(4, int), 2, np.ones(3, np.float32))
        after = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
        with one_blas_thread():
            outer = one_blas_thread()  # of another thread, say, that ends later
            outer.__enter__()
        between = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
        outer.__exit__(None, None, None)
        restored = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    assert seen == [{1}]
    assert (after, between, restored) == ({2}, {1}, {2})


def test_rounds_of_moments_reach_the_nearest_gaussian_and_its_evidence():
    """An independent maximisation of E_q[log p] - KL(q | prior) over mean and covariance, by quadrature, agrees."""
    model, table, support, x, _ = problem(2, 9)
    x, target = 1.5 * x.astype(float), np.asarray(support.target, float)  # whitened: the root is 1.5 everywhere
    table = table.replace(user_root=jnp.full(3, 1.5))
    nodes, masses = np.polynomial.hermite_e.hermegauss(40)

    def bound(parameters):
        mean, lower = parameters[:2], np.array([[np.exp(parameters[2]), 0], [parameters[3], np.exp(parameters[4])]])
        logits = (x @ mean)[:, None] + np.linalg.norm(x @ lower, axis=1)[:, None] * nodes
        nats = target[:, None] * np.logaddexp(0, -logits) + (1 - target[:, None]) * np.logaddexp(0, logits)
        divergence = np.sum(lower**2) + mean @ mean - 2 - 2 * (parameters[2] + parameters[4])
        return (nats @ masses).sum() / masses.sum() + divergence / 2

    best = minimize(bound, np.zeros(5), method="BFGS")
    found = solve_rows(model, support, table, table.user_root, steps=20, rounds=8)
    linear_part = np.array(part_names(table_deviation(model))) == "linear"
    np.testing.assert_allclose(np.asarray(found.mean)[linear_part], best.x[:2], atol=0.01)
    np.testing.assert_allclose(found.evidence, -best.fun, atol=0.01)


@pytest.mark.parametrize("n", [pytest.param(3, marks=pytest.mark.slow), 30])  # fewer rows than coordinates, and more
def test_where_a_prior_is_so_wide_that_a_mixture_saturates_no_step_runs_away(n):
    """Pure users of two ideal points: strengths grow without end, and the bound of the evidence still only rises."""
    draw = np.random.default_rng(11)
    points = jnp.asarray([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    model = IdealPoint(projector=({"kernel": jnp.eye(2), "bias": jnp.zeros(2)},), points=points, log_scale=jnp.ones(()))
    table = Users.init(model, users=0, communities=0)
    gain = jnp.asarray(np.array(part_names(table_deviation(model))) == "gain")
    solve = jax.jit(solve_rows, static_argnames="rounds")
    for case in range(8):
        a, b = draw.normal(size=(2, n, 2)).astype(np.float32) * 2
        ideal = np.asarray(points[case % 4])
        target = (np.linalg.norm(b - ideal, axis=1) > np.linalg.norm(a - ideal, axis=1)).astype(np.float32)
        target[0] = 1 - target[0]  # one slip
        support = rows(Item(embedding=a), Item(embedding=b), target)
        for width in (30.0, 300.0, 1000.0):
            root = jnp.where(gain, 0.0, width)
            bounds = np.array([solve(model, support, table, root, rounds=rounds).evidence for rounds in (1, 2)])
            assert (-10 * n < bounds).all()
            assert (bounds <= 0).all(), "no table of answers is more probable than 1"
            assert bounds[1] >= bounds[0] - 1.1 * AWAY  # two programs round differently


@pytest.mark.parametrize("rows_more_than_coordinates", [True, False])
@pytest.mark.parametrize("seed", [0, 10])
def test_a_sharp_mixture_is_followed_to_its_mode(seed, rows_more_than_coordinates):
    """A cosine with a mixture of four directions, as of ideal directions: the first steps end on a plateau."""
    n = 32 if rows_more_than_coordinates else 4
    draw = np.random.default_rng(seed)
    directions = draw.normal(size=(4, 6)).astype(np.float32)
    x = (directions[0] - directions[draw.integers(1, 4, 32)]) / np.linalg.norm(directions[0])
    x = jnp.asarray(x + 0.1 * draw.normal(size=x.shape), jnp.float32)[:n]

    def values(beta):
        mixture = jax.nn.softmax(jnp.asarray([-2.0, 1.0, 0.0, 0.0]) + beta) @ directions
        return 60.0 * (x @ mixture) / jnp.linalg.norm(mixture)

    none, ones = jnp.zeros(n), jnp.ones(n)
    judged = Judgements(jnp.arange(n), jnp.full(n, -1), none, none, ones, ones)
    solve = newton_by_coordinates if rows_more_than_coordinates else newton
    found, sure = (solve(values, jax.jacfwd(values), judged, 4, rounds=0, **more) for more in ({}, {"steps": 200}))
    assert float(found.evidence) > float(sure.evidence) - 0.1
    assert (values(found.mean) > 0).mean() > 0.9


def test_a_root_is_cut_to_the_widest_deviation_a_coordinate_may_have():
    most = np.array([1.0, 4.0, 0.0], np.float32)
    np.testing.assert_allclose(_at_most(np.array([3.0, 2.0, 5.0]), most), [1.0, 2.0, 5.0])  # 0: not known
    nothing = np.array([1e-38, 0.0, 5.0], np.float32)
    np.testing.assert_array_equal(
        _at_most(nothing, np.array([1e9, 4.0, 2.0], np.float32)), np.float32([1e-38, 0.0, 2.0])
    )
    full = np.array([[3.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    cut = _at_most(full, most)
    np.testing.assert_allclose(np.sqrt(np.diag(cut @ cut.T)), [1.0, 4.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose((cut @ cut.T)[0, 1] / 4.0, (full @ full.T)[0, 1] / 15.0, rtol=1e-6)  # correlations stay


def test_users_without_doubt_make_a_prior_wide_but_not_infinite():
    """Every user answers by the sign of its weight alone: whatever the width, a wider prior has the higher evidence."""
    draw = np.random.default_rng(12)
    model, users, n = linear(1), 30, 20
    table = Users.init(model, users=0, communities=0)
    x = arrays(Item(embedding=draw.normal(size=(60, 1)).astype(np.float32)))
    first, second = draw.integers(0, 60, (2, users * n))
    unit = np.repeat(np.arange(users), n)
    side = np.where(unit % 2, 1, -1)
    target = (side * np.asarray(x.embedding[first] - x.embedding[second])[:, 0] > 0).astype(np.float32)
    judged = jax.tree.map(np.asarray, rows(first, second, target))
    most = initial_root(model, table, x, judged, CERTAIN)
    start = 0.9 * np.where(np.array(part_names(table_deviation(model))) == "gain", 0.0, most).astype(np.float32)
    root, moments = fit_strength(model, table, x, judged, unit, users, start, rounds=4)
    np.testing.assert_allclose(root.max(), most.max(), rtol=1e-3)
    assert np.isfinite(moments.mean).all()


def crowd(users, n, spread):
    """Users who differ by `spread` a weight, of n comparisons each, and the base that is fitted to all of them."""
    draw = np.random.default_rng(7)
    dim = 4
    x = draw.normal(size=(200, dim)).astype(np.float32)
    shared = np.array([1.0, -1.0, 0.5, 0.0])
    w = shared + spread * draw.normal(size=(users, dim))
    first, second = draw.integers(0, 200, (2, users * n))
    unit = np.repeat(np.arange(users), n)
    truth = ((x[first] - x[second]) * w[unit]).sum(1)
    target = (draw.random(users * n) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    judged, items = jax.tree.map(np.asarray, rows(first, second, target)), arrays(Item(embedding=x))
    judged = judged.replace(user=unit.astype(np.int32))
    base, _ = population_by_newton(linear(dim), items, judged)
    return base, items, judged, shared


def test_the_scale_of_a_base_fitted_to_a_crowd_is_found():
    """A population fitted without users is flatter than they are; its scale returns the true one, 1, within 10 %."""
    base, items, judged, shared = crowd(200, 40, 0.8)
    flat = np.asarray(base(None)[1].population["linear"])
    assert np.linalg.norm(flat) < 0.8 * np.linalg.norm(shared)
    pooled = Pooled(gain=False, cross_fit=None)
    fitted = fit_pooled(base, items, judged, pooled, users=200, communities=0)
    np.testing.assert_allclose(float(fitted.users.scale) * flat, shared, atol=0.15)
    root = float(fitted.users.scale) * np.asarray(fitted.users.user_root)
    np.testing.assert_allclose(root.max(), 0.8, rtol=0.05)


def test_scale_and_strength_are_learned_until_they_settle(monkeypatch):
    """Two turns were too few: 20 nats short on 1,200 users of 20 comparisons, a strength 14 % too small."""
    base, items, judged, _ = crowd(200, 10, 2.0)
    fit = partial(fit_pooled, base, items, judged, Pooled(gain=False, cross_fit=None), users=200, communities=0)
    found = fit()
    monkeypatch.setattr("pluralprefs.pooling.TURNS", 40)
    monkeypatch.setattr("pluralprefs.pooling.SETTLED", 1e-4)
    best = fit()
    assert found.notes["evidence"] > best.notes["evidence"] - 0.3
    assert float(found.users.scale) == pytest.approx(float(best.users.scale), rel=0.04)


def test_a_base_that_says_nothing_of_users_is_not_flattened_for_ever():
    """Where users have nothing in common the evidence does not care how flat the base is."""
    base, items, judged, _ = crowd(60, 10, 2.0)
    draw = np.random.default_rng(0)
    flip = draw.integers(0, 2, 60)[judged.user]  # half of them say the opposite
    judged = judged.replace(target=np.where(flip, 1 - judged.target, judged.target).astype(np.float32))
    fitted = fit_pooled(base, items, judged, Pooled(gain=False, cross_fit=None), users=60, communities=0)
    assert 0.03 < float(fitted.users.scale) < 0.1


@pytest.mark.slow
def test_a_sample_of_users_teaches_the_strength_of_all(monkeypatch):
    """Every user is still solved, and the strength is near the one that all users give."""
    draw = np.random.default_rng(8)
    users, n, dim = 300, 20, 3
    x = draw.normal(size=(100, dim)).astype(np.float32)
    w = 0.7 * draw.normal(size=(users, dim))
    first, second = draw.integers(0, 100, (2, users * n))
    unit = np.repeat(np.arange(users), n).astype(np.int32)
    truth = ((x[first] - x[second]) * w[unit]).sum(1)
    target = (draw.random(users * n) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    judged, items = jax.tree.map(np.asarray, rows(first, second, target)).replace(user=unit), arrays(Item(embedding=x))
    base, _ = population_by_newton(linear(dim), items, judged)
    pooled = Pooled(gain=False, cross_fit=None)
    whole = fit_pooled(base, items, judged, pooled, users=users, communities=0)
    monkeypatch.setattr("pluralprefs.pooling.ENOUGH", 150)
    part = fit_pooled(base, items, judged, pooled, users=users, communities=0)
    strength = lambda fitted: float(fitted.users.scale * fitted.users.user_root.max())  # noqa: E731
    assert abs(strength(part) / strength(whole) - 1) < 0.15
    found, expected = (
        float(fitted.users.scale) * np.ravel(fitted.users.user.state["linear"]) for fitted in (part, whole)
    )
    assert (found != 0).all()
    assert np.corrcoef(found, expected)[0, 1] > 0.99


@pytest.mark.slow
def test_residual_variance_is_what_predictions_without_it_lack():
    """Rows with an effect of their own, variance 4, that no level explains."""
    draw = np.random.default_rng(9)
    users, n, dim = 100, 120, 2
    x = draw.normal(size=(400, dim)).astype(np.float32)
    w = draw.normal(size=(users, dim))
    first, second = draw.integers(0, 400, (2, users * n))
    unit = np.repeat(np.arange(users), n).astype(np.int32)
    truth = ((x[first] - x[second]) * w[unit]).sum(1)
    target = (draw.random(users * n) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    noisy = truth + 2.0 * draw.normal(size=len(truth))
    asked = np.arange(users * n) % 3 == 0
    target[asked] = draw.random(asked.sum()) < 1 / (1 + np.exp(-noisy[asked]))
    judged, items = jax.tree.map(np.asarray, rows(first, second, target)).replace(user=unit), arrays(Item(embedding=x))
    base, _ = population_by_newton(linear(dim), items, take(judged, ~asked))
    pooled = Pooled(gain=False, cross_fit=None, residual=True)
    fitted = fit_pooled(base, items, take(judged, ~asked), pooled, users=users, communities=0,
                        validation=take(judged, asked))  # fmt: skip
    assert 1.5 < float(fitted.users.residual) < 6.0
    without = replace(fitted, users=fitted.users.replace(residual=jnp.zeros(())))
    expected = residual_variance(*predict_seen(without, items, take(judged, asked)), take(judged, asked))
    np.testing.assert_allclose(float(fitted.users.residual), expected, rtol=1e-5)


def test_residual_variance_is_recovered():
    draw = np.random.default_rng(10)
    mean, variance = 2.0 * draw.normal(size=60_000), np.full(60_000, 0.5)
    truth = mean + np.sqrt(0.5 + 4.0) * draw.normal(size=60_000)
    target = (draw.random(60_000) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    none = Item(embedding=np.zeros((60_000, 1), np.float32))
    assert 3.4 < residual_variance(mean, variance, rows(none, none, target)) < 4.6


def test_shared_variance_is_a_quarter_of_the_squared_difference_of_halves():
    """Two halves of the users whose populations are known, and users that may not deviate."""
    draw = np.random.default_rng(11)
    model, users = linear(2), 12
    items = arrays(Item(embedding=np.array([[1.0, 0.0], [0.0, 0.5]], np.float32)))
    unit = np.repeat(np.arange(users), 10).astype(np.int32)
    first = draw.integers(0, 2, 120)
    judged = jax.tree.map(np.asarray, rows(first, 1 - first, draw.integers(0, 2, 120))).replace(user=unit)
    table = Users.init(model, users=users, communities=0, strength=0.0).replace(scale=jnp.float32(2.0))
    masks = []

    def base(mask):
        masks.append(mask)
        weight = jnp.asarray([1.0, 0.0]) if len(masks) == 1 else jnp.asarray([0.0, 1.0])
        return model, table.replace(population={"linear": weight})

    halves = half_fits(base, Fitted(model, table, judged))
    expected = (2.0 * (1.0 - -0.5)) ** 2 / 4  # log-odds of the first item over the second: 2 * 1 and 2 * -0.5
    assert shared_variance(halves, items) == pytest.approx(expected, rel=1e-5)
    few = judged.replace(user=np.where(unit < 3, unit, -1))
    assert half_fits(base, Fitted(model, table, few)) == []
    assert shared_variance([], items) == 0.0
    assert (masks[0] == ~masks[1]).all()
    assert all(len(set(masks[0][unit == u])) == 1 for u in range(users))
