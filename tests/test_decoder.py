"""Decoders against transformers, and what must not change a result: padding, packing, placement, number of files."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from record_decoders import (
    FIXTURES,
    KINDS,
    POSITIONS,
    ROPES,
    example_tokens,
    padded_reference,
    reference,
    tiny_decoder,
)
from safetensors.numpy import load_file, save_file

from pluralprefs.encoders.attention import Places
from pluralprefs.encoders.checkpoint import Tensors
from pluralprefs.encoders.decoder import REMAT
from pluralprefs.encoders.decoder_config import DecoderConfig
from pluralprefs.encoders.decoder_weights import Loaded, read_decoder
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.sharding import batch_sharding, make_mesh
from pluralprefs.types import Tokens

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; tests/conftest.py asks for them")

needs_torch = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.environ.get("TORCH") != "1", reason="needs PyTorch: make test TORCH=1"),
]


def with_torch(test):
    for mark in needs_torch:
        test = mark(test)
    return test


def tokens_of(arrays: dict[str, np.ndarray]) -> Tokens:
    ids, mask = (jnp.asarray(arrays[name]) for name in ("ids", "mask"))
    segment = jnp.asarray(arrays["segment"]) if "segment" in arrays else jnp.zeros_like(ids)
    return Tokens(ids, mask, segment, jnp.zeros(len(ids), jnp.int32))


def run(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    hidden = model(tokens)
    return hidden, model.logits(hidden)


# Without jit, variants share operations, each of which is compiled once.
def states(loaded: Loaded, arrays: dict[str, np.ndarray], run=run, put=jnp.asarray) -> dict[str, np.ndarray]:
    """Hidden states and logits, 0 at padding; the rows stand in a larger batch of garbage, with padding all around."""
    rows, length = arrays["ids"].shape
    inner = (slice(2, 2 + rows), slice(3, 3 + length))
    nothing = np.zeros((8, 17), np.int32)
    canvas = {"ids": nothing + 5, "mask": nothing > 0, "segment": nothing.copy()}
    for name in canvas.keys() & arrays.keys():
        canvas[name][inner] = arrays[name]
    tokens = Tokens(**{name: put(value) for name, value in canvas.items()}, prompt_end=put(np.zeros(8, np.int32)))
    found = run(loaded.graphdef, loaded.params, tokens)
    assert all(np.isfinite(value.astype(np.float32)).all() for value in found)
    real = arrays["mask"][:, :, None]
    return {name: np.where(real, value[inner], 0) for name, value in zip(("hidden", "logits"), found, strict=True)}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float = 1e-4) -> None:
    for name in ("hidden", "logits"):
        assert np.abs(expected[name]).max() > 0.5
        np.testing.assert_allclose(found[name], expected[name], atol=atol, err_msg=name)


def recorded(kind: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / f"{kind}.npz"))


# --- the reference


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_logits_equal_the_recorded_reference_wherever_a_text_stands(kind):
    arrays = recorded(kind)
    assert_equal(states(read_decoder(FIXTURES / kind, head=True), arrays), arrays)


@pytest.mark.parametrize("name", ROPES)
def test_every_rope_scaling_equals_its_recorded_reference_and_no_other(name, tmp_path):
    folder = copy("llama", tmp_path / "model", rope_parameters=ROPES[name], max_position_embeddings=POSITIONS)
    arrays = recorded(f"ropes/{name}")
    assert arrays["mask"].sum(1).max() > POSITIONS
    found = states(read_decoder(folder, head=True), arrays)
    assert_equal(found, arrays)
    for other in {"llama", *(f"ropes/{rope}" for rope in ROPES)} - {f"ropes/{name}"}:
        assert np.abs(found["hidden"] - recorded(other)["hidden"]).max() > 1e-2, other


def check(kind: str, folder: Path, *, length: int = 12, **changes) -> None:
    """Save a tiny model and compare, padded on both sides, with transformers row by row."""
    model = tiny_decoder(kind, **changes)
    model.save_pretrained(folder)
    loaded = read_decoder(folder, head=True)
    for side in ("right", "left"):
        tokens = example_tokens(side, length)
        assert_equal(states(loaded, tokens), reference(model, tokens))


@with_torch
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_that_of_transformers(kind, tmp_path):
    model = tiny_decoder(kind, seed=8)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = read_decoder(tmp_path, head=True)
    for side in ("right", "left"):
        tokens = example_tokens(side)
        assert_equal(states(loaded, tokens), padded_reference(model, tokens))


@with_torch
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "hidden_act": "gelu"}),
        ("llama", {"num_key_value_heads": 4, "head_dim": None, "rope_parameters": None}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}),
        ("qwen2", {"layer_types": None, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": False, "layer_types": None, "attention_bias": False}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": None}),
        ("gemma2", {"tie_word_embeddings": False, "attention_bias": False, "hidden_activation": "gelu"}),
        ("gemma3_text", {"final_logit_softcapping": 3.0, "attention_bias": False}),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2, "tie_word_embeddings": False}),
        ("gemma3_text", {"layer_types": None}),
        ("opt", {"do_layer_norm_before": False, "activation_function": "gelu_new"}),
        ("opt", {"_remove_final_layer_norm": True, "word_embed_proj_dim": None, "enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False}),
    ],
)
def test_variants_equal_transformers(kind, changes, tmp_path):
    check(kind, tmp_path, **changes)


@with_torch
@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in ROPES),
        ("yarn", {"attention_factor": 1.3}),
        ("longrope", {"attention_factor": 0.7}),
    ],
)
def test_every_rope_scaling_equals_transformers(name, more, tmp_path):
    check("llama", tmp_path, rope_parameters=ROPES[name] | more, max_position_embeddings=POSITIONS)
    plain = read_decoder(FIXTURES / "llama", head=True)
    scaled = read_decoder(tmp_path, head=True)
    unscaled = states(scaled._replace(graphdef=plain.graphdef), example_tokens())["hidden"]
    assert np.abs(states(scaled, example_tokens())["hidden"] - unscaled).max() > 1e-2


# --- packing


def pack(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[tuple[int, slice]]]:
    """The rows of the example one after the other in fewer rows, and where each went."""
    lengths = arrays["mask"].sum(1)
    packed = {name: np.zeros_like(arrays["ids"]) for name in ("ids", "segment")}
    packed["mask"] = np.zeros_like(arrays["mask"])
    places, at, row = [], 0, 0
    for number, length in enumerate(lengths):
        row, at = (row + 1, 0) if at + length > packed["ids"].shape[1] else (row, at)
        span = slice(at, at + length)
        packed["ids"][row, span] = arrays["ids"][number, :length]
        packed["segment"][row, span], packed["mask"][row, span] = number + 1, True
        places.append((row, span))
        at += length
    return packed, places


def assert_packing_changes_nothing(loaded: Loaded, arrays: dict[str, np.ndarray]) -> None:
    packed, places = pack(arrays)
    assert len({row for row, _ in places}) < len(places)
    apart, together = states(loaded, arrays), states(loaded, packed)
    for name in ("hidden", "logits"):
        for number, (row, span) in enumerate(places):
            expected = apart[name][number, : span.stop - span.start]
            np.testing.assert_allclose(together[name][row, span], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "opt"])
def test_packed_sequences_equal_separate_ones(kind):
    assert_packing_changes_nothing(read_decoder(FIXTURES / kind, head=True), recorded(kind))


def test_packed_sequences_are_scaled_by_their_own_length(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 77.0, "factor": 4.0}
    folder = copy("llama", tmp_path / "model", rope_parameters=rope, max_position_embeddings=5)
    assert_packing_changes_nothing(read_decoder(folder, head=True), recorded("llama"))


def test_an_unknown_token_or_place_is_never_taken_for_another():
    loaded = read_decoder(FIXTURES / "opt")
    model, places = nnx.merge(loaded.graphdef, loaded.params), jnp.array([[0, 63, 64]])
    found = model.embed(jnp.array([[47, 48, 3]]), Places(places, places, places))
    assert np.isnan(np.asarray(found)).any(axis=-1).tolist() == [[False, True, True]]


# --- precision and memory


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_bfloat16_stays_near_float32(kind):
    arrays, loaded = recorded(kind), read_decoder(FIXTURES / kind, head=True, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
    found = states(loaded, arrays, jax.jit(run, static_argnums=0))
    assert (found["hidden"].dtype, found["logits"].dtype) == (jnp.bfloat16, np.float32)
    for name in ("hidden", "logits"):
        error = np.abs(found[name].astype(np.float32) - arrays[name])
        assert 1e-4 < error.max() < 0.05 * np.abs(arrays[name]).max()


def loss_of(folder: Path = FIXTURES / "gemma2", **options):
    """A loss of the hidden states, and the parameters."""
    loaded, arrays = read_decoder(folder, head=True, **options), example_tokens("left")
    # Padding on the left sees nothing, like a row without tokens: gradients must be finite all the same.
    arrays["mask"][3] = False
    tokens = tokens_of(arrays)
    real = tokens.mask[:, :, None]

    def loss(params):
        return jnp.sum(jnp.where(real, jnp.sin(nnx.merge(loaded.graphdef, params)(tokens)), 0.0))

    return loss, loaded.params


def test_remat_does_not_change_the_gradient(tmp_path):
    folder = copy("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "layers.1" not in name}, folder / "model.safetensors")
    (kept, params), (again, _) = loss_of(folder), loss_of(folder, remat="dots_saveable")
    a, b = jax.jit(lambda params: (jax.grad(kept)(params), jax.grad(again)(params)))(params)
    for first, second in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(first).all()
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)
    assert max(np.abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(a)) > 0.1


def test_a_remat_policy_decides_what_is_kept():
    saved = {}
    for remat in (None, *REMAT):
        loss, params = loss_of(remat=remat)
        _, backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params), params)
        saved[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert saved["nothing_saveable"] < saved["dots_with_no_batch_dims_saveable"] <= saved["dots_saveable"] < saved[None]
    with pytest.raises(EncoderError, match="remat 'all' is not one of nothing_saveable"):
        read_decoder(FIXTURES / "gemma2", remat="all")


# --- placement


@needs_eight
@pytest.mark.parametrize("kind", ["llama"])
def test_eight_devices_equal_one_and_each_part_is_read_once(kind, monkeypatch):
    read, plain = [], Tensors.part
    monkeypatch.setattr(Tensors, "part", lambda self, name, index: read.append(name) or plain(self, name, index))
    mesh, arrays = make_mesh(data=2, fsdp=2, tensor=2), recorded(kind)
    loaded = read_decoder(FIXTURES / kind, head=True, mesh=mesh)
    out = loaded.params["layers"][1]["out"]["kernel"]
    assert out.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert {shard.data.shape for shard in out.addressable_shards} == {(out.shape[0] // 2, 8)}
    parts = [len(leaf.sharding.devices_indices_map(leaf.shape)) for leaf in jax.tree.leaves(loaded.params)]
    assert set(parts) == {8}
    distinct = [len({str(index) for index in leaf.sharding.devices_indices_map(leaf.shape).values()})
                for leaf in jax.tree.leaves(loaded.params)]  # fmt: skip
    assert len(read) == sum(distinct)
    put = partial(jax.device_put, device=batch_sharding(mesh))
    assert_equal(states(loaded, arrays, jax.jit(run, static_argnums=0), put), arrays)


# --- files


def test_a_checkpoint_in_two_files_of_bfloat16_reads_the_same(tmp_path):
    folder = copy("llama", tmp_path / "model")
    half = {name: value.astype(jnp.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    whole = jax.tree.leaves(read_decoder(folder, head=True).params)
    (folder / "model.safetensors").unlink()
    index = {}
    for part in (0, 1):
        shard = {name: half[name] for name in sorted(half)[part::2]}
        save_file(shard, folder / f"part-{part}.safetensors")
        index |= dict.fromkeys(shard, f"part-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for a, b in zip(whole, jax.tree.leaves(read_decoder(folder, head=True).params), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        ("llama", {"rope_theta": 77.0}),
        ("mistral", {"rope_theta": 77.0, "rope_scaling": None}),
        (
            "gemma3_text",
            {
                "rope_theta": 177.0,
                "rope_local_base_freq": 77.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_a_config_of_earlier_versions_reads_the_same(kind, old, tmp_path):
    folder = copy(kind, tmp_path / "model", rope_parameters=None, **old)
    assert DecoderConfig.read(folder) == DecoderConfig.read(FIXTURES / kind)


def test_weights_of_integers_and_damaged_files_are_errors(tmp_path):
    folder = copy("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int8)}, folder / "model.safetensors")
    with pytest.raises(EncoderError, match=r"norm\.weight is of I8; only F64, F32"):
        read_decoder(folder)
    (folder / "model.safetensors").write_bytes((FIXTURES / "llama" / "model.safetensors").read_bytes()[:900])
    with pytest.raises(EncoderError, match="not a readable safetensors file"):
        read_decoder(folder)


def copy(kind: str, folder: Path, **config) -> Path:
    """A copy of a tiny checkpoint with entries of its config.json changed."""
    shutil.copytree(FIXTURES / kind, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types names 'chunked_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ("qwen2", {"use_sliding_window": False}, "but there is no sliding_window"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is not an entry"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is an entry of gemma2"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters has unknown 'rope_theta'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not computed"),
        ("opt", {"num_attention_heads": 3}, "3 heads do not divide 16"),
        ("opt", {"layer_norm_elementwise_affine": False}, "which config.json does not announce"),
        ("llama", {"model_type": "falcon"}, "model_type 'falcon' is not one of llama"),
        ("llama", {"hidden_act": "swish2"}, "activation 'swish2' is not one of"),
        ("llama", {"attention_bias": "alibi"}, "attention_bias is 'alibi'"),
        ("llama", {"attention_bias": False}, "which config.json does not announce"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not one of default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' lacks 'factor'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "has unknown 'mrope_section'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not computed"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is not computed"),
        ("llama", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map is not computed"),
        ("llama", {"num_key_value_heads": 3}, "3 key-value heads"),
        ("llama", {"num_hidden_layers": 3}, "the weights lack layers.2"),
        ("llama", {"intermediate_size": 23}, "config.json says"),
        ("llama", {"layer_types": ["full_attention"] * 2}, "layer_types is not an entry"),
    ],
)
def test_a_config_that_is_not_computed_exactly_is_an_error(kind, config, message, tmp_path):
    with pytest.raises(EncoderError, match=message) as error:
        read_decoder(copy(kind, tmp_path / "model", **config))
    assert "\n" not in str(error.value)


def test_a_kernel_that_is_unknown_or_has_no_place_for_soft_caps_is_an_error():
    with pytest.raises(EncoderError, match="kernel 'flash' is not one of auto, cudnn, xla"):
        read_decoder(FIXTURES / "llama", kernel="flash")  # type: ignore[arg-type]
    with pytest.raises(EncoderError, match="gemma2: scores of attention are softly capped"):
        read_decoder(FIXTURES / "gemma2", kernel="cudnn")
