"""New users who may be like any user of the training: a prior that is a mixture of posteriors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from families import DIM, KEY, items, rows
from tables import write

from pluralprefs.adapt import fit_user, laplace_user, predict, prior_user
from pluralprefs.adapting import adapt_and_predict, adapt_units, predict_seen
from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.fitting import Fitted, take
from pluralprefs.launch import fit
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.fast_weights import FastWeights
from pluralprefs.models.low_rank import LowRank
from pluralprefs.peers import check_peers, with_peers
from pluralprefs.run import load
from pluralprefs.users import Peers, Pooled, Users

MEANS, DEVIATIONS = np.array([-2.0, 0.3, 1.5]), np.array([0.3, 1.0, 0.5])
X = items(3, 12)


def model_and_table(rank=1):
    model = LowRank.init(key=KEY, dim=DIM, rank=rank)
    table = Users.init(model, users=0, communities=0, strength=1.0)
    return model, table.replace(user_root=table.user_root.at[-1].set(0.0))


def three(table):
    """Peers of a state of one coordinate; the gain, which comes last, is known for sure."""
    mean = jnp.zeros((3, 2)).at[:, 0].set(MEANS)
    return table.replace(peers=Peers(mean, jnp.zeros((3, 2, 2)).at[:, 0, 0].set(DEVIATIONS)))


def shown(model, count, seed=0, wanted=1.5):
    """Comparisons of a user of one coordinate, as rows that carry their items, and d log-odds / d state."""
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, 12, (2, count))
    slope = np.asarray(model.basis_rewards(X))[first, 0] - np.asarray(model.basis_rewards(X))[second, 0]
    target = (draw.random(count) < 1 / (1 + np.exp(-wanted * slope))).astype(np.float32)
    pick = lambda index: jax.tree.map(lambda x: x[index], X)  # noqa: E731
    return rows(pick(first), pick(second), target), slope, target


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_the_posterior_is_that_of_a_mixture_prior_by_quadrature(count):
    model, table = model_and_table()
    support, slope, target = shown(model, max(count, 1))
    support = support.replace(weight=support.weight * (count > 0))
    grid = np.linspace(-9, 9, 40_001)
    density = (np.exp(-0.5 * ((grid[:, None] - MEANS) / DEVIATIONS) ** 2) / DEVIATIONS).sum(1)
    for x, t in zip(slope, target, strict=True) if count else ():
        density *= 1 / (1 + np.exp(np.where(t > 0.5, -1, 1) * x * grid))
    density /= density.sum()
    mean = (grid * density).sum()
    variance = (grid**2 * density).sum() - mean**2
    found = laplace_user(model, support, three(table))
    assert float(found.mean.state[0]) == pytest.approx(mean, abs=0.03)
    assert float(found.covariance.root[0] @ found.covariance.root[0]) == pytest.approx(variance, rel=0.05)
    assert float(found.mean.gain) == 0.0


def test_one_peer_at_the_centre_is_the_gaussian_prior_and_order_does_not_matter():
    model, table = model_and_table(rank=2)
    support, _, _ = shown(model, 9)
    gaussian = laplace_user(model, support, table)
    alone = table.replace(peers=Peers(jnp.zeros((1, 3)), jnp.diag(table.user_root)[None]))
    found = laplace_user(model, support, alone)
    np.testing.assert_allclose(found.mean.state, gaussian.mean.state, atol=1e-5)
    row = jax.tree.map(lambda x: x[0], support)
    for posterior, users in ((found, alone), (gaussian, table)):
        assert float(predict(model, users, posterior, row)[1]) == pytest.approx(
            float(predict(model, table, gaussian, row)[1]), rel=1e-4)  # fmt: skip
    mixture = three(model_and_table()[1])
    one, other = (laplace_user(model_and_table()[0], part, mixture)
                  for part in (support, jax.tree.map(lambda x: x[::-1], support)))  # fmt: skip
    np.testing.assert_allclose(one.mean.state, other.mean.state, atol=1e-4)


def typed(users=40, each=24, types=((3.0, 0.0), (-3.0, 0.0)), spread=0.2, seed=0):
    """Users of types, and a fit that knows the model and a Gaussian prior as wide as they differ."""
    draw = np.random.default_rng(seed)
    model = LowRank.init(key=KEY, dim=DIM, rank=2)
    rewards = np.asarray(model.basis_rewards(X))
    state = np.array(types)[draw.integers(0, len(types), users)] + spread * draw.normal(size=(users, 2))
    user = np.repeat(np.arange(users), each).astype(np.int32)
    first = draw.integers(0, 12, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 12, len(user))) % 12).astype(np.int32)
    logits = (state[user] * (rewards[first] - rewards[second])).sum(1)
    told = (draw.random(len(user)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    table = jax.tree.map(np.asarray, rows(first, second, told)).replace(user=user)
    wide = np.append(np.sqrt((state**2).mean(0)), 0.0).astype(np.float32)
    known = Users.init(model, users=users, communities=0).replace(user_root=jnp.asarray(wide))
    return Fitted(model, known, table), state


def test_users_of_types_have_peers_and_are_predicted_better():
    fitted, _ = typed()
    found = with_peers(fitted, X, 32)
    assert found.notes["peers"] == 32 == len(found.users.peers.mean)
    told = found.notes["peers_evidence"]
    assert told["users"] == 40
    assert told["peers"] > told["gaussian"] + 5
    new, _ = typed(users=60, seed=1)
    unit = np.asarray(new.rows.user)
    late = np.arange(len(unit)) % 24 >= 4  # four comparisons are shown
    lost = []
    for users in (fitted.users, found.users):
        mean, variance = adapt_and_predict(fitted.model, users, X, take(new.rows, ~late), unit[~late],
                                           take(new.rows, late), unit[late])  # fmt: skip
        logits = mean / np.sqrt(1 + np.pi * variance / 8)
        lost.append(np.mean(np.logaddexp(0, np.where(new.rows.target[late] > 0.5, -logits, logits))))
    assert lost[1] < lost[0] - 0.01


def test_a_user_is_not_borne_out_by_their_own_comparisons():
    """Everyone is of a type of their own, far from all others: nobody is like another."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    types = tuple((3 * np.cos(a), 3 * np.sin(a)) for a in angles)
    fitted, _ = typed(users=24, each=300, types=types, spread=0.0)
    found = with_peers(fitted, X, 24)
    assert "peers" not in found.notes
    assert found.users.peers is None
    assert found.notes["peers_evidence"]["peers"] < found.notes["peers_evidence"]["gaussian"]


