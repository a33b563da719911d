"""Users inferred from shots: their formulas by independent code, and the whole path from a file to a new user."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from families import DIM, FAMILIES, INFERRING, KEY, items, pick, rows, small_variational
from tables import write
from test_parity import layers, softmax

import pluralprefs.run
from pluralprefs.adapt import infer_user, predict, predict_jointly
from pluralprefs.adapted import check_finite
from pluralprefs.asking import suggest
from pluralprefs.choosing import neighbours
from pluralprefs.data.episodes import episode_indices
from pluralprefs.data.files import DataError
from pluralprefs.directions import differences, directed, ways
from pluralprefs.fitting import take
from pluralprefs.inferring import _table, fit_inferred, settled
from pluralprefs.judging import FEWEST, Judging, far_items, far_judges, held_out, judges
from pluralprefs.launch import fit
from pluralprefs.likelihoods import Logistic, pooled_mean
from pluralprefs.models.low_rank import LowRank
from pluralprefs.models.neural_process import NeuralProcess
from pluralprefs.models.residual import Residual
from pluralprefs.models.set_pooled import SetPooled
from pluralprefs.models.variational import active_units
from pluralprefs.pooling import validation_nats
from pluralprefs.registry.files import RegistryError, load_arrays
from pluralprefs.run import load
from pluralprefs.spread import Asked, disjoint, efficiency_of, left_open, lost_evidence, mixed, scale_of
from pluralprefs.trust import KNOTS, _open_of, borne_out, prior_table, trusted
from pluralprefs.users import Pooled, Users
from pluralprefs.users_cli import _show

X = items(20)
FIRST, SECOND = np.array([0, 1, 2, 3]), np.array([1, 2, 4, 5])
TARGET, WEIGHT = np.array([1.0, 0.0, 0.7, 1.0]), np.array([1.0, 2.0, 1.0, 0.0])
SHOTS = rows(pick(X, FIRST), pick(X, SECOND), TARGET, WEIGHT)
E = np.asarray(X.embedding, np.float64)


def test_summed_fast_weights_are_the_published_sum_over_preferred_and_rejected_keys():
    model = INFERRING["fast_weights_sum"]()
    key = layers(model.key, E)
    user = jax.jit(model.infer_user)(SHOTS).mean
    for y in range(3):
        reward = 0.0
        for i, j, t, w in zip(FIRST, SECOND, TARGET, WEIGHT, strict=True):
            reward += w * (2 * t - 1) * (key[i] - key[j]) @ key[y]
        assert float(model.reward(user, pick(X, y))) == pytest.approx(np.exp(float(model.log_rate)) * reward, rel=1e-4)


def test_ridge_fast_weights_solve_the_penalised_least_squares():
    model = INFERRING["fast_weights"]().replace(log_ridge=jnp.log(0.3))
    apart = layers(model.key, E[FIRST]) - layers(model.key, E[SECOND])
    scale = np.sqrt(WEIGHT)
    system = np.concatenate([scale[:, None] * apart, np.sqrt(0.3) * np.eye(3)])
    wanted = np.linalg.lstsq(system, np.concatenate([scale * (2 * TARGET - 1), np.zeros(3)]), rcond=None)[0]
    np.testing.assert_allclose(jax.jit(model.infer_user)(SHOTS).mean, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["variational", "swap_symmetric"])
def test_a_variational_user_is_the_prior_times_one_gaussian_a_shot(name):
    model = INFERRING[name]()
    precision, weighted = np.ones(2), np.zeros(2)
    for i, j, t, w in zip(FIRST, SECOND, TARGET, WEIGHT, strict=True):
        for chosen, rejected, share in ((i, j, t), (j, i, 1 - t)):
            k = [layers(model.projection, E[n : n + 1])[0] for n in (chosen, rejected)]
            if name == "variational":
                head = layers(model.encoder, np.concatenate(k))
                mean, raw = head[:2], head[2:]
            else:
                d = k[0] - k[1]
                plus, minus = (layers(model.encoder, np.concatenate([s * d, -s * d])) for s in (1, -1))
                mean, raw = (plus[:2] - minus[:2]) / 2, (plus[2:] + minus[2:]) / 2
            sharp = w * share * np.log1p(np.exp(raw))
            precision += sharp
            weighted += sharp * mean
    found = jax.jit(model.infer_user)(SHOTS)
    np.testing.assert_allclose(found.mean, weighted / precision, rtol=1e-4)
    np.testing.assert_allclose(found.covariance.root**2, 1 / precision, rtol=1e-4)


def test_the_penalty_is_the_divergence_from_the_prior_of_users_who_are_asked_about():
    model = INFERRING["variational"]().replace(beta=0.5)
    found = jax.tree.map(lambda x: jnp.stack([x, x]), jax.jit(model.infer_user)(SHOTS))
    grid = np.linspace(-9, 9, 20001)
    normal = lambda m, s: np.exp(-0.5 * ((grid - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))  # noqa: E731
    wanted = 0.0
    for m, s in zip(found.mean[0], found.covariance.root[0], strict=True):
        q, p = normal(float(m), float(s)), normal(0.0, 1.0)
        wanted += np.trapezoid(q * (np.log(q + 1e-300) - np.log(p)), grid)
    query = jax.tree.map(lambda x: jnp.stack([x, x]), SHOTS)
    query = query.replace(weight=query.weight.at[1].set(0.0))
    assert float(model.penalty(found, query, KEY)) == pytest.approx(0.5 * wanted, rel=1e-3)


def test_a_neural_process_reads_shots_by_attention_and_each_target_reads_the_latents_alone():
    model = NeuralProcess.init(key=KEY, dim=DIM, width=4, latents=2, layers=2, heads=2)

    def normed(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def block(weights, asking, asked):
        matrix = {name: np.asarray(weights[name], np.float64) for name in "qkvo"}
        out = []
        for query in asking:
            heads = []
            for part in (slice(0, 2), slice(2, 4)):
                q = (normed(query) @ matrix["q"])[part]
                share = softmax(np.array([(normed(c) @ matrix["k"])[part] @ q for c in asked]) / np.sqrt(2))
                heads.append(sum(s * (normed(c) @ matrix["v"])[part] for s, c in zip(share, asked, strict=True)))
            moved = query + np.concatenate(heads) @ matrix["o"]
            out.append(moved + layers(weights["mlp"], normed(moved)))
        return np.array(out)

    k = layers(model.projection, E)
    tokens = [np.asarray(model.null, np.float64)[0]]
    for i, j, t, w in zip(FIRST, SECOND, TARGET, WEIGHT, strict=True):
        y = 2 * t - 1
        sides = [np.concatenate([k[i], k[j], [y]]), np.concatenate([k[j], k[i], [-y]])]
        tokens += [sum(layers(model.token, side) for side in sides) / 2] * int(w)  # a weight of 2 is two tokens
    latents, asked = np.asarray(model.latents, np.float64), layers(model.target, k[:3])
    for read, look in model.blocks:
        latents = block(read, latents, np.array(tokens))
        asked = block(look, asked, latents)
    user = jax.jit(model.infer_user)(SHOTS).mean
    np.testing.assert_allclose(user[1], latents, rtol=1e-3, atol=1e-4)
    found = jax.jit(jax.vmap(model.reward, (None, 0)))(user, pick(X, slice(0, 3)))
    np.testing.assert_allclose(found, layers(model.head, asked)[:, 0], rtol=1e-3, atol=1e-4)


def test_a_set_pooled_user_is_a_shrunken_mean_of_pair_embeddings():
    model = INFERRING["set_pooled"]()
    k, total = layers(model.projection, E), np.zeros(4)
    for i, j, t, w in zip(FIRST, SECOND, TARGET, WEIGHT, strict=True):
        total += w * t * layers(model.pair, np.concatenate([k[i], k[j]]))
        total += w * (1 - t) * layers(model.pair, np.concatenate([k[j], k[i]]))
    wanted = total / (1 + WEIGHT.sum()) @ np.asarray(model.out, np.float64)
    user = jax.jit(model.infer_user)(SHOTS).mean
    np.testing.assert_allclose(user, wanted, rtol=1e-4, atol=1e-6)
    assert float(model.reward(user, pick(X, 0))) == pytest.approx(wanted @ np.tanh(k[0]), rel=1e-3)


def test_meta_training_differentiates_through_the_steps_and_first_order_does_not():
    narrow = INFERRING["meta_reward"]()  # shared with other tests: drawn in their precision
    with jax.enable_x64():
        wide = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else x)
        model, shots = wide(narrow), wide(SHOTS)

        def loss(kernel, first_order):
            settings = dict(model.settings) | {"first_order": first_order, "steps": 2}
            moved = model.replace(basis=({"kernel": kernel, "bias": model.basis[0]["bias"]},),
                                  settings=tuple(settings.items()))  # fmt: skip
            return jnp.sum(moved.infer_user(shots).mean ** 2)

        kernel, value = model.basis[0]["kernel"], jax.jit(loss, static_argnums=1)
        slope = jax.jit(jax.grad(loss), static_argnums=1)
        step = np.random.default_rng(0).normal(size=kernel.shape)
        numeric = (value(kernel + 1e-5 * step, False) - value(kernel - 1e-5 * step, False)) / 2e-5
        assert float(jnp.sum(slope(kernel, False) * step)) == pytest.approx(float(numeric), rel=1e-5)
        assert abs(float(numeric)) > 1e-3
        np.testing.assert_array_equal(slope(kernel, True), 0.0)
        none = model.replace(settings=tuple((dict(model.settings) | {"steps": 0}).items()))
        np.testing.assert_array_equal(none.infer_user(shots).mean, model.start)


@pytest.mark.parametrize("collapsed", [False, True])
def test_coordinates_that_tell_users_apart_are_counted(collapsed):
    """Users of the training, each inferred from all its shots; a collapsed encoder says the same of everyone."""
    population = LowRank.init(key=KEY, dim=DIM, rank=1)
    family = small_variational(latent=5)
    family = family.replace(encoder=jax.tree.map(lambda x: (0 if collapsed else 3) * x, family.encoder))
    model = Residual.init(population=population, family=family, knots=3, dim=DIM)
    model = model.replace(most=jnp.full(2, 1e6))
    user = np.array([0, 0, 1, 2], np.int32)
    table = jax.tree.map(np.asarray, rows(FIRST, SECOND, TARGET)).replace(user=user)
    notes = {}
    found = _table(model, X, table, Pooled(), 4, 0, notes)
    apart = np.asarray(found.users.user.state["state"])[:3].var(axis=0)
    assert notes["active_units"] == (apart > 0.01).sum()
    assert (notes["active_units"] == 0) == collapsed
    assert active_units(np.array([[0.3, 0.0, 1.0], [-0.3, 0.1, 1.0]])) == 1
    assert active_units(np.zeros((0, 3))) == 0


def test_a_residual_is_the_population_plus_the_shift_as_far_as_it_is_trusted():
    model, support = INFERRING["residual"](), SHOTS
    infer = jax.jit(lambda shots: model.infer_user(shots).mean)
    a, b = pick(X, 0), pick(X, 3)
    base = float(model.population.log_odds(model.weights, a, b))
    at_prior = float(model.family.log_odds(model.prior, a, b))
    nothing = infer(support.replace(weight=jnp.zeros(4)))
    assert float(model.log_odds(nothing, a, b)) == pytest.approx(1.1 * base, rel=1e-4)
    found = infer(support)  # four shots, and trust is known for up to two
    assert float(found["trust"]) == pytest.approx(0.8)
    said, reverse = (
        float(model.family.log_odds(model.family.infer_user(shots).mean, a, b)) - at_prior
        for shots in (support, support.replace(target=1 - support.target))
    )
    assert abs(said + reverse) > 0.01  # this family is not odd
    shift = 0.8 * (said - reverse) / 2 + 0.3 * (said + reverse) / 2
    assert float(model.log_odds(found, a, b)) == pytest.approx(1.4 * (base + shift), rel=1e-4)
    flipped = infer(support.replace(target=1 - support.target))
    both = float(model.log_odds(found, a, b) + model.log_odds(flipped, a, b)) / 2
    assert both == pytest.approx(1.4 * (base + 0.3 * (said + reverse) / 2), rel=1e-4)
    one = infer(support.replace(weight=jnp.asarray([1.0, 0, 0, 0])))
    assert float(one["trust"]) == pytest.approx(0.4)
    half = infer(support.replace(weight=jnp.asarray([0.5, 0, 0, 0])))
    assert float(half["trust"]) == pytest.approx(0.4)  # a shot of any weight is a shot, as where trust was learned
    many = infer(support.replace(weight=10 * support.weight))["state"]  # forty count as four
    np.testing.assert_allclose(many, infer(support)["state"], rtol=1e-4)
    assert np.abs(many - model.family.infer_user(support.replace(weight=10 * support.weight)).mean).max() > 1e-3


def test_shots_of_responses_that_training_does_not_know_are_trusted_apart():
    model = INFERRING["residual"]()
    infer = jax.jit(lambda shots: model.infer_user(shots).mean["trust"])
    unknown = lambda item, rows: item.replace(index=jnp.where(rows, -1, 0))  # noqa: E731
    every, some = np.ones(4, bool), np.array([True, False, False, True])  # the fourth has no weight
    apart = SHOTS.replace(first=unknown(SHOTS.first, every), second=unknown(SHOTS.second, every))
    assert float(infer(apart)) == pytest.approx(0.2)
    half_known = SHOTS.replace(first=unknown(SHOTS.first, ~every), second=unknown(SHOTS.second, every))
    assert float(infer(half_known)) == pytest.approx(0.2)  # of the pair, one response
    both = SHOTS.replace(first=unknown(SHOTS.first, some), second=unknown(SHOTS.second, ~every))
    assert float(infer(both)) == pytest.approx((2 * 0.8 + 0.2) / 3)
    states = jax.jit(lambda shots: model.infer_user(shots).mean["state"])
    heavy = both.replace(weight=jnp.asarray([10.0, 30.0, 5.0, 0.0]))  # what is unknown counts as 3 shots, the rest as 4
    counted = both.replace(weight=jnp.asarray([3.0, 4 * 30 / 35, 4 * 5 / 35, 0.0]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), states(heavy), states(counted))
    unlike = both.replace(weight=jnp.asarray([4.0, 3 * 30 / 35, 3 * 5 / 35, 0.0]))
    assert max(np.abs(a - b).max() for a, b in zip(
        jax.tree.leaves(states(heavy)), jax.tree.leaves(states(unlike)), strict=True)) > 1e-4  # fmt: skip
    nobody_says = jax.tree.map(lambda x: x, SHOTS)
    nobody_says = nobody_says.replace(first=SHOTS.first.replace(index=None), second=SHOTS.second.replace(index=None))
    alone = model.replace(population=FAMILIES["low_rank_free"]())
    assert float(alone.infer_user(nobody_says).mean["trust"]) == pytest.approx(0.8)


def test_shots_are_read_on_top_of_the_population_when_scored_as_when_trained():
    """An episode's shots bring the population's log-odds (out of fold); those of a new user come without."""
    family = INFERRING["meta_reward"]()
    model = Residual.init(population=FAMILIES["low_rank_free"](), family=family, knots=3, dim=DIM)
    model = model.replace(weights=jnp.asarray([0.5, -1.0]), most=jnp.full(2, 100.0))
    known = jax.vmap(partial(model.population.log_odds, model.weights))(SHOTS.first, SHOTS.second)
    trained = model.family.infer_user(SHOTS.replace(offset=known)).mean
    np.testing.assert_allclose(model.infer_user(SHOTS).mean["state"], trained, rtol=1e-4, atol=1e-5)
    assert np.abs(trained - model.family.infer_user(SHOTS).mean).max() > 0.01


def test_what_shots_leave_open_is_one_gaussian_deviation_a_user():
    """The posterior of Laplace's method over directions in which users differ, by NumPy."""
    model = INFERRING["residual"]()
    table = prior_table(model)
    posterior = infer_user(model, SHOTS, table)
    a, b = np.array([0, 1, 2]), np.array([3, 5, 4])
    asked = rows(pick(X, a), pick(X, b), np.ones(3))
    rewards = np.array([[float(model.family.reward(jax.tree.map(lambda x, v=v: x[v], model.others), pick(X, y)))
                         for v in range(5)] for y in range(6)])  # fmt: skip
    directions = 0.9 * np.concatenate([rewards, E[:6]], axis=1) @ np.asarray(model.axes)
    apart, shown = directions[a] - directions[b], directions[FIRST] - directions[SECOND]
    known = jax.vmap(partial(model.population.log_odds, model.weights))(SHOTS.first, SHOTS.second)
    user = model.family.infer_user(SHOTS.replace(offset=known)).mean  # of four shots, as many as count
    said = [float(model.family.log_odds(user, pick(X, i), pick(X, j)) - model.family.log_odds(
        model.prior, pick(X, i), pick(X, j))) for i, j in zip(FIRST, SECOND, strict=True)]  # fmt: skip
    p = 1 / (1 + np.exp(-(np.asarray(known) + said)))
    told = 0.8 * (shown * (WEIGHT * p * (1 - p))[:, None]).T @ shown  # efficiency of two shots and more
    covariance = apart @ np.linalg.inv(np.eye(3) + told) @ apart.T
    joint = jax.jit(predict_jointly)(model, table, posterior, asked)
    np.testing.assert_allclose(joint.plus @ joint.plus.T - joint.minus @ joint.minus.T, covariance, rtol=1e-3)
    for i in range(3):
        mean, variance = jax.jit(predict)(model, table, posterior, jax.tree.map(lambda x, i=i: x[i], asked))
        assert float(variance) == pytest.approx(covariance[i, i], rel=1e-3)
        assert float(mean) == pytest.approx(float(joint.mean[i]), rel=1e-4)
    nothing = infer_user(model, SHOTS.replace(weight=jnp.zeros(4)), table)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), nothing.mean.state, jax.tree.map(
        jnp.zeros_like, nothing.mean.state))  # fmt: skip
    joint = predict_jointly(model, table, nothing, asked)
    np.testing.assert_allclose((joint.plus**2).sum(1), (apart**2).sum(1), rtol=1e-4)


