"""Adapters of several users on one encoder: side by side each learns what it learns alone, and all are one encoder."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from tables import letters, tiny_llama

from pluralprefs import adapters, encoders
from pluralprefs.adapters import drawn, train_adapters
from pluralprefs.backbone import encoding_loss
from pluralprefs.data import comparisons
from pluralprefs.data.batches import index_rows, item_table
from pluralprefs.data.comparisons import DataError
from pluralprefs.encoders.cache import encode_items, encode_texts
from pluralprefs.encoders.lora import Lora, attach, join, split
from pluralprefs.encoders.stacked import StackedEncoder, is_factor
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.likelihoods import Logistic, pooled_mean
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.token_batches import TokenBatches
from pluralprefs.train import comparison_loss, init_state, make_train_step
from pluralprefs.types import Item, Params

LORA = Lora(rank=2, alpha=4.0)
SHORT = {"lora": LORA, "steps": 5, "batch_size": 4, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    letters(path / "rows.jsonl")
    tiny_llama(path / "llama")
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return encoders.load(folder / "llama", max_length=16)


@pytest.fixture(scope="module")
def table(folder):
    """One likes the letter a, another does not, and a third has three judgements only."""
    rows = comparisons.read(folder / "rows.jsonl").drop("user_id")
    likes = rows.with_columns(user_id=pl.lit("likes"))
    dislikes = rows.with_columns(user_id=pl.lit("dislikes"), target=1 - pl.col("target"))
    few = rows.head(3).with_columns(user_id=pl.lit("few"))
    return pl.concat([likes, dislikes, few]).with_columns(example_id=pl.int_range(pl.len()).cast(pl.Utf8))


@pytest.fixture(scope="module")
def stacked(encoder, table):
    return train_adapters(encoder, table, "user_id", lora=LORA, steps=120, batch_size=16, learning_rate=0.02)


def named(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow  # the quick one below compares a name with the plain step
def test_side_by_side_each_learns_what_it_learns_alone(encoder, table):
    found = train_adapters(encoder, table, "user_id", **SHORT)
    assert found.names == ("dislikes", "few", "likes")
    two = train_adapters(encoder, table, "user_id", **SHORT, together=2)  # in two programs
    for place, name in enumerate(found.names):
        others = [(two, place)]
        if name == "likes":
            others.append((train_adapters(encoder, table.filter(user_id=name), "user_id", **SHORT), 0))
        for other, at in others:
            for key, leaf in named(found.factors).items():
                np.testing.assert_allclose(named(other.factors)[key][at], leaf[place], atol=2e-5)
            np.testing.assert_allclose(other.head[at], found.head[place], atol=2e-5)
    assert np.abs(found.head[0] - found.head[2]).max() > 0.01


def test_a_name_learns_what_the_plain_training_step_learns(encoder, table):
    found = train_adapters(encoder, table, "user_id", **SHORT)
    items = item_table(table)
    rows = index_rows(table, items, adapters.NOBODY)
    batches = TokenBatches.render(encoder, items, Item(embedding=None), rows, budget=1, seed=0)
    key = jax.random.fold_in(jax.random.key(0), adapters.stable_hash("few") % 2**31)
    began = attach(encoder, LORA, key)
    mine, frozen = split(began.params, is_factor)
    rate = optax.cosine_decay_schedule(0.02, 5, 0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    loss = comparison_loss(lambda users, community, user: users, reduction=pooled_mean)
    step = jax.jit(make_train_step(encoding_loss(loss, began), optimizer))
    model = BradleyTerry.init(key=key, dim=encoder.dim, item_effects=False)
    state = init_state(Params(model, model.init_user(), Logistic(), encoder=mine), optimizer, key)
    own = np.flatnonzero(table["user_id"] == "few")
    for at in range(5):
        state, _ = step(state, (frozen, batches.batch(16, drawn(0, "few", own, at, 4))))
    for key, leaf in named(found.factors).items():
        np.testing.assert_allclose(leaf[1], named(state.params.encoder)[key], atol=2e-5)
    np.testing.assert_allclose(found.head[1], state.params.users["linear"], atol=2e-5)


def test_a_pass_takes_every_row_once():
    rows = np.arange(10, 21)
    passes = [np.concatenate([drawn(0, "x", rows, at, 4) for at in range(3 * n, 3 * n + 3)]) for n in range(2)]
    for one in passes:
        assert sorted(one[one >= 0]) == rows.tolist()
        assert (one < 0).sum() == 1
    assert passes[0].tolist() != passes[1].tolist()
    assert drawn(0, "x", rows, 0, 4).tolist() != drawn(0, "y", rows, 0, 4).tolist()


def test_opposite_tastes_are_learned_on_one_encoder(stacked, table):
    items = item_table(table)
    rows = index_rows(table, items, adapters.NOBODY)
    rewards = np.asarray(encode_items(items, stacked, cache=False, progress=False).embedding)
    assert rewards.shape == (items.height, 3)
    moved = rewards[rows.first] - rewards[rows.second]
    right = (moved > 0) == (rows.target > 0.5)[:, None]
    likes = (table["user_id"] == "likes").to_numpy()
    assert right[likes, 2].mean() > 0.9  # its own adapter
    assert right[likes, 0].mean() < 0.1  # that of who dislikes the letter
    assert right[(table["user_id"] == "dislikes").to_numpy(), 0].mean() > 0.9


def test_one_adapter_is_an_encoder_of_its_own(stacked):
    texts = ["a b c", "b", "a a a a"]
    rewards = encode_texts(stacked, texts, cache=False)
    for place, name in enumerate(stacked.names):
        own = encode_texts(stacked.select(name), texts, cache=False)
        np.testing.assert_allclose(own @ np.asarray(stacked.head[place]), rewards[:, place], atol=1e-5)
    assert stacked.select("few").weights != stacked.select("likes").weights
    with pytest.raises(KeyError, match="'absent' has no adapter; there are dislikes, few, likes"):
        stacked.select("absent")


def test_adapters_are_kept_and_read_as_they_were_trained(stacked, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    stacked.save(tmp_path / "adapters", "llama")
    monkeypatch.chdir(tmp_path)
    again = encoders.load(tmp_path / "adapters")
    assert isinstance(again, StackedEncoder)
    assert again.identity == stacked.identity
    assert again.frozen.renderer.max_length == 16
    texts = ["a b c", "c"]
    kept = encode_texts(again, texts, cache=tmp_path / "cache")
    np.testing.assert_array_equal(kept, encode_texts(stacked, texts, cache=False))
    np.testing.assert_array_equal(kept, encode_texts(stacked, texts, cache=tmp_path / "cache"))
    with pytest.raises(EncoderError, match="give no other options"):
        encoders.load(tmp_path / "adapters", dtype="bfloat16")
    config = folder / "llama" / "config.json"
    told = config.read_text("utf8")
    try:
        config.write_text(json.dumps(json.loads(told) | {"rope_theta": 77.0}), "utf8")
        with pytest.raises(EncoderError, match="was trained on another encoder"):
            encoders.load(tmp_path / "adapters")
    finally:
        config.write_text(told, "utf8")
    (tmp_path / "adapters" / "adapters.safetensors").write_bytes(b"short")
    with pytest.raises(EncoderError, match="holds no stacked adapters"):
        encoders.load(tmp_path / "adapters")


def test_what_cannot_be_trained_is_an_error(encoder, folder, table, stacked):
    with pytest.raises(DataError, match="no column 'team'"):
        train_adapters(encoder, table, "team")
    with pytest.raises(DataError, match="'annotator_id' is empty"):
        train_adapters(encoder, table, "annotator_id")
    with pytest.raises(EncoderError, match="no weights to adapt"):
        train_adapters(encoders.load("attributes"), table, "user_id")
    with pytest.raises(EncoderError, match="without prompt=True"):  # before any step
        train_adapters(encoders.load(folder / "llama", prompt=True), table, "user_id", **SHORT, report=pytest.fail)
    with pytest.raises(EncoderError, match="do not fit an encoder"):
        StackedEncoder.of(encoder, Lora(rank=3), stacked.names, stacked.factors, stacked.head)
    with pytest.raises(FloatingPointError, match=r"adapter of 'dislikes': loss .* lower learning_rate"):
        train_adapters(encoder, table, "user_id", **SHORT | {"learning_rate": 1e30})


def test_names_may_be_numbers_or_truth_values(encoder, table):
    numbers = table.head(8).with_columns(team=pl.Series([1, 1, 1, 1, 2, 2, 2, 2]), new=pl.Series([True, False] * 4))
    assert train_adapters(encoder, numbers, "team", **SHORT | {"steps": 1}).names == ("1", "2")
    assert train_adapters(encoder, numbers, "new", **SHORT | {"steps": 1}).names == ("false", "true")


def test_training_tells_how_far_it_is(encoder, table):
    told = []
    train_adapters(encoder, table, "user_id", **SHORT, together=2, report=lambda *given: told.append(given))
    assert [done for done, _, _ in told] == [2, 4, 6, 8, 10, 11, 12, 13, 14, 15]
    assert {total for _, total, _ in told} == {15}
    assert all(np.isfinite(loss) for *_, loss in told)


def test_adapters_join_what_is_frozen(stacked):
    rest = split(stacked.frozen.params, is_factor)[1]
    whole = join(jax.tree.map(lambda leaf: leaf[0], stacked.factors), rest)
    assert jax.tree.structure(whole) == jax.tree.structure(stacked.frozen.params)
    assert jnp.abs(stacked.head).max() > 0