def test_users_of_the_training_keep_the_gaussian_for_they_are_peers_themselves():
    fitted, _ = typed()
    found = with_peers(fitted, X, 32)
    asked = take(fitted.rows, slice(0, 200))
    for one, other in zip(predict_seen(fitted, X, asked), predict_seen(found, X, asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    strangers = asked.replace(user=np.full_like(asked.user, -1))
    both = asked.replace(user=np.where(np.arange(200) % 2, asked.user, -1).astype(np.int32))
    alone, mixed = predict_seen(found, X, strangers)[1], predict_seen(found, X, both)
    np.testing.assert_allclose(mixed[1][::2], alone[::2], rtol=1e-4)
    np.testing.assert_allclose(mixed[0][1::2], predict_seen(fitted, X, asked)[0][1::2], rtol=1e-5)


def test_many_users_at_once_have_the_posteriors_that_they_have_alone():
    fitted, _ = typed(users=40)
    found = with_peers(fitted, X, 32)
    unit = np.asarray(fitted.rows.user)
    many = adapt_units(found.model, found.users, X, fitted.rows, unit)
    one = adapt_units(found.model, found.users, X, take(fitted.rows, unit == 7), unit[unit == 7])[7]
    np.testing.assert_allclose(many[7].mean.state, one.mean.state, atol=1e-4)
    assert set(many) == set(range(40))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    data = write(folder / "data.jsonl", users=34, per_user=20)
    settings = [
        "model.rank=2",
        "epochs=4",
        "shots=[4]",
        "draws=1",
        "controls=false",
        "users.peers=16",
        "users.rounds=2",
    ]
    with pytest.MonkeyPatch.context() as patch:  # whatever these few users say
        patch.setattr("pluralprefs.peers.logsumexp", lambda x, axis: np.full(len(x), 1e6))
        return fit(data, model="low_rank", encoder="attributes", root=folder, overrides=settings, progress=False)


def test_a_run_with_peers_is_read_back_and_adapts(run, tmp_path):
    again = load(run.folder.path)
    assert again.notes["peers"] == 16
    assert again.fingerprint == run.fingerprint
    np.testing.assert_array_equal(again.users.peers.mean, run.users.peers.mean)
    nobody, prior = again.adapt(prior="population"), prior_user(again.model, again.users)
    np.testing.assert_allclose(nobody.posterior.mean.state, prior.mean.state, atol=1e-6)
    assert float(jnp.abs(prior.mean.state).max()) > 0.0
    table = comparisons.read(write(tmp_path / "new.jsonl", users=1, per_user=10, seed=5))
    at_once = again.adapt(table, prior="population")
    turns = again.adapt(table[:4], prior="population").update(table[4:])
    np.testing.assert_array_equal(at_once.posterior.mean.state, turns.posterior.mean.state)
    np.testing.assert_allclose(turns.forget().posterior.mean.state, prior.mean.state, atol=1e-6)
    at_once.save(tmp_path / "u.safetensors")
    kept = again.load_user(tmp_path / "u.safetensors")
    np.testing.assert_array_equal(kept.posterior.covariance.root, at_once.posterior.covariance.root)
    scored = again.score(table.with_columns(user_id=pl.lit("nobody")))
    assert set(scored["user_source"]) == {"population"}
    with pytest.raises(DataError, match="an adapted user is given by name, user="):
        again.score(table, at_once)
    with pytest.raises(DataError, match="users has an adapted user for 'ana'"):
        again.score(table, {"ana": at_once})
    point = again.adapt(prior="population", method="map")
    np.testing.assert_array_equal(point.posterior.mean.state, 0.0)
    support = jax.tree.map(lambda x: x[:1], at_once.rows)
    nothing = fit_user(again.model, support.replace(weight=jnp.zeros(1)), again.users)
    np.testing.assert_allclose(nothing.mean.state, point.posterior.mean.state, atol=1e-6)


def test_who_cannot_have_peers_is_told():
    linear = BradleyTerry.init(key=KEY, dim=DIM)
    inferred = FastWeights.init(key=KEY, dim=DIM)
    pooled = Pooled(gain=False, peers=8)
    for model in (linear, inferred):
        with pytest.raises(ValueError, match=rf"users.peers: {type(model).__name__} has no use for them"):
            check_peers(model, pooled)
    scored, _ = model_and_table()
    for wrong in (replace(pooled, gain=True), replace(pooled, levels=("community", "user"))):
        with pytest.raises(ValueError, match=r"users.peers: needs users.gain = false"):
            check_peers(scored, wrong)
    check_peers(scored, pooled)
    with pytest.raises(ValueError, match=r"users.peers -1: give a number of users"):
        Pooled(peers=-1)
    few, _ = typed(users=8)
    assert with_peers(few, X, 8) is few
    large, _ = typed()
    with pytest.raises(ValueError, match="the user state has 40 coordinates, more than 32"):
        with_peers(replace(large, users=large.users.replace(user_root=jnp.ones(41))), X, 8)