@pytest.mark.parametrize("far", [1e2, 1e3, 3e3])
def test_a_shot_of_a_response_far_from_all_others_leaves_the_rest_open(far):
    """Float32 once made a covariance of NaN from some thousand times what is usual."""
    family = INFERRING["fast_weights"]()
    prior = family.init_user()
    others = jax.tree.map(lambda x: jnp.stack([x] * 5), prior)
    model = INFERRING["residual"]().replace(family=family, prior=prior, others=others, weights=jnp.zeros(2))
    axes = jax.random.normal(KEY, (len(model.axes), 16))
    model = model.replace(axes=axes, most=jnp.full(2, 100.0), spread=jnp.float32(3.4))
    away = X.replace(embedding=X.embedding.at[0].mul(far))
    root = np.asarray(jax.jit(model.infer_user)(rows(pick(away, FIRST), pick(away, SECOND), TARGET)).mean["open"])
    values = np.linalg.eigvalsh(root.astype(float) @ root.T)
    assert 0.0 < values[0] < 0.01  # of what was asked
    np.testing.assert_allclose(values[4:], 1.0, atol=1e-3)  # four shots say nothing of twelve other directions


def test_what_shots_tell_of_each_unknown_is_told_apart():
    """A rotation of the unknowns in which what is known of them is diagonal, by NumPy's quadratic form."""
    one = jnp.ones((2, 3))
    model = INFERRING["residual"]().replace(efficiency=one, trust=one, even=one, scale=one, spread=jnp.ones(()))
    shown = jax.tree.map(np.asarray, rows(FIRST, SECOND, TARGET, np.ones(4)))
    shower, unit = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1, 2])
    asked = jax.tree.map(np.asarray, rows(np.array([0, 1, 2, 3, 4]), np.array([3, 5, 4, 0, 1]), np.ones(5)))
    apart, known = _open_of(model, X, shown, shower, asked, unit)
    by_rows, by_shots = differences(model, X, asked), differences(model, X, shown)
    np.testing.assert_allclose((apart**2).sum(1), (by_rows**2).sum(1), rtol=1e-4)
    for row, own in enumerate(unit):
        mine = np.flatnonzero(shower == own)
        told = np.zeros((3, 3))
        if len(mine):
            shots = rows(*(pick(X, side[mine]) for side in (FIRST, SECOND)), TARGET[mine])
            offset = jax.vmap(partial(model.population.log_odds, model.weights))(shots.first, shots.second)
            user = model.family.infer_user(shots.replace(offset=offset)).mean
            said = [
                float(
                    model.family.log_odds(user, pick(X, i), pick(X, j))
                    - model.family.log_odds(model.prior, pick(X, i), pick(X, j))
                )
                for i, j in zip(FIRST[mine], SECOND[mine], strict=True)
            ]
            p = 1 / (1 + np.exp(-(np.asarray(offset) + said)))
            told = (by_shots[mine] * (p * (1 - p))[:, None]).T @ by_shots[mine]
        wanted = by_rows[row] @ told @ by_rows[row]
        assert (apart[row] ** 2 * known[row]).sum() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert (wanted > 1e-3) == (own < 2)


