"""A decoder as an encoder: the last real token, texts in one form, the feature cache, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from record_decoders import FIXTURES, VOCABULARY, WORDS, example_tokens, save_tokenizer

from pluralprefs import encoders
from pluralprefs.encoders.cache import encode_items, encode_texts
from pluralprefs.encoders.causal import CausalEncoder
from pluralprefs.encoders.tokens import Renderer, Text
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.types import Tokens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
encode = jax.jit(lambda encoder, tokens: encoder(tokens).embedding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer."""
    path = tmp_path_factory.mktemp("causal") / "llama"
    shutil.copytree(FIXTURES / "llama", path)
    save_tokenizer(path)
    return path


def words_of(encoder: CausalEncoder, text: Text) -> str:
    return " ".join(encoder.renderer.tokenizer.convert_ids_to_tokens(encoder.renderer([text])[0].ids))


def test_an_embedding_is_the_state_of_the_last_real_token_on_either_side_of_padding(folder):
    encoder, arrays = encoders.load(folder, max_length=16), np.load(FIXTURES / "llama.npz")
    expected = arrays["hidden"][np.arange(5), arrays["mask"].sum(1) - 1]
    for side in ("right", "left"):
        found = example_tokens(side)
        ids, mask = jnp.asarray(found["ids"]), jnp.asarray(found["mask"])
        tokens = Tokens(ids, mask, jnp.zeros_like(ids), jnp.zeros(5, jnp.int32))
        np.testing.assert_allclose(encode(encoder, tokens), expected, atol=1e-4)


def test_texts_are_encoded_alike_in_any_batch_and_kept(folder, tmp_path):
    encoder = CausalEncoder.load(folder, max_length=16)
    texts = [f"{word} tea" for word in ("a", "b c", "d e f or", "g", "a")]
    features = encode_texts(encoder, texts, cache=tmp_path, batch_tokens=64)
    alone = encode_texts(encoder, texts[1:2], cache=False, batch_tokens=64)
    np.testing.assert_allclose(features[1], alone[0], atol=1e-5)
    assert (features[0] == features[4]).all()
    broken = encoder.replace(params=jax.tree.map(jnp.zeros_like, encoder.params))
    np.testing.assert_array_equal(encode_texts(broken, texts, cache=tmp_path), features)
    items = pl.DataFrame({"item_id": ["0"], "prompt": ["tea ?"], "text": ["good"]})
    joint = encode_items(items, encoder.replace(joint=True, prompt=True), cache=False)
    assert joint.prompt is not None
    assert joint.prompt.shape == joint.embedding.shape == (1, 16)


def test_prompt_and_response_are_one_sequence_with_one_opening_token(folder):
    encoder = CausalEncoder.load(folder, max_length=8)
    assert words_of(encoder, Text("tea ?", "good")) == "<s> tea ? \n good"
    assert encoder.renderer([Text("tea ?", "good")])[0].segment == [0] * 5
    assert encoder.renderer([Text("tea ?", "good")])[0].prompt_end == 2
    assert words_of(encoder, Text("a b c d e f", "tea good")) == "<s> c d e f \n tea good"
    assert words_of(encoder, Text(None, "tea")) == "<s> tea"


def test_a_chat_template_is_applied_once_with_one_opening_token(folder, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    save_tokenizer(chat, chat_template=TEMPLATE)
    encoder = CausalEncoder.load(chat, max_length=32)
    assert words_of(encoder, Text("tea ?", "good")) == "<s> user : tea ? </s> assistant : good </s>"
    assert words_of(encoder, Text("tea ?", None)) == "<s> user : tea ? </s> assistant :"
    assert encoder.identity["template"] is True
    assert encoder.identity["date"] == "2024-07-26"


DATED = """  {% if true %}
On {% endif %}
{% if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
  {% if true %}
{{ date_string }} {{ strftime_now("%Y-%m-%d %-d %B") }}
  {% endif %}
"""


@pytest.mark.parametrize("shown", [DATED, DATED.replace("date_string", "day")])
def test_a_template_prints_one_date_on_every_day(shown, folder, tmp_path, monkeypatch):
    from transformers.utils import chat_template_utils

    path = tmp_path / "dated"
    shutil.copytree(folder, path)
    save_tokenizer(path, chat_template=shown + TEMPLATE)
    renderer = Renderer.load(path, max_length=32, joined=True)
    found = [renderer._conversation(Text("tea ?", "good"))]
    monkeypatch.setattr(chat_template_utils, "datetime", None)  # where its clock is
    found.append(renderer._conversation(Text("tea ?", "good")))
    assert found[0] == found[1]
    assert found[0][0].startswith("On 26 Jul 2024 2024-07-26 26 July\n<s> user : tea ?")
    assert renderer.identity["date"] == "2024-07-26"
    assert "date" not in Renderer.load(folder, joined=True).identity


def test_a_token_that_only_the_tokenizer_knows_is_refused_in_a_text_and_named(folder, tmp_path):
    """Gemma 3's tokenizer has one special token, for images, that its text model lacks."""
    path = tmp_path / "surplus"
    shutil.copytree(folder, path)
    words = [*WORDS, *(f"word {at}" for at in range(len(WORDS), VOCABULARY))]
    save_tokenizer(path, words, additional_special_tokens=["<image_soft_token>"])
    encoder = encoders.load(path, max_length=16)
    assert len(encoder.renderer.tokenizer) == VOCABULARY + 1
    assert words_of(encoder, Text("tea ?", "good")) == "<s> tea ? \n good"
    with pytest.raises(EncoderError, match="'<image_soft_token>' \\(id 48\\), but the model knows 48 tokens"):
        encoder.renderer([Text("tea", "good"), Text("tea", "good <image_soft_token> tea")])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            {"model_type": "mamba"},
            {},
            "model_type 'mamba' is not one of bert, roberta, xlm-roberta, distilbert, modernbert, llama",
        ),
        ({}, {"pooling": "cls"}, "pooling 'cls' is not computed here; give pooling='last' or 'mean'"),
        ({}, {"max_length": 65}, "max_length 65 exceeds the model's 64 positions"),
        ({"vocab_size": 9}, {}, r"embed_tokens.* is \(48, 16\), config.json says \(9, 16\)"),
    ],
)
def test_what_an_encoder_cannot_do_is_an_error(config, options, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw | config))
    with pytest.raises(EncoderError, match=message) as error:
        encoders.load(tmp_path / "model", **options)
    assert "\n" not in str(error.value)
