"""Packed batches: what stands in their rows, and that losses and gradients are those of one text a row."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from record_decoders import FIXTURES, save_tokenizer
from tables import held

from pluralprefs import encoders
from pluralprefs.backbone import Backbone, encoding_loss
from pluralprefs.encoders.text import TextEncoder, encode
from pluralprefs.encoders.tokens import Rendered
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.likelihoods import Logistic
from pluralprefs.models.ideal_point import IdealDirection
from pluralprefs.token_batches import PackedBatches, TokenBatches, lay_out
from pluralprefs.train import comparison_loss
from pluralprefs.training import gather_state
from pluralprefs.types import Comparisons, Item, Params
from pluralprefs.users import Users

SIZES = {"budget": 700, "max_length": 64, "seed": 5}


def rows_of(pairs: np.ndarray) -> Comparisons[np.ndarray]:
    """Comparisons of these items, each with a target of its own."""
    count = pairs.shape[1]
    numbers, ids = np.arange(count, dtype=np.float32), np.full(count, -1, np.int32)
    return Comparisons(*pairs, numbers / count, numbers < 0, ids, ids, ids, ids, 0 * numbers, 0 * numbers + 1)


def some(kind: type[TokenBatches] = PackedBatches, *, pairs: int = 101, prompts: bool = True, **options):
    """Pairs of texts of 0 to 59 tokens, no two of them alike."""
    draw = np.random.default_rng(1)
    texts = [Rendered([*range(100 * at, 100 * at + size)], [0] * size, 0) for at, size in enumerate(range(0, 60, 2))]
    asked = [Rendered([at] * (1 + at % 7), [0] * (1 + at % 7), 0) for at in range(30)] if prompts else None
    rows = rows_of(draw.integers(0, 30, (2, pairs)).astype(np.int32))
    prompted = None if asked is None else held(asked)
    return kind(rows, Item(embedding=None, index=np.arange(30)), held(texts), prompted, **SIZES | options)


def spelled(batch, side: str, part: str = "embedding") -> list[list[int]]:
    """The ids of a batch's texts that count, read by their spans."""
    item = getattr(batch.comparisons, side)
    span, width = getattr(item, part), len(item.index) // len(batch.rows.ids)
    places = [(at // width, span.start[at], span.size[at]) for at in np.flatnonzero(batch.comparisons.weight)]
    return [batch.rows.ids[row, start : start + size].tolist() for row, start, size in places]


def test_every_pair_stands_once_an_epoch_in_one_row_beside_its_own_texts():
    found = some()
    epoch = list(islice(found.stream(), found.steps))
    target = np.concatenate([batch.comparisons.target[batch.comparisons.weight > 0] for batch in epoch])
    np.testing.assert_array_equal(np.sort(target), found.rows.target)
    assert len({tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in epoch}) == 1
    for batch in epoch:
        assert batch.rows.ids.size <= 700
        real = batch.comparisons.weight > 0
        for side in ("first", "second"):
            items = getattr(batch.comparisons, side).index[real]
            assert spelled(batch, side) == [found.responses.held[item].ids for item in items]
        assert spelled(batch, "first", "prompt") == [
            found.prompts.held[item].ids for item in batch.comparisons.first.index[real]
        ]
        for row, mask in zip(batch.rows.segment, batch.rows.mask, strict=True):
            assert (np.diff(row[mask]) >= 0).all()  # a text is one piece
            assert set(row[~mask]) <= {0}
    assert sum(batch.rows.mask.sum() for batch in epoch) == np.maximum(found.sizes, 1).sum()


def test_packing_leaves_less_padding_than_buckets():
    assert some(pairs=400).padding < 0.1 < some(TokenBatches, pairs=400).padding
    # Pairs of which no two fit a row of the longest one's length get longer rows.
    texts = [Rendered([1] * size, [0] * size, 0) for size in (50, *[30] * 9)]
    rows = rows_of(np.stack([np.arange(400) % 10, np.arange(400) % 10]).astype(np.int32))
    found = PackedBatches(rows, Item(embedding=None), held(texts), None, **SIZES | {"budget": 4000})
    assert found.layout.length == 448
    assert found.padding < 0.15  # of which the last batch is a part
    assert replace(found, budget=200).layout.length == 112


def test_a_packed_batch_is_a_function_of_seed_and_step_and_epochs_mix_rows_anew():
    found = some()
    reports = list(islice(found.stream(), 2 * found.steps))
    later = next(some().stream(start=found.steps + 3))
    jax.tree.map(np.testing.assert_array_equal, later, reports[found.steps + 3])
    assert not np.array_equal(next(some(seed=6).stream()).rows.ids, reports[0].rows.ids)

    def together(part):
        rows = [row for batch in part for row in batch.comparisons.target.reshape(len(batch.rows.ids), -1).tolist()]
        return {frozenset(row) for row in rows}

    assert together(reports[: found.steps]) != together(reports[found.steps :])


def test_a_batch_has_rows_for_every_device_even_beyond_the_budget():
    for budget in (700, 10):
        found = some(multiple=4, budget=budget)
        batch = next(found.stream())
        assert len(batch.rows.ids) == 4
        assert len(batch.comparisons.weight) % 4 == 0


def test_rows_are_filled_best_fit_first():
    found = lay_out(np.array([6, 5, 4, 3, 2]), length=10)
    assert found.rows == 2
    assert found.row.tolist() == [0, 1, 0, 1, 1]
    assert found.slot.tolist() == [0, 0, 1, 1, 2]
    draw = np.random.default_rng(0)
    sizes = -np.sort(-draw.integers(1, 40, 500))
    found = lay_out(sizes, length=40)
    assert np.bincount(found.row, weights=sizes).max() <= 40
    assert found.rows <= 1.06 * sizes.sum() / 40
    assert len({*zip(found.row.tolist(), found.slot.tolist(), strict=True)}) == 500


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny decoders with a tokenizer."""
    path = tmp_path_factory.mktemp("packing")
    for kind in ("llama", "gemma2", "opt"):
        shutil.copytree(FIXTURES / kind, path / kind)
        save_tokenizer(path / kind)
    return path


def pair_of_batches(prompts: bool) -> list[TokenBatches]:
    """Twelve pairs in packed rows, and in one batch of padded ones; a response and a prompt are empty."""
    draw = np.random.default_rng(3)
    texts = [Rendered(draw.integers(3, 48, size).tolist(), [0] * size, 0) for size in (0, 1, *draw.integers(2, 16, 10))]
    asked = [texts[(5 * at + 7) % 12] for at in range(12)] if prompts else None
    rows = rows_of(np.stack([np.arange(12), (np.arange(12) + 2) % 12]).astype(np.int32))
    shared = (rows, Item(embedding=None, index=np.arange(12)), held(texts), asked and held(asked))
    return [kind(*shared, budget=budget, max_length=16, seed=0) for kind, budget in KINDS]


KINDS = ((PackedBatches, 100), (TokenBatches, 10**6))
embed = jax.jit(encode)


@pytest.mark.parametrize(
    ("kind", "pooling", "normalise"),
    [
        ("llama", "last", False),
        ("llama", "mean", True),
        pytest.param("gemma2", "mean", False, marks=pytest.mark.slow),
        pytest.param("opt", "last", True, marks=pytest.mark.slow),
    ],
)
def test_packed_embeddings_are_those_of_a_text_a_row(kind, pooling, normalise, folders):
    encoder = encoders.load(folders / kind, max_length=16, pooling=pooling, normalise=normalise)
    found = {}
    for batches in pair_of_batches(prompts=True):
        for batch in islice(batches.stream(), batches.steps):
            rows = embed(encoder, batch)
            for at in np.flatnonzero(rows.weight):
                parts = (rows.first.embedding[at], rows.second.embedding[at], rows.first.prompt[at])
                found.setdefault(int(rows.first.index[at]), []).append(np.stack(parts))
    assert len(found) == 12
    for packed, apart in found.values():
        np.testing.assert_allclose(packed, apart, atol=1e-5)


@pytest.mark.slow
def test_packed_losses_and_gradients_are_those_of_a_text_a_row(folders):
    encoder = encoders.load(folders / "llama", max_length=16)
    model = IdealDirection.init(key=jax.random.key(0), dim=encoder.dim, prototypes=2, point=4)
    params = Params(model, Users.init(model, users=0, communities=0), Logistic(), encoder=encoder.params)
    summed = comparison_loss(gather_state, reduction=lambda nats, batch: jnp.sum(nats * batch.weight))
    loss, nothing = encoding_loss(summed, encoder), jax.tree.map(lambda _: None, encoder.params)
    step = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, (nothing, batch), jax.random.key(0))[0]))
    (found, gradient), (wanted, other) = (
        jax.tree.map(lambda *parts: sum(parts), *(step(params, b) for b in islice(batches.stream(), batches.steps)))
        for batches in pair_of_batches(prompts=False)
    )
    assert step._cache_size() == 2  # one program packed, and one of the only padded batch
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    names = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradient)]
    for name, own, leaf in zip(names, jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(own, leaf, atol=1e-5 * np.abs(leaf).max(initial=1.0), err_msg=name)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(other.encoder)) > 0.01


def test_what_reads_one_text_a_row_keeps_its_buckets_and_cannot_be_packed(folders, monkeypatch):
    decoder = encoders.load(folders / "llama", max_length=16)
    single = TextEncoder(
        params={}, graphdef=None, renderer=decoder.renderer, pooling="mean", normalise=False, joint=False,
        prompt=False, dim=4, dtype="float32", weights="", kind="bert",
    )  # fmt: skip
    for backend, usual in (("cpu", TokenBatches), ("gpu", PackedBatches)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert Backbone().batches(decoder) is usual
        assert Backbone(packed=True).batches(decoder) is PackedBatches
        assert Backbone(packed=False).batches(decoder) is TokenBatches
        assert Backbone().batches(single) is TokenBatches
    monkeypatch.undo()
    message = "a row of a bert holds one text: it cannot be packed; leave backbone.packed out"
    with pytest.raises(EncoderError, match=message):
        Backbone(packed=True).batches(single)
    with pytest.raises(EncoderError, match=message):
        encode(single, next(some(prompts=False).stream()))
