"""Agreement with independent code and published formulas."""

import choix
import jax
import jax.numpy as jnp
import numpy as np
from families import FAMILIES, items, pick, user

from pluralprefs.models.low_rank import LowRank


def test_one_hot_bradley_terry_agrees_with_choix():
    """A wide Gaussian prior on one-hot items is choix's regularised likelihood: sum of nats + alpha |w|^2."""
    from families import rows

    from pluralprefs.adapt import laplace_user
    from pluralprefs.models.bradley_terry import BradleyTerry
    from pluralprefs.types import Item
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
        if i < len(weights) - 1:  # the tanh form of GELU
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
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
