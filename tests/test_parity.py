"""Agreement with independent code and published formulas."""

from pathlib import Path

import choix
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import FAMILIES, items, pick, rows, user
from scipy.special import erf

from pluralprefs.likelihoods import Hinge, Logistic, per_user_mean, pooled_mean
from pluralprefs.models.ideal_point import IdealDirection, IdealPoint
from pluralprefs.models.low_rank import LowRank
from pluralprefs.train import comparison_loss, grouped, init_state, make_train_step
from pluralprefs.types import Item, Params


def test_one_hot_bradley_terry_agrees_with_choix():
    """A wide Gaussian prior on one-hot items is choix's regularised likelihood: sum of nats + alpha |w|^2."""
    from pluralprefs.adapt import laplace_user
    from pluralprefs.models.bradley_terry import BradleyTerry
    from pluralprefs.users import Users

    draw = np.random.default_rng(0)
    pairs = [tuple(int(i) for i in draw.choice(5, 2, replace=False)) for _ in range(60)]
    alpha = 0.05
    reference = choix.opt_pairwise(5, pairs, alpha=alpha, method="Newton-CG", tol=1e-14)
    with jax.enable_x64():
        model = BradleyTerry.init(key=jax.random.key(0), dim=5, item_effects=False)
        model_users = Users.init(model, users=0, communities=0, strength=1.0)
        root = np.full(6, 1 / np.sqrt(2 * alpha))
        model_users = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model_users).replace(
            user_root=jnp.asarray(root)
        )
        eye = np.eye(5)
        support = rows(
            Item(embedding=eye[[a for a, _ in pairs]]), Item(embedding=eye[[b for _, b in pairs]]), np.ones(60)
        )
        support = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, support)
        found = laplace_user(model, support, model_users, steps=30, rounds=0)
        np.testing.assert_allclose(found.mean.state["linear"], reference, atol=1e-6)


def layers(weights, x):
    for i, layer in enumerate(weights):
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        if i < len(weights) - 1:
            x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return x


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def test_pal_a_is_a_difference_of_distances_to_the_users_ideal_point():
    model, x = FAMILIES["pal_a"](), items(0)
    omega = user(model, 1)
    ideal = layers(model.projector, softmax(np.asarray(omega, np.float64)) @ np.asarray(model.points, np.float64))
    distance = np.linalg.norm(layers(model.projector, np.asarray(x.embedding, np.float64)) - ideal, axis=1)
    found = [float(model.log_odds(omega, pick(x, i), pick(x, i + 1))) for i in range(3)]
    np.testing.assert_allclose(found, distance[1:4] - distance[:3], rtol=1e-4, atol=1e-5)


def test_pal_b_is_a_scaled_cosine_with_the_mixture_of_prompt_directions():
    model, x = FAMILIES["pal_b"](), items(0)
    omega = user(model, 1)
    heads = [jax.tree.map(lambda v, k=k: v[k], model.prompt_projectors) for k in range(2)]
    ideal = softmax(np.asarray(omega, np.float64)) @ np.stack(
        [layers(h, np.asarray(x.prompt[0], np.float64)) for h in heads]
    )
    e = layers(model.projector, np.asarray(x.embedding, np.float64))
    score = min(1 / 0.07, 100) * (e @ ideal) / np.linalg.norm(e, axis=1) / np.linalg.norm(ideal)
    found = [float(model.log_odds(omega, pick(x, i), pick(x, i + 1))) for i in range(3)]
    np.testing.assert_allclose(found, score[:3] - score[1:4], rtol=1e-3, atol=1e-3)


def test_lore_is_a_softmax_weighted_sum_of_basis_rewards_and_rank_one_is_bradley_terry():
    model, x = FAMILIES["lore"](), items(2)
    logits = user(model, 3)
    basis = layers(model.basis, np.asarray(x.embedding, np.float64))
    reward = basis @ softmax(np.asarray(logits, np.float64))
    np.testing.assert_allclose([model.reward(logits, pick(x, i)) for i in range(4)], reward[:4], rtol=1e-4, atol=1e-5)
    one = LowRank.init(key=jax.random.key(1), dim=4, rank=1, weights="simplex")
    scores = [float(one.log_odds(jnp.asarray([float(u)]), pick(x, 0), pick(x, 1))) for u in (-3, 5)]
    assert scores[0] == scores[1]