def test_a_user_of_features_that_no_arithmetic_holds_is_refused():
    """Whose state is NaN would have every probability NaN."""
    whole = infer_user(INFERRING["residual"](), SHOTS, prior_table(INFERRING["residual"]()))
    stacked = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 3), whole)
    check_finite(["a", "b", "c"], stacked)
    stacked.mean.state["open"][1, 0, 0] = np.nan
    with pytest.raises(DataError, match="user 'b' is not finite"):
        check_finite(["a", "b", "c"], stacked)


def asked_of(users, per_user, spread, scale=1.0, shift=0.0, seed=0):
    """Answers of users who depart from what is predicted: log-odds N(0, 1) times `scale`, and a deviation each."""
    draw = np.random.default_rng(seed)
    unit = np.repeat(np.arange(users), per_user)
    first = draw.integers(0, 6, len(unit)).astype(np.int32)
    second = ((first + draw.integers(1, 6, len(unit))) % 6).astype(np.int32)
    known, moved = draw.normal(size=len(unit)), draw.normal(size=len(unit))
    own = spread * draw.normal(size=(users, DIM))[unit]
    truth = scale * (known + shift * moved) + (own * (E[first] - E[second])).sum(1)
    target = draw.random(len(unit)) < 1 / (1 + np.exp(-truth))
    table = jax.tree.map(np.asarray, rows(first, second, target)).replace(user=unit.astype(np.int32))
    apart = E[first] - E[second]
    return Asked(np.stack([moved, 0 * moved], axis=1), known, table, unit, apart, 0 * apart)


