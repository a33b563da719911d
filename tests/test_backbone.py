"""Training the encoder: its batches, equal losses wherever it is called, shards, resuming, and a whole run."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file
from tables import held, letters, tiny_llama
from test_hosts import free_port, together

from pluralprefs import backbone as module
from pluralprefs import encoders, launch
from pluralprefs.backbone import (
    BACKBONE,
    Backbone,
    begun,
    encoding_loss,
    restore_backbone,
    save_backbone,
    train_backbone,
)
from pluralprefs.data import batches, comparisons
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.cache import encode_items
from pluralprefs.encoders.lora import Lora
from pluralprefs.encoders.tokens import Rendered
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.experiment import FAMILIES, Experiment, indexed
from pluralprefs.fitting import take
from pluralprefs.likelihoods import Logistic, pooled_mean
from pluralprefs.models.ideal_point import IdealDirection
from pluralprefs.sharding import leaf_name, make_mesh, sharded_init
from pluralprefs.token_batches import PackedBatches, TokenBatches
from pluralprefs.train import comparison_loss, init_state, make_train_step, train
from pluralprefs.training import gather_state
from pluralprefs.types import Comparisons, Item, Params
from pluralprefs.users import Pooled, Users

RATES = {name: partial(optax.sgd, learning_rate=0.2) for name in ("backbone", "head")}
SMALL = Backbone(lora=None, optimizers=RATES, epochs=2, batch_tokens=8 * 48, packed=True, warmup=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama, and comparisons of texts."""
    path = tmp_path_factory.mktemp("backbone")
    tiny_llama(path / "llama")
    letters(path / "rows.jsonl")
    return path


@pytest.fixture(scope="module")
def data(folder):
    """The comparisons, indexed, all of them for training."""
    return read(folder)


def read(folder):
    table = comparisons.read(folder / "rows.jsonl").with_columns(cell=pl.lit("train"), fold=pl.lit("train"))
    return indexed(Experiment(data=None, model=None), table)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoders.load(folder / "llama", max_length=16, prompt=True)


def head(encoder) -> IdealDirection:
    return IdealDirection.init(key=jax.random.key(0), dim=encoder.dim, prompt_dim=encoder.dim, prototypes=2, point=4)


def trained(backbone, encoder, data, *, validation=(), **options):
    """`train_backbone` without users; the losses of its epochs beside what it returns."""
    losses = []
    found = train_backbone(
        backbone, encoder, head(encoder), table=data.items, items=Item(embedding=None), rows=data.rows,
        validation=take(data.rows, np.array(validation, int)), pooled=Pooled(), users=0, likelihood=Logistic(),
        reduction=pooled_mean, **{"report": lambda done, epochs, loss: losses.append(loss)} | options,
    )  # fmt: skip
    return found, losses


def some_batches(**options) -> TokenBatches:
    """Pairs of texts of 1 to 60 tokens."""
    draw = np.random.default_rng(1)
    texts = [Rendered(list(range(size)), [0] * size, 0) for size in draw.integers(1, 60, 30)]
    pairs, ids = draw.integers(0, 30, (2, 101)).astype(np.int32), np.full(101, -1, np.int32)
    numbers = np.arange(101, dtype=np.float32)
    rows = Comparisons(*pairs, numbers / 101, numbers < 0, ids, ids, ids, ids, 0 * numbers, 0 * numbers + 1)
    index = np.arange(30)
    sizes = {"budget": 700, "max_length": 64, "seed": 5} | options
    return TokenBatches(rows, Item(embedding=None, index=index), held(texts), None, **sizes)


def test_every_pair_occurs_once_an_epoch_within_the_budget_beside_its_own_texts():
    found = some_batches()
    epoch = list(islice(found.stream(), found.steps))
    target = np.concatenate([batch.target[batch.weight > 0] for batch in epoch])
    np.testing.assert_array_equal(np.sort(target), found.rows.target)
    assert {batch.first.embedding.ids.shape[1] for batch in epoch} == {16, 32, 48, 64}
    for batch in epoch:
        assert batch.first.embedding.ids.size + batch.second.embedding.ids.size <= 700
        for side in (batch.first, batch.second):
            sizes = side.embedding.mask.sum(1)
            wanted = [
                len(found.responses.held[item].ids) if w else 0
                for item, w in zip(side.index, batch.weight, strict=True)
            ]
            np.testing.assert_array_equal(sizes, wanted)
    full = np.mean([batch.weight.sum() for batch in epoch])
    assert full > 4