UPDATES = np.load(Path(__file__).parent / "fixtures" / "updates.npz")  # by record_updates.py, with the released codes


def released(name: str) -> dict:
    """Parameters of a released model, by their last names; layers as ours are: kernels transposed, no activations."""
    parts = {k.removeprefix(name + "/"): UPDATES[k] for k in UPDATES.files if k.startswith(name + "/")}
    heads = {k.partition(".mlp.")[0] for k in parts if ".mlp." in k}
    layer = lambda h, i: {"kernel": parts[f"{h}.mlp.layers.{i}.weight"].T, "bias": parts[f"{h}.mlp.layers.{i}.bias"]}  # noqa: E731
    return parts | {head: tuple(layer(head, i) for i in (0, 3, 6)) for head in heads}


def pal(name: str, variant: str):
    """Our model and the users' logits with the parameters of a released PAL."""
    found, item = released(name), "item_learner.projector"
    omega = np.stack([found[f"user_learner.W.{u}"] for u in range(3)])
    if variant == "a":
        return IdealPoint(found[item], found["user_learner.P"], np.zeros((), np.float32)), omega
    heads = [found[f"user_learner.projectors.{k}"] for k in range(2)]
    return IdealDirection(found[item], jax.tree.map(lambda *x: np.stack(x), *heads), found["logit_scale"]), omega


def stepped(model, users, likelihood, reduction, optimizer, scale=1.0):
    """Parameters after the recorded number of our own training steps on the recorded rows, and the last loss."""
    prompt = np.broadcast_to(UPDATES["prompts"], UPDATES["table"].shape)
    item = Item(embedding=UPDATES["table"] * np.float32(scale), prompt=prompt)
    batch = rows(pick(item, UPDATES["first"]), pick(item, UPDATES["second"]), np.ones(len(UPDATES["user"])))
    batch = batch.replace(user=jnp.asarray(UPDATES["user"], jnp.int32))
    loss = comparison_loss(lambda table, community, user: table[user], reduction=reduction)
    step = jax.jit(make_train_step(loss, optimizer))
    params = jax.tree.map(jnp.asarray, Params(model, users, likelihood))
    state, metrics = init_state(params, optimizer, jax.random.key(0)), {}
    for _ in range(int(UPDATES["steps"])):
        state, metrics = step(state, batch)
    return state.params, float(metrics["loss"])


def test_the_released_lore_takes_the_same_steps():
    start, end = released("lore/start"), released("lore/end")
    model = LowRank(({"kernel": start["V"], "bias": np.zeros(2, np.float32)},), 2, "simplex")
    scale = 20 / 100  # features of the record are 20 differences; the released logits are divided by 100
    summed = lambda nats, batch: 3 * per_user_mean(nats, batch)  # noqa: E731
    found, _ = stepped(model, start["W"], Logistic(), summed, optax.adam(0.5), scale)
    np.testing.assert_allclose(found.users, end["W"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.model.basis[0]["kernel"], end["V"], rtol=1e-4, atol=1e-4)
    assert np.abs(end["V"] - start["V"]).max() > 1.0


@pytest.mark.parametrize(("variant", "likelihood"), [("a", Hinge()), ("b", Logistic())])
def test_the_released_pal_takes_the_same_steps(variant, likelihood):
    model, omega = pal(f"pal_{variant}/start", variant)
    optimizer = grouped(
        {"projector": optax.adamw(1e-4, weight_decay=0.01), "fast": optax.adam(5e-3), "scale": optax.adam(1e-1)},
        [("users|points", "fast"), ("log_scale", "frozen" if variant == "a" else "scale")], default="projector",
    )  # fmt: skip
    found, loss = stepped(model, omega, likelihood, pooled_mean, optimizer)
    expected, expected_omega = pal(f"pal_{variant}/end", variant)
    assert loss == pytest.approx(float(UPDATES[f"pal_{variant}/loss"]), abs=1e-5)
    np.testing.assert_allclose(found.users, expected_omega, rtol=1e-4, atol=1e-5)
    free = found.model
    if variant == "a":  # the last bias cancels in the distance: there Adam walks on rounding errors
        free, expected = (m.replace(projector=(*m.projector[:-1], m.projector[-1]["kernel"])) for m in (free, expected))
    for ours, theirs in zip(jax.tree.leaves(free), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(expected_omega - omega).max() > 0.05