def test_the_spread_of_users_about_what_is_predicted_is_recovered():
    asked = asked_of(300, 30, spread=0.7, scale=1.2)
    scale, spread = left_open(asked, 0.0)
    assert spread == pytest.approx(0.7, rel=0.15)
    for seed in range(3):  # answers that have nothing in common
        nothing = left_open(asked_of(300, 10, spread=0.0, seed=seed), 0.0)
        assert nothing == (pytest.approx(1, abs=0.1), pytest.approx(0, abs=0.05))
    gaps = asked._replace(unit=3 * asked.unit)  # draws of which nothing was asked
    assert left_open(gaps, 0.0) == pytest.approx((scale, spread))
    same = left_open(asked._replace(apart=0 * asked.apart), 0.0)  # nobody differs from anybody
    assert same[1] == 0.0
    assert same[0] == pytest.approx(1, abs=0.01)  # a mean over users is less sharp than one of them, never sharper
    assert left_open(take(asked, slice(0)), 0.0) == (1.0, 0.0)


def placed(model, family, items, rows, mix=0.0):
    """The residual with a family and its directions."""
    model = settled(model, family, items, rows)
    return directed(model, ways(model, items, rows), mix)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_a_user_is_sharper_than_the_mean_over_users_by_what_is_open(spread):
    """The average over users says what was predicted: quadrature in place of the formula for a mean of logistics."""
    asked = asked_of(50, 20, spread=0.0, shift=0.5)
    scale = scale_of(asked, 0.5, spread)
    predicted = asked.offset + 0.5 * asked.shift[:, 0]
    width = spread * np.sqrt((asked.apart**2).sum(1))
    nodes, masses = np.polynomial.hermite_e.hermegauss(60)

    def mean_answer(scale):
        logits = scale * predicted[:, None] + width[:, None] * nodes
        return (1 / (1 + np.exp(-logits))) @ (masses / masses.sum())

    def lost(scale):  # nats on what was predicted, one comparison's spread being not another's
        meant, found = 1 / (1 + np.exp(-predicted)), mean_answer(scale)
        return -(meant * np.log(found) + (1 - meant) * np.log(1 - found)).mean()

    assert np.abs(mean_answer(scale) - 1 / (1 + np.exp(-predicted))).mean() < 0.05
    assert lost(scale) < min(lost(0.8 * scale), lost(1.25 * scale))
    assert scale_of(asked._replace(rows=asked.rows.replace(target=1 - asked.rows.target)), 0.5, spread) == scale


def test_pairs_of_the_same_votes_do_not_say_that_users_differ():
    """Votes by coins: a user's pairs agree wherever they share a response, and have nothing else in common."""
    draw = np.random.default_rng(0)
    many = items(1, 200)
    lines = []
    for one in range(120):
        shown = draw.permutation(200)[:12]
        lines += [(one, a, b) for a in shown[:6] for b in shown[6:]]
    user, first, second = np.array(lines, np.int32).T
    swap = draw.random(len(user)) < 0.5
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    table = jax.tree.map(np.asarray, rows(first, second, 1.0 - swap)).replace(user=user)
    family = FAMILIES["set_pooled"]()
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=family, knots=len(KNOTS), dim=DIM)
    model, near = placed(model, family, many, table), Judging(table, "item")
    as_answers, as_votes = (
        trusted(model, many, {}, table, near, dependent=dependent).spread for dependent in (False, True)
    )
    assert float(as_votes) < 0.5 < 2.0 < float(as_answers)
    asked = Asked(np.zeros((len(user), 2)), np.zeros(len(user)), table, user, *2 * [np.zeros((len(user), 1))])
    alone = disjoint(asked)
    for one in range(120):
        own = alone.unit == one
        shown = np.concatenate([alone.rows.first[own], alone.rows.second[own]])
        assert len(np.unique(shown)) == len(shown) == 12


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e-3, 1e-2])
def test_where_nothing_is_predicted_a_user_is_not_ten_times_as_sharp(size):
    """The loss is flat in the scale there, or noise; a scale is also read between numbers of shots."""
    asked = asked_of(50, 20, spread=0.0)
    asked = asked._replace(offset=size * asked.offset)
    flatter = 1 / np.sqrt(1 + np.pi * (asked.apart**2).sum(1) / 8)
    weight = asked.offset**2 if size else np.ones(1000)
    expected = (weight * flatter).sum() / (weight * flatter**2).sum()  # least squares of small predictions
    assert scale_of(asked, 0.0, 1.0) == pytest.approx(expected, rel=0.05)
    assert scale_of(asked, 0.0, 0.0) == pytest.approx(1.0, abs=0.01)