def test_a_batch_is_a_function_of_seed_and_step_alone():
    found = some_batches()
    steps = found.steps
    reports = [batch.target for batch in islice(found.stream(), 2 * steps)]
    later = next(some_batches().stream(start=steps + 3))
    np.testing.assert_array_equal(later.target, reports[steps + 3])
    firsts, seconds = (np.concatenate(reports[i * steps : (i + 1) * steps]) for i in (0, 1))
    assert not np.array_equal(firsts, seconds)
    assert not np.array_equal(next(some_batches(seed=6).stream()).target, reports[0])


def test_batches_are_multiples_of_what_the_mesh_asks_for_even_beyond_the_budget():
    for budget, sizes in ((700, {4, 8, 20}), (10, {4})):
        found = some_batches(multiple=4, budget=budget)
        assert {len(batch.target) for batch in islice(found.stream(), found.steps)} == sizes


def test_losses_are_equal_with_features_cached_and_with_a_frozen_encoder_called_inside_the_step(encoder, data):
    tokens = TokenBatches.render(encoder, data.items, Item(embedding=None), data.rows, budget=384, seed=0)
    start = Params(head(encoder), Users.init(head(encoder), users=0, communities=0), Logistic())
    labels = replace(SMALL, groups=(("^encoder/", "frozen"),)).labels(start.replace(encoder=encoder.params))
    assert {label for name, label in labels.items() if name.startswith("encoder/")} == {"frozen"}
    nothing = jax.tree.map(lambda _: None, encoder.params)
    loss, update = comparison_loss(gather_state), optax.adam(0.05)
    inside = ((encoder.params, batch) for batch in tokens.stream())
    step = jax.jit(make_train_step(encoding_loss(loss, encoder), update))
    state = init_state(start.replace(encoder=nothing), update, jax.random.key(0))
    called = [float(metrics["loss"]) for _, _, metrics in islice(train(state, inside, step), 10)]
    items = jax.tree.map(jnp.asarray, encode_items(data.items, encoder, cache=False))
    outside = (
        batches.gather(items, batches.take_rows(data.rows, index))
        for number in range(2)
        for _, index in tokens.epoch(number)
    )
    state = init_state(start, update, jax.random.key(0))
    cached = [float(m["loss"]) for _, _, m in islice(train(state, outside, jax.jit(make_train_step(loss, update))), 10)]
    np.testing.assert_allclose(called, cached, rtol=2e-4)
    assert np.ptp(called) > 0.1


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; tests/conftest.py asks for them")
def test_training_on_a_mesh_equals_training_on_one_device(encoder, data):
    asked = replace(SMALL, batch_tokens=1024, epochs=4)  # for batches of as many rows on either
    (one, found, _), losses = trained(asked, encoder, data)
    (_, sharded, _), others = trained(replace(asked, mesh={"data": 2, "fsdp": 2, "tensor": 2}), encoder, data)
    assert sharded["layers/0/query/kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.05
    for name, leaf in found.items():
        np.testing.assert_allclose(sharded[name], leaf, atol=2e-3, err_msg=name)
    assert set(found) == set(sharded)
    assert one.weights != encoder.weights


def test_no_device_holds_the_whole_of_what_a_mesh_divides(folder, data, monkeypatch):
    """Weights as read, the state before the first step and the encoder afterwards: a device has its part alone."""
    sizes = {"data": 1, "fsdp": 4}
    encoder = encoders.load(folder / "llama", max_length=16, prompt=True, mesh=sizes, remat="nothing_saveable")
    seen = []

    def begin(init, mesh, rules, params):
        seen.extend([params.encoder, sharded_init(init, mesh, rules, params)])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sharded_init", begin)
    rates = {name: partial(optax.adam, learning_rate=0.01) for name in ("backbone", "head")}
    asked = replace(SMALL, optimizers=rates, mesh=sizes)
    with pytest.raises(KeyboardInterrupt):
        trained(asked, encoder, data)
    whole = {leaf_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(encoder.params)}
    after = module.applied(asked, encoder, {name: leaf + 1 for name, leaf in whole.items()}, make_mesh(**sizes))
    matrices = sum(leaf.ndim == 2 for leaf in whole.values())
    for tree, copies in ((encoder.params, 1), (seen[0], 1), (seen[1].params.encoder, 1),
                         (seen[1].opt_state, 2), (after.params, 1)):  # fmt: skip
        parts = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
        assert len(parts) >= copies * matrices
        assert sum(leaf.addressable_shards[0].data.size < leaf.size for leaf in parts) >= copies * matrices
    again = module.applied(asked, encoder, {name: leaf + 1 for name, leaf in whole.items()})  # as where a run is loaded
    for tree in (after.params, again.params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            np.testing.assert_array_equal(leaf, whole[leaf_name(path)] + 1)
            assert leaf.ndim < 2 or leaf.addressable_shards[0].data.size < leaf.size


@pytest.mark.slow
def test_two_processes_train_the_encoder_that_one_trains(folder, tmp_path):
    program = """
        import sys
        from dataclasses import replace
        from pathlib import Path
        from pluralprefs import hosts
        folder, out, mesh, *who = sys.argv[1:]
        if who:
            hosts.connect(who[0], 2, int(who[1]))
        sys.path.insert(0, "tests")
        from test_backbone import SMALL, read, save_backbone, trained
        import jax
        import numpy as np
        from pluralprefs import encoders
        from pluralprefs.encoders.cache import encode_texts
        spread, mesh = mesh == "spread", mesh.replace("spread", "fsdp")
        sizes = {mesh: 2} if who else {}
        encoder = encoders.load(Path(folder) / "llama", max_length=16, prompt=True, mesh=sizes if spread else None)
        asked = replace(SMALL, batch_tokens=1024, epochs=3, mesh=sizes)
        if spread:
            try:
                trained(replace(asked, mesh={"data": 2}), encoder, read(Path(folder)))
            except ValueError as error:
                assert "give backbone.mesh and the encoder's mesh the same sizes" in str(error)
            else:
                raise AssertionError
        (after, found, notes), losses = trained(asked, encoder, read(Path(folder)), validation=range(20))
        for one in (encoder, after):
            matrices = [leaf for leaf in jax.tree.leaves(one.params) if leaf.ndim == 2]
            halves = [leaf.addressable_shards[0].data.size * 2 == leaf.size for leaf in matrices]
            assert all(halves) if spread else not any(halves)  # whole on each process, or nowhere
        cache = Path(out).parent / f"{mesh}-{jax.process_index()}"
        if hosts.writes():  # what one cache holds and another lacks
            encode_texts(encoders.load(Path(folder) / "llama", max_length=16), ["a b", "c"], cache=cache)
        texts = encode_texts(encoder.replace(prompt=False), ["c", "a b", "d e"], cache=cache if spread else False)
        print("texts", *np.asarray(texts).ravel()[::7])
        if hosts.writes():
            save_backbone(Path(out), encoder, found)
        print("found", after.weights, notes["validation_nll"], *losses)
    """
    command, files = [sys.executable, "-c", textwrap.dedent(program), str(folder)], {}
    said = {}
    texts = {}
    for mesh in ("one", "data", "fsdp", "spread"):
        files[mesh] = tmp_path / f"{mesh}.safetensors"
        coordinator = f"127.0.0.1:{free_port()}"
        who = [[]] if mesh == "one" else [[coordinator, "0"], [coordinator, "1"]]
        lines = together([[*command, str(files[mesh]), mesh, *each] for each in who])
        said[mesh], texts[mesh] = (
            [next(line for line in text.splitlines() if line.startswith(word)).split() for text in lines]
            for word in ("found", "texts")
        )
    one = [float(number) for number in said["one"][0][2:]]
    assert one[-1] < one[1] - 0.05
    for mesh in ("data", "fsdp", "spread"):
        assert texts[mesh][0] == texts[mesh][1]
        np.testing.assert_allclose(*[[float(n) for n in texts[each][0][1:]] for each in (mesh, "one")], atol=1e-4)
        assert said[mesh][0] == said[mesh][1]  # both hold the same weights
        np.testing.assert_allclose([float(number) for number in said[mesh][0][2:]], one, rtol=1e-4)
        found = load_file(files[mesh])
        for name, leaf in load_file(files["one"]).items():
            np.testing.assert_allclose(found[name], leaf, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_training_that_was_killed_ends_with_the_bits_of_one_that_was_not(encoder, data, tmp_path, monkeypatch):
    lora = replace(SMALL, lora=Lora(rank=2), accumulate=2, batch_tokens=192)
    (_, whole, notes), _ = trained(lora, encoder, data, validation=range(20))
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    plain, made = PackedBatches.batch, []

    def killed(self, length, index):
        made.append(index)
        if len(made) == 11:  # in the second epoch, between two updates of two batches
            raise KeyboardInterrupt
        return plain(self, length, index)

    monkeypatch.setattr(PackedBatches, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(lora, encoder, data, validation=range(20), checkpoints=tmp_path / "kept")
    (_, resumed, again), _ = trained(lora, encoder, data, validation=range(20), checkpoints=tmp_path / "kept")
    assert len(made) == 11 + notes["steps"] - 10  # ten were done
    assert again == notes
    for name, leaf in whole.items():
        np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; tests/conftest.py asks for them")
def test_a_training_goes_on_on_another_mesh_with_the_batches_that_it_began_with(encoder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    begun = replace(SMALL, batch_tokens=1024, mesh={"data": 2, "fsdp": 2})
    (_, whole, notes), _ = trained(begun, encoder, data)

    def killed(done, *_):
        if done == 2:
            raise KeyboardInterrupt

    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        trained(begun, encoder, data, checkpoints=kept, report=killed)
    refused = r"parts of a mesh, which 3 do not divide: .* whose data x fsdp divides 4"
    with pytest.raises(ValueError, match=refused):
        trained(replace(begun, mesh={"data": 3}), encoder, data, checkpoints=kept)
    for number, mesh in enumerate(({}, {"fsdp": 2, "tensor": 2})):
        copied = shutil.copytree(kept, tmp_path / str(number))
        (_, moved, again), _ = trained(replace(begun, mesh=mesh), encoder, data, checkpoints=copied)
        assert again == notes
        for name, leaf in whole.items():
            np.testing.assert_allclose(moved[name], leaf, atol=1e-4, err_msg=name)


def test_lora_moves_adapters_alone_and_is_read_back_for_the_encoder_that_it_belongs_to(encoder, data, tmp_path):
    lora = replace(SMALL, lora=Lora(rank=2), frozen_dtype="bfloat16", epochs=3)
    (adapted, found, notes), losses = trained(lora, encoder, data)
    assert losses[-1] < losses[0] - 0.05
    assert set(found) == {f"layers/0/{of}/dot_general/{part}" for of in ("query", "value") for part in ("down", "up")}
    assert notes["trained_parameters"] == sum(leaf.size for leaf in found.values())
    assert adapted.params["layers"][0]["up"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        adapted.params["layers"][0]["up"]["kernel"], encoder.params["layers"][0]["up"]["kernel"].astype(jnp.bfloat16)
    )
    save_backbone(tmp_path / BACKBONE, encoder, found)
    again = restore_backbone(tmp_path / BACKBONE, lora, encoder)
    assert again.identity == adapted.identity != encoder.identity
    jax.tree.map(np.testing.assert_array_equal, again.params, adapted.params)
    with pytest.raises(EncoderError, match="was trained from another encoder"):
        restore_backbone(tmp_path / BACKBONE, lora, encoder.replace(weights="others"))
    with pytest.raises(EncoderError, match=r"layers/0/query/dot_general/down is \(16, 2\), the encoder has \(16, 3\)"):
        restore_backbone(tmp_path / BACKBONE, replace(lora, lora=Lora(rank=3)), encoder)


def toy() -> Params:
    layers = {"layers": {at: {"up": {"kernel": jnp.ones((2, 2))}} for at in (0, 1)}, "words": jnp.ones(2)}
    return Params({"head": jnp.ones(2)}, {"user_root": jnp.ones(2)}, (), encoder=layers)


def test_layers_have_rates_of_their_own_and_what_is_frozen_counts_in_no_norm():
    sgd = {
        name: partial(optax.sgd, learning_rate=rate)
        for name, rate in (("backbone", 0.1), ("slow", 0.01), ("head", 1.0))
    }
    groups = (("^encoder/words", "frozen"), ("^encoder/layers/0/", "slow"))
    asked = Backbone(lora=None, groups=groups, optimizers=sgd, clip=0.5, warmup=0.0, final=0.0)
    update = asked.optimizer(asked.labels(toy()), steps=4)
    state = update.init(toy())
    gradient = jax.tree.map(jnp.ones_like, toy())
    sizes = []
    for _ in range(4):
        moved, state = update.update(gradient, state, toy())
        sizes.append(float(-moved.model["head"][0]))
    clipped = 0.5 / np.sqrt(4 + 4 + 2)  # two kernels and the head: words and roots are frozen
    np.testing.assert_allclose(sizes, clipped * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2, rtol=1e-5)
    moved, _ = update.update(gradient, update.init(toy()), toy())
    np.testing.assert_allclose(-moved.encoder["layers"][0]["up"]["kernel"], 0.01 * clipped, rtol=1e-5)
    np.testing.assert_allclose(-moved.encoder["layers"][1]["up"]["kernel"], 0.1 * clipped, rtol=1e-5)
    assert not moved.encoder["words"].any()
    assert not moved.users["user_root"].any()


def test_accumulated_batches_make_one_update_of_their_mean():
    asked = Backbone(lora=None, optimizers=RATES, accumulate=2, warmup=0.0)
    both, alone = (replace(asked, accumulate=k).optimizer(asked.labels(toy()), steps=4) for k in (2, 1))
    gradients = [jax.tree.map(lambda leaf, k=k: k * leaf, toy()) for k in (1.0, 3.0)]
    state = both.init(toy())
    first, state = both.update(gradients[0], state, toy())
    second, _ = both.update(gradients[1], state, toy())
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    wanted, _ = alone.update(mean, alone.init(toy()), toy())
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), second, wanted)


def test_a_group_that_fits_nothing_or_has_no_optimiser_is_refused():
    with pytest.raises(ValueError, match=r"no parameter fits '\^encodr/'; there are: model/head"):
        Backbone(groups=(("^encodr/", "frozen"),)).labels(toy())
    with pytest.raises(ValueError, match="no optimiser for 'slow'; there are frozen, backbone, head"):
        Backbone(groups=(("^encoder/", "slow"),)).labels(toy())
    with pytest.raises(EncoderError, match="this encoder has no weights to train"):
        begun(SMALL, AttributeEncoder())


@pytest.mark.slow
def test_a_run_trains_keeps_and_reads_back_its_encoder(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("PLURALPREFS_CACHE", str(tmp_path / "cache"))
    asked = Experiment(
        data=partial(comparisons.read, str(folder / "rows.jsonl")), name="low", shots=(0,), draws=1, controls=False,
        encoder=partial(encoders.load, str(folder / "llama"), max_length=16), refit=False,
        backbone=replace(SMALL, lora=Lora(rank=2)),
        **FAMILIES["individual"] | {"users": Pooled(levels=(), gain=False, cross_fit=None)},
    )  # fmt: skip

    def stopped(*args, **options):
        raise KeyboardInterrupt

    fit_seed = launch.fit_seed
    monkeypatch.setattr(launch, "fit_seed", stopped)
    with pytest.raises(KeyboardInterrupt):
        launch.run(asked, root=tmp_path, progress=False)
    [path] = (found.parent for found in tmp_path.glob("*/run.json"))
    monkeypatch.setattr(launch, "fit_seed", fit_seed)
    monkeypatch.setattr("pluralprefs.experiment.train_backbone", stopped)  # it is kept, not trained again
    run = launch.resume(path, progress=False)
    notes = run.folder.read()["backbone"]
    assert 0 < notes["epochs"] <= 2
    assert notes["validation_nll"] > 0
    assert run.encoder.identity != encoder.identity
    table = run.read(folder / "rows.jsonl")
    features = np.asarray(run.encode(batches.item_table(table)).embedding)
    plain = np.asarray(encode_items(batches.item_table(table), encoder, cache=False).embedding)
    assert np.abs(features[: len(plain)] - plain).max() > 1e-3
    scores = run.score(table)
    kept = run.folder.table("predictions").filter(model="low").join(scores, on="example_id", suffix="_scored")
    assert kept.height > 3
    np.testing.assert_allclose(
        kept["log_odds_scored"] / np.sqrt(1 + np.pi * kept["log_odds_std_scored"] ** 2 / 8), kept["log_odds"], atol=1e-4
    )
    (path / BACKBONE).unlink()
    with pytest.raises(ValueError, match=r"backbone\.safetensors: no such file"):
        launch.load(path)