def test_pairs_that_all_share_a_response_still_say_that_users_differ():
    """A reference against candidates: no two pairs are apart, and one a user says nothing of how they differ."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(100), 20).astype(np.int32)
    first, second = np.zeros(len(user), np.int32), draw.integers(1, 6, len(user)).astype(np.int32)
    taste = 1.5 * draw.normal(size=(100, DIM))[user]
    chance = 1 / (1 + np.exp(-(taste * (E[first] - E[second])).sum(1)))
    table = jax.tree.map(np.asarray, rows(first, second, draw.random(len(user)) < chance)).replace(user=user)
    family = FAMILIES["set_pooled"]()
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=family, knots=len(KNOTS), dim=DIM)
    model, near = placed(model, family, X, table), Judging(table, "pair")
    found = [trusted(model, X, {}, table, near, dependent=dependent).spread for dependent in (False, True)]
    assert float(found[1]) == pytest.approx(float(found[0]), rel=1e-3)
    assert float(found[1]) > 0.5


def test_what_users_of_the_training_leave_open_is_in_units_of_log_odds():
    told = jax.tree.map(np.asarray, rows(np.arange(6) % 6, (np.arange(6) + 1) % 6, np.arange(6) % 2))
    told = jax.tree.map(lambda x: np.tile(x, 10), told).replace(user=np.repeat(np.arange(20), 3).astype(np.int32))
    family = FAMILIES["set_pooled"]()
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=family, knots=3, dim=DIM)
    found = settled(model, family, X, told)
    how = ways(found, X, told)
    for mix in (0.0, 0.3, 1.0):
        assert (differences(directed(found, how, mix), X, told) ** 2).sum(1).mean() == pytest.approx(1.0, rel=1e-3)
    covariance = differences(directed(found, how, 1.0), X, told)
    apart = E[told.first] - E[told.second]
    np.testing.assert_allclose(covariance @ covariance.T, apart @ apart.T / (apart**2).sum(1).mean(), atol=1e-4)
    loud = settled(model, replace(family, out=10 * family.out), X, told)
    louder = ways(loud, X, told)
    assert louder.rewards.unit == pytest.approx(how.rewards.unit / 10, rel=1e-3)
    both = [differences(directed(*one, 0.3), X, told) for one in ((found, how), (loud, louder))]
    np.testing.assert_allclose(*(one @ one.T for one in both), rtol=1e-2, atol=1e-4)
    bounded = directed(found, ways(found, X, told, most=how.rewards.unit / 4), 0.0)  # differ as little as they do
    assert (differences(bounded, X, told) ** 2).sum(1).mean() == pytest.approx(1 / 16, rel=1e-3)
    silent = settled(model, replace(family, out=0 * family.out), X, told)
    nothing = ways(silent, X, told)
    assert nothing.rewards.unit == 0.0
    assert not differences(directed(silent, nothing, 0.0), X, told).any()
    assert mixed(silent, nothing, X, told) == 1.0


def test_directions_that_are_left_out_do_not_make_users_differ_less():
    """There are more features than directions: those kept stand for all."""
    many = items(1, 60)
    wide = np.random.default_rng(0).normal(size=(60, 40)).astype(np.float32)
    many = many.replace(embedding=jnp.asarray(wide))
    side = np.arange(60)
    table = jax.tree.map(np.asarray, rows(side, (side + 1) % 60, side % 2)).replace(user=(side // 3).astype(np.int32))
    family = SetPooled.init(key=KEY, dim=40, width=8, hidden=8)
    model = Residual.init(population=LowRank.init(key=KEY, dim=40, rank=1), family=family, knots=3, dim=40)
    model = settled(model, family, many, table)
    how = ways(model, many, table)
    for mix in (0.0, 0.3, 1.0):
        usual = (differences(directed(model, how, mix), many, table) ** 2).sum(1).mean()
        assert usual == pytest.approx(1.0, rel=1e-3), mix


def test_users_differ_as_those_of_the_training_or_by_the_features():
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 30).astype(np.int32)
    first = draw.integers(0, 6, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 6, len(user))) % 6).astype(np.int32)
    table = jax.tree.map(np.asarray, rows(first, second, np.ones(len(user)))).replace(user=user)
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=FAMILIES["set_pooled"](),
                          knots=len(KNOTS), dim=DIM)  # fmt: skip
    model = settled(model, model.family, X, table)
    model = model.replace(others=jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), model.others))
    how = ways(model, X, table)
    for mix in (0.0, 1.0):
        apart = differences(directed(model, how, mix), X, table)
        truth = 2 * (draw.normal(size=(200, apart.shape[1]))[user] * apart).sum(1)
        told = (draw.random(len(truth)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
        assert mixed(model, how, X, table.replace(target=told)) == pytest.approx(mix, abs=0.1)


def test_few_users_say_little_of_what_is_open():
    big = asked_of(400, 20, spread=0.0, seed=100)
    lost = lambda scale, spread: validation_nats(  # noqa: E731
        scale * big.offset, spread**2 * (big.apart**2).sum(1), big.rows)  # fmt: skip
    for users in (2, 5):
        found = [left_open(asked_of(users, 6, spread=0.0, seed=seed), 0.0) for seed in range(12)]
        assert np.mean([lost(*one) for one in found]) - lost(1.0, 0.0) < 0.015
    asked = asked_of(20, 12, spread=0.7)
    repeated = jax.tree.map(lambda x: np.concatenate([x] * 5), asked)
    repeated = repeated._replace(unit=np.arange(100).repeat(12))  # five draws of each user, all alike
    assert left_open(repeated, 0.0) == pytest.approx(left_open(asked, 0.0), rel=1e-3)


@pytest.mark.parametrize(("spread", "sure"), [(0.3, 3), (2.0, 3), (12.0, 3), (12.0, 10)])
def test_the_evidence_of_a_spread_is_the_integral_over_users(spread, sure):
    """By quadrature; with much open, whole steps of Newton's method ran away, and Laplace's method is off by nats."""
    draw = np.random.default_rng(0)
    apart, offset, told = (
        draw.normal(size=(20, 10, 1)),
        sure * draw.normal(size=(20, 10)),
        draw.integers(0, 2, (20, 10)),
    )
    z = np.linspace(-9, 9, 20001)
    logits = offset[:, :, None] + spread * apart * z
    nats = np.where(told[:, :, None] == 1, np.logaddexp(0, -logits), np.logaddexp(0, logits)).sum(axis=1)
    expected = -np.log((np.exp(-nats - z**2 / 2) / np.sqrt(2 * np.pi)).sum(axis=1) * (z[1] - z[0])).sum()
    side = np.zeros((20, 10), np.int32)
    table = rows(side, side, told.astype(np.float32), np.ones((20, 10))).replace(offset=offset.astype(np.float32) / 1.5)
    assert float(lost_evidence(1.5, (spread * apart).astype(np.float32), table)) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("efficiency", [0.0, 0.1, 0.6, 1.0])
def test_the_share_of_what_shots_tell_that_was_read_is_recovered(efficiency):
    """Shots tell something of some directions, and predictions are those of a reader of a share of that."""
    asked, draw = asked_of(600, 30, spread=0.0), np.random.default_rng(1)
    asked = asked._replace(apart=asked.apart / np.linalg.norm(asked.apart, axis=1, keepdims=True))  # one scale for all
    known = np.repeat(2 + 2 * draw.random((600, 1)), DIM, axis=1)
    left = 4 / (1 + efficiency * 4 * known)  # spread 2
    read, rest = (np.sqrt(part) * draw.normal(size=(600, DIM)) for part in (4 - left, left))
    read, rest = ((part[asked.unit] * asked.apart).sum(1) for part in (read, rest))
    flatter = np.sqrt(1 + np.pi / 8 * (left[asked.unit] * asked.apart**2).sum(1))  # of a mean over what is open
    before = np.sqrt(1 + np.pi / 8 * 4 * (asked.apart**2).sum(1))
    meant = 0.5 * asked.offset
    shift = (meant + read) / flatter - meant / before
    asked = asked._replace(offset=meant / before, known=known[asked.unit], shift=np.stack([shift, 0 * shift], axis=1))

    def answered(truth):
        target = draw.random(len(truth)) < 1 / (1 + np.exp(-truth))
        return asked._replace(rows=asked.rows.replace(target=target.astype(np.float32)))

    found = efficiency_of(answered(meant + read + rest), 1.0, 2.0)
    assert found == pytest.approx(efficiency, abs=0.03 + 0.25 * efficiency)
    if efficiency:
        assert efficiency_of(answered(meant - read), 1.0, 2.0) < efficiency / 2  # answers say that it was misread
    sure = efficiency_of(answered(meant + read), 1.0, 2.0)  # no more than what is predicted can have told
    assert sure == pytest.approx(efficiency, abs=0.02 + 0.15 * efficiency)
    assert efficiency_of(asked, 0.0, 2.0) == efficiency_of(asked, 1.0, 0.0) == 0.0
    assert efficiency_of(asked._replace(apart=0 * asked.apart), 1.0, 2.0) == 0.0


def test_a_shift_is_trusted_less_the_less_sure_users_make_of_it():
    sure = borne_out(asked_of(200, 30, spread=0.0, shift=0.8))
    assert sure[0] == pytest.approx(0.8, rel=0.1)
    noise = [borne_out(asked_of(20, 5, spread=0.0, seed=seed))[0] for seed in range(30)]
    assert np.mean(np.array(noise) == 0) > 0.7  # the best factor is above 0 in half of them
    few = [borne_out(asked_of(40, 5, spread=0.0, shift=0.8, seed=seed))[0] for seed in range(20)]
    assert 0.6 < np.mean(few) < 0.9
    assert not borne_out(asked_of(1, 30, spread=0.0, shift=0.8)).any()  # one user says nothing of others


def test_few_users_take_trust_away_and_add_none():
    """Noise of two users once made a factor of 3.7, and 1.4 nats a comparison."""
    for users in (2, 3, 4, 6):
        noise = [borne_out(asked_of(users, 8, spread=0.0, seed=seed))[0] for seed in range(40)]
        assert np.mean(np.array(noise) > 0) < 0.2
        sharp = [borne_out(asked_of(users, 8, spread=0.0, shift=3.0, seed=seed))[0] for seed in range(10)]
        assert max(sharp) <= 1.0
        assert (max(sharp) > 0.5) == (users > 3)
    assert borne_out(asked_of(30, 8, spread=0.0, shift=3.0))[0] > 2.0


def test_what_shots_say_whichever_way_they_were_answered_is_trusted_apart():
    asked = asked_of(300, 30, spread=0.0, shift=0.8)
    moved, (noise, more) = asked.shift[:, 0], np.random.default_rng(9).normal(size=(2, len(asked.unit)))
    for odd, even, expected in (
        (moved, noise, [0.8, 0.0]),
        (moved / 2 + noise, moved / 2 - noise, [0.8, 0.8]),  # a family that is fitted to labels as they are
        (moved / 2 + noise, moved - 2 * noise, [0.8, 0.4]),
        (noise, moved, [0.4, 0.4]),  # no more of the even part than of the odd one
        (moved, (moved + more) / 4, [0.8, 0.0]),
    ):
        found = borne_out(asked._replace(shift=np.stack([odd, even], axis=1)))
        assert found == pytest.approx(expected, abs=0.06)


def test_what_shots_say_is_not_trusted_where_it_says_nothing(monkeypatch):
    """Coins for labels: a family that was not trained has no shift that validation users bear out."""
    monkeypatch.setattr("pluralprefs.spread.MOST_DRAWS", 16)  # what is left open is not asked about here
    draw = np.random.default_rng(0)
    count = 60 * 40
    first = draw.integers(0, 6, count).astype(np.int32)
    second = ((first + draw.integers(1, 6, count)) % 6).astype(np.int32)
    table = jax.tree.map(np.asarray, rows(first, second, draw.integers(0, 2, count)))
    table = table.replace(user=np.repeat(np.arange(60), 40).astype(np.int32))
    family = FAMILIES["fast_weights"]()
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=family, knots=len(KNOTS), dim=DIM)
    notes = {}
    coins = trusted(placed(model, family, X, table), X, notes, table, Judging(table, "pair"))
    assert float(jnp.abs(coins.trust).max()) < 0.15
    taste = np.asarray(draw.normal(size=(60, DIM)))[table.user] * 3
    told = ((taste * (E[first] - E[second])).sum(1) > 0).astype(np.float32)
    told = Judging(table.replace(target=told), "pair")
    model = placed(model, family, X, table)
    assert float(trusted(model, X, notes, told.rows, told).trust[:, -3:].min()) > 0.5
    near_alone = trusted(model, X, notes, told.rows, told, (model, Judging(table, "pair")))
    assert float(near_alone.trust[0, -3:].min()) > 0.5
    assert float(near_alone.trust[1].max()) < 0.15
    strangers = np.asarray((near_alone.trust == 0) & (near_alone.even == 0))
    assert strangers[1].any()
    for values in (near_alone.scale, near_alone.efficiency):  # shots that are not trusted change nothing at all
        np.testing.assert_array_equal(np.asarray(values)[strangers], float(values[0, 0]))
    assert notes["far"]["trust"]["8"] == pytest.approx(float(near_alone.trust[1, 4]))


def test_what_is_open_of_a_stranger_is_what_all_users_differ_by():
    """Held-out users who differ half as much as others, by luck, do not halve what is left open."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(120), 60).astype(np.int32)
    first = draw.integers(0, 6, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 6, len(user))) % 6).astype(np.int32)
    taste = np.where(user < 60, 0.5, 1.0)[:, None] * draw.normal(size=(120, DIM))[user]
    chance = 1 / (1 + np.exp(-(taste * (E[first] - E[second])).sum(1)))
    table = jax.tree.map(np.asarray, rows(first, second, draw.random(len(user)) < chance)).replace(user=user)
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=FAMILIES["set_pooled"](),
                          knots=len(KNOTS), dim=DIM)  # fmt: skip
    model, few, many = placed(model, model.family, X, table), np.flatnonzero(user < 60), np.flatnonzero(user >= 60)
    near = Judging(take(table, few), "pair")
    notes = {}
    alone, found = (trusted(model, X, notes, take(table, part), near) for part in (few, many))
    assert float(found.spread) > 1.6 * float(alone.spread)
    assert set(notes["validation_nll_of_shots"]) == {"all", "32"}  # users have more than an episode shows
    assert float(found.most[0]) in (32.0, 1e6)
    assert notes["efficiency"]["all"] == pytest.approx(float(found.efficiency[0, -1]))
    assert notes["spread"] == pytest.approx(float(found.spread))


def test_what_was_borne_out_by_fewer_shots_is_not_lost_with_more():
    """Factors start at those of fewer shots, and leave them as far as users bear it out."""
    before = np.array([0.8, 0.0])
    few = [borne_out(asked_of(6, 5, spread=0.0, shift=0.8, seed=seed), before)[0] for seed in range(20)]
    alone = [borne_out(asked_of(6, 5, spread=0.0, shift=0.8, seed=seed))[0] for seed in range(20)]
    assert np.abs(np.array(few) - 0.8).mean() < 0.5 * np.abs(np.array(alone) - 0.8).mean()
    for shift in (0.0, 2.0):
        many = borne_out(asked_of(200, 30, spread=0.0, shift=shift), before)
        assert many[0] == pytest.approx(shift, abs=0.1)


def test_a_number_of_shots_that_few_have_is_trusted_as_the_number_before_it(monkeypatch):
    monkeypatch.setattr("pluralprefs.spread.MOST_DRAWS", 16)  # what is left open is not asked about here
    draw = np.random.default_rng(0)
    user = np.append(np.repeat(np.arange(200), 5), np.repeat([200, 201], 60)).astype(np.int32)
    first = draw.integers(0, 6, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 6, len(user))) % 6).astype(np.int32)
    taste = np.asarray(draw.normal(size=(202, DIM)))[user] * 3
    told = ((taste * (E[first] - E[second])).sum(1) > 0).astype(np.float32)
    told = np.where(user >= 200, draw.integers(0, 2, len(user)), told)  # who shows more answers by chance
    table = jax.tree.map(np.asarray, rows(first, second, told)).replace(user=user)
    family = FAMILIES["fast_weights"]()
    model = Residual.init(population=LowRank.init(key=KEY, dim=DIM, rank=1), family=family, knots=len(KNOTS), dim=DIM)
    found = trusted(placed(model, family, X, table), X, {}, table, Judging(table, "pair"))
    assert float(found.trust[0, 3]) > 0.2  # 4 shots, all that most have
    np.testing.assert_allclose(found.trust[:, 3:], found.trust[0, 3])
    np.testing.assert_array_equal(found.most, 4.0)


def test_where_items_are_kept_apart_held_out_users_are_asked_about_items_that_no_training_row_has():
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(200, dtype=np.int32), 40)
    first = draw.integers(0, 50, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 50, len(user))) % 50).astype(np.int32)
    table = jax.tree.map(np.asarray, rows(first, second, np.ones(len(user)), np.ones(len(user))).replace(user=user))
    held = held_out(np.unique(user))
    fitted, (judging, asked) = judges(table, held, Pooled(cross_fit="item"))
    linked = far_judges(table, held, Judging(judging, asked), Pooled(cross_fit="item"))
    assert linked is None  # every item with every other, by comparisons
    assert not set(user[fitted]) & set(held)
    assert set(judging.user) == set(held)
    assert not asked[first[fitted]].any()
    assert not asked[second[fitted]].any()
    support, query = episode_indices(np.random.default_rng(0), judging, 32, 32, exactly=True, apart=asked)
    assert (query >= 0).any()
    for side in (judging.first, judging.second):
        assert asked[side[query[query >= 0]]].all()
        assert not asked[side[support[support >= 0]]].any()
    part = take(table, np.flatnonzero(user < 30))  # six are held out: too few, and about too few items
    assert judges(part, held_out(np.arange(30)), Pooled(cross_fit="item"))[1].asked == "item"
    everything = judges(table, held, Pooled())
    assert everything[1].asked == "pair"
    assert len(everything[0]) + len(everything[1].rows.user) == len(user)
    nothing_new = take(table, np.flatnonzero(~asked[first] | ~asked[second]))
    assert judges(nothing_new, held, Pooled(cross_fit="item"))[1].asked == "item"
    without = nothing_new.replace(weight=np.where(np.isin(nothing_new.user, held), 0.0, nothing_new.weight))
    few = take(table, np.concatenate([np.flatnonzero(user == one)[:2] for one in range(200)]))
    for poor in (without, few):  # nobody can be asked about other items than are shown
        assert judges(poor, held, Pooled(cross_fit="item"))[1].asked == "pair"


def grouped(groups=10, users=30, per_user=20):
    """Comparisons of 10 items a group, each user in one group, and the group of each row."""
    draw = np.random.default_rng(0)
    group = np.repeat(np.arange(groups), users * per_user)
    user = np.repeat(np.arange(groups * users, dtype=np.int32), per_user)
    first = draw.integers(0, 10, len(user))
    second = (first + draw.integers(1, 10, len(user))) % 10
    first, second = ((10 * group + side).astype(np.int32) for side in (first, second))
    return jax.tree.map(np.asarray, rows(first, second, np.ones(len(user)))).replace(user=user), group


@pytest.mark.parametrize("cross_fit", ["pair", "item"])
def test_groups_of_responses_that_are_compared_among_themselves_are_kept_from_another_family(cross_fit):
    pooled = Pooled(cross_fit=cross_fit)
    table, group = grouped()
    held = held_out(np.unique(table.user))
    near = judges(table, held, pooled)[1]
    part, far, strange = far_judges(table, held, near, pooled)
    np.testing.assert_array_equal(strange, ~np.isin(np.arange(len(group)), part))
    assert far.asked == cross_fit
    aside = set(far.rows.first // 10)
    assert len(aside) == 2  # of ten equal groups the first that make a fifth
    assert set(group[part]) == set(range(10)) - aside
    assert not set(far.rows.user) & set(table.user[part])
    assert set(far.rows.user) == set(table.user[np.isin(group, list(aside))])  # not those held out alone
    known = np.ones(100, bool)
    assert far_judges(table, held, near, pooled, known) is not None
    shown = sorted(set(near.rows.first) - (set() if isinstance(near.asked, str) else set(np.flatnonzero(near.asked))))
    known[shown[: len(shown) // 5]] = False  # held-out users show what nobody has met: they judge for all
    assert far_judges(table, held, near, pooled, known) is None
    nothing = Judging(near.rows, np.ones(100, bool))  # all items are asked about, none is shown
    assert far_judges(table, held, nothing, pooled, np.ones(100, bool)) is None
    everywhere = table.replace(user=(table.user % 30).astype(np.int32))  # nobody is in two groups alone
    own = held_out(np.arange(30))
    assert far_judges(everywhere, own, judges(everywhere, own, pooled)[1], pooled) is None  # 20 were to be held out
    most = np.arange(27)
    part, far, strange = far_judges(everywhere, most, judges(everywhere, most, pooled)[1], pooled)
    assert set(far.rows.user) <= set(most)
    assert set(group[strange]) == aside  # of all users, not of those who judge
    assert set(group[~strange]) == set(range(10)) - aside
    assert set(everywhere.user[part]) == set(range(27, 30))
    for few in (10, 2):  # two groups of ten have too few users, and of two groups none is small enough
        alone, _ = grouped(few, users=8 if few == 10 else 60)
        own = held_out(np.unique(alone.user))
        assert far_judges(alone, own, judges(alone, own, pooled)[1], pooled) is None


@pytest.mark.parametrize("cross_fit", ["pair", "item"])
def test_nobody_judges_far_away_by_what_a_shot_half_answers(cross_fit):
    """Five statements a user, every pair of an agreed and a disagreed one: no question is free of shots."""
    draw = np.random.default_rng(0)
    agreed = [sorted(draw.permutation(5)[: 2 + user % 2]) for user in range(400)]
    pairs = [(user, 5 * (user % 10) + i, 5 * (user % 10) + j) for user, own in enumerate(agreed)
             for i in own for j in range(5) if j not in own]  # fmt: skip
    user, first, second = np.array(pairs, np.int32).T
    table = jax.tree.map(np.asarray, rows(first, second, np.ones(len(user)))).replace(user=user)
    pooled, held = Pooled(cross_fit=cross_fit), held_out(np.unique(user))
    far = far_judges(table, held, judges(table, held, pooled)[1], pooled)
    assert (far is None) == (cross_fit == "item")


def test_far_items_are_a_fifth_of_the_rows_where_groups_are_small_enough():
    for sizes, share in (([1] * 500, 0.2), ([5] * 30 + [300], 0.2), ([97, 3], 0), ([50, 25, 25], 0), ([9], 0)):
        group = np.repeat(np.arange(len(sizes)), sizes)
        table = jax.tree.map(np.asarray, rows(2 * group, 2 * group + 1, np.ones(len(group))))
        usable = np.ones(len(group), bool)
        found = far_items(table, usable)[table.first].mean()
        assert share <= found <= (share and 0.35)
        assert not far_items(table, ~usable).any()


def test_users_are_held_out_to_judge_by_unless_there_are_too_few():
    for count in range(2 * FEWEST, 40):
        held = held_out(np.arange(count))
        assert FEWEST <= len(held) <= count - FEWEST
    assert not len(held_out(np.arange(2 * FEWEST - 1)))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inferring")
    data = write(folder / "data.jsonl", users=30, per_user=30)
    settings = ["shots=[0,8]", "draws=2", "epochs=10", "model.width=2", "batch_size=256", "users.folds=2"]
    return data, fit(data, model="fast_weights", encoder="attributes", root=folder, overrides=settings, progress=False)


def test_a_new_user_is_inferred_from_shots_on_the_whole_path(fitted, tmp_path):
    _, run = fitted
    metric = run.folder.table("metrics").filter(pl.col("model") == "fast_weights", pl.col("control").is_null())
    nll = metric.filter(pl.col("metric") == "nll", pl.col("cell") == "unseen/testpair", pl.col("community").is_null())
    curve = dict(zip(nll["shots"], nll["value"], strict=True))
    assert curve[8] < curve[0] - 0.1
    new = run.read(write(tmp_path / "new.jsonl", users=2, per_user=12, seed=5))
    new = new.with_columns(user_id="new " + pl.col("user_id"))
    users = run.adapt(new)
    scores = run.score(new, users)
    assert set(scores["user_source"]) == {"adapted"}
    unknown = run.score(new)
    nats = [-np.log(np.where(new["target"] > 0.5, p, 1 - p)).mean() for p in (scores["probability"],
                                                                              unknown["probability"])]  # fmt: skip
    assert nats[0] < nats[1] - 0.1
    assert set(unknown["user_source"]) == {"population"}
    reversed_ = run.adapt(new.with_columns(target=1 - pl.col("target")))
    turned, base = run.score(new, reversed_)["log_odds"].to_numpy(), unknown["log_odds"].to_numpy()
    middle = (scores["log_odds"].to_numpy() + turned) / 2  # the population, as sharp as a user of twelve shots
    np.testing.assert_allclose(middle, base * (middle @ base) / (base @ base), rtol=1e-3, atol=1e-4)
    run.save_users(tmp_path / "users.safetensors", users)
    kept = run.load_users(tmp_path / "users.safetensors")
    assert run.score(new, kept).equals(scores)
    assert set(load_arrays(tmp_path / "users.safetensors")[0]) == {"0/mean", "1/mean", "users"}


def test_a_seen_user_is_inferred_from_the_training_rows(fitted):
    data, run = fitted
    table = run.read(data)
    name = run.vocabulary.users[0]
    mine = table.filter(pl.col("user_id") == name)
    scores = run.score(mine)
    assert set(scores["user_source"]) == {"seen"}
    assert float(np.abs(run.users.user.state["state"][0]).max()) > 0.0
    trained = np.asarray(run.rows.user) == 0
    again = run.adapt(mine.filter(pl.Series(_is_trained(run, mine, trained))))
    np.testing.assert_allclose(run.score(mine, again)["log_odds"], scores["log_odds"], rtol=1e-3, atol=1e-4)


def test_an_inferred_user_is_asked_about_what_shots_leave_open(fitted, capsys):
    data, run = fitted
    user, pool = run.adapt(prior="population"), run.read(data).head(6)
    with pytest.raises(DataError, match="its only method"):
        run.adapt(prior="population", method="map")
    shown = user.update(pool.head(3).with_columns(user_id=pl.lit(None, pl.Utf8)))
    for person in (user, shown):
        asked = suggest(person, pool, 1)
        items, pairs = run.arrays(asked)
        sides = (jax.tree.map(lambda x, i=i: x[i[0]], items) for i in (pairs.first, pairs.second))
        root = run.users.population["open"] + person.posterior.mean.state["open"]
        apart = run.model.spread * np.subtract(*(run.model.directions(side) for side in sides)) @ root
        assert asked["log_odds_std"][0] == pytest.approx(float(np.linalg.norm(apart)), rel=1e-3)
        assert asked["log_odds_std"][0] > 0.01
        assert suggest(person, pool, 1, rule="random").height == 1
        with pytest.raises(DataError, match="is no such direction"):
            neighbours(person, 4)
    _show(run, user, shown)  # a state of which no uncertainty is stated
    printed = capsys.readouterr().out
    assert "(was " in printed
    assert not any(word in printed for word in ("reversed", "trust", "spread"))  # nothing that the user is
    assert "+-" not in printed
    certain = replace(run, model=run.model.replace(spread=0 * run.model.spread), users=run.users.replace(
        population=run.users.population | {"spread": jnp.zeros(())}))  # fmt: skip
    with pytest.raises(DataError, match='infers users, states none: choose "random"'):
        suggest(certain.adapt(prior="population"), pool, 1)


def test_a_run_whose_family_has_other_parameters_now_cannot_be_loaded(fitted, monkeypatch):
    _, run = fitted
    drawn = pluralprefs.run.draw_model
    monkeypatch.setattr(pluralprefs.run, "draw_model", lambda *sizes: drawn(*sizes).replace(most=jnp.zeros(())))
    with pytest.raises(RegistryError, match=r"'model/most' is .* train it again"):
        load(run.folder.path)


def _is_trained(run, table, trained):
    kept = {(run.judged[i], run.judged[j], float(t)) for i, j, t in zip(
        run.rows.first[trained], run.rows.second[trained], run.rows.target[trained], strict=True)}  # fmt: skip
    return [key in kept for key in zip(table["first_id"], table["second_id"], table["target"], strict=True)]


def test_a_level_of_communities_is_refused_and_without_a_level_of_users_all_are_the_population():
    model = INFERRING["residual"]()
    table = jax.tree.map(np.asarray, rows(FIRST, SECOND, TARGET)).replace(user=np.arange(4, dtype=np.int32))
    population = LowRank.init(key=KEY, dim=DIM, rank=1)
    settings = {"population": lambda _: (population, Users.init(population, users=0, communities=0)), "users": 4,
                "communities": 0, "likelihood": Logistic(), "reduction": pooled_mean, "optimizer": optax.adam(1e-3),
                "epochs": 1, "batch_size": 8, "seed": 0, "notes": {}}  # fmt: skip
    with pytest.raises(ValueError, match="no community level"):
        fit_inferred(model, X, table, Pooled(levels=("community", "user")), **settings)
    for ignored in (
        {"temper": (1.0, 0.5)},
        {"temper_by": "prompt"},
        {"parts": ("linear",)},
        {"covariance": "full"},
        {"residual": True},
    ):
        with pytest.raises(ValueError, match=f"users.{next(iter(ignored))} "):
            fit_inferred(model, X, table, Pooled(**ignored), **settings)
    model = Residual.init(population=population, family=model.family, knots=len(KNOTS), dim=DIM)
    alone = fit_inferred(model, X, table, Pooled(levels=(), cross_fit=None), **settings)
    np.testing.assert_array_equal(alone.model.trust, 0.0)
    np.testing.assert_array_equal(alone.users.user.state["trust"], 0.0)


def test_trust_far_away_is_learned_from_a_family_and_a_population_that_have_not_been_there(monkeypatch):
    """Tastes that hold in eight groups of ten, and coins in those that are kept from the family."""
    monkeypatch.setattr("pluralprefs.trust.KNOTS", (0, 8, 64))
    table, group = grouped(users=12)
    far = set(far_items(table, np.ones(len(group), bool)).nonzero()[0] // 10)
    many = items(1, 100)
    draw, shown = np.random.default_rng(0), np.asarray(many.embedding)
    taste = draw.normal(size=(120, DIM))[table.user] * 3
    told = (taste * (shown[table.first] - shown[table.second])).sum(1) > 0
    told = np.where(np.isin(group, list(far)), draw.random(len(told)) < 0.5, told).astype(np.float32)
    masks = []
    population = LowRank.init(key=KEY, dim=DIM, rank=1)

    def fitted(mask):
        masks.append(mask)
        return population, Users.init(population, users=0, communities=0)

    notes = {}
    model = Residual.init(population=population, family=FAMILIES["fast_weights"](), knots=3, dim=DIM)
    asked = {"mixed": [], "directed": [], "ways": []}
    for name, does in (("mixed", mixed), ("directed", directed), ("ways", ways)):

        def told_of(*given, name=name, does=does):
            asked[name].append((given, 0.3 if name == "mixed" else does(*given)))
            return asked[name][-1][1]

        monkeypatch.setattr(f"pluralprefs.inferring.{name}", told_of)
    found = fit_inferred(model, many, table.replace(target=told), Pooled(folds=2), population=fitted, users=120,
                         communities=0, likelihood=Logistic(), reduction=pooled_mean, optimizer=optax.adam(1e-2),
                         epochs=1, batch_size=256, seed=0, notes=notes)  # fmt: skip
    assert {tuple(sorted(set(group[mask]))) for mask in masks if mask is not None} == {
        tuple(range(10)), tuple(sorted(set(range(10)) - far))}  # fmt: skip
    assert notes["trust"]["8"] > 0.3
    assert max(notes["far"]["trust"].values()) < 0.15
    assert [given[4] for given, _ in asked["mixed"]] == [False]  # pairs of this split do not hang together
    assert [given[2] for given, _ in asked["directed"]] == [notes["mix"]] * 3 == [0.3] * 3
    near, _, serving = (how for _, how in asked["ways"])  # those held out, those far away, all
    assert asked["ways"][2][0][3] == 3 * near.rewards.unit
    np.testing.assert_allclose(found.model.axes, asked["directed"][2][1].axes)
    assert asked["directed"][2][0][1] is serving
    np.testing.assert_allclose(found.model.trust[1, 1], notes["far"]["trust"]["8"], rtol=1e-5)


def test_users_are_inferred_where_items_are_kept_apart_and_where_nobody_can_be_asked_so(monkeypatch):
    monkeypatch.setattr("pluralprefs.trust.KNOTS", (0, 2, 64))
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(80, dtype=np.int32), 12)
    many = items(1, 30)
    first = draw.integers(0, 30, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 30, len(user))) % 30).astype(np.int32)
    taste = draw.normal(size=(80, DIM))[user] * 3
    shown = np.asarray(many.embedding)
    told = ((taste * (shown[first] - shown[second])).sum(1) > 0).astype(np.float32)
    table = jax.tree.map(np.asarray, rows(first, second, told)).replace(user=user)
    population = LowRank.init(key=KEY, dim=DIM, rank=1)
    model = Residual.init(population=population, family=FAMILIES["fast_weights"](), knots=3, dim=DIM)
    settings = {"population": lambda _: (population, Users.init(population, users=0, communities=0)), "users": 80,
                "communities": 0, "likelihood": Logistic(), "reduction": pooled_mean, "optimizer": optax.adam(1e-2),
                "epochs": 2, "batch_size": 64, "seed": 0}  # fmt: skip
    two = take(table, np.concatenate([np.flatnonzero(user == one)[:2] for one in range(80)]))
    for part in (table, two):
        notes = {}
        found = fit_inferred(model, many, part, Pooled(cross_fit="item", folds=2), notes=notes, **settings)
        assert np.isfinite(notes["epochs_validation_nll"])
        assert np.isfinite(np.asarray(found.model.trust)).all()
        assert 1 <= notes["epochs"] <= 2
        if part is table:
            assert float(found.model.trust[0, 1]) > 0.0
            assert float(jnp.abs(found.users.user.state["state"]).max()) > 0.0
