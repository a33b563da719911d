"""A text branch that reads a response whole and sentence by sentence."""

import numpy as np
import polars as pl
import pytest
from test_attributes_cli import letters

from pluralprefs.attributes import reading
from pluralprefs.attributes.reading import SentenceEncoder
from pluralprefs.attributes.sentences import sentences
from pluralprefs.encoders.cache import encode_items
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.models.layers import ridge
from pluralprefs.types import Item

PHRASES = ["Rest a day.", "Then run!", "See a doctor?", "Nobody knows.", "Thank you so much.", "Buy better shoes."]


class Toy:
    dim = 27
    identity = {"encoder": "letters"}  # noqa: RUF012


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.setattr(reading, "encode_texts", lambda base, texts, **_: letters(list(texts)))
    return SentenceEncoder(Toy(), anchors=6, width=0.4)


def table(count=40, seed=0):
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(PHRASES, draw.integers(1, 5), replace=False)) for _ in range(count)]
    return pl.DataFrame({"prompt": "p", "text": texts, "item_key": [f"p/{n}" for n in range(count)]})


def test_it_reads_the_whole_text_and_the_mean_over_its_sentences(encoder):
    items = table()
    fitted = encoder.fit(items, items["item_key"][:30])
    found = np.asarray(encode_items(items, fitted).embedding)
    assert found.shape == (40, fitted.dim)
    np.testing.assert_array_equal(found[:, :27], letters(items["text"].to_list()))
    turned = items.with_columns(text=pl.Series([" ".join(sentences(text)[::-1]) for text in items["text"]]))
    np.testing.assert_allclose(fitted(turned).embedding[:, 27:], found[:, 27:], atol=1e-5)
    wit = np.array([np.mean([part == "Then run!" for part in sentences(text)]) for text in items["text"]])
    kernel, bias = ridge(found[:30], wit[:30, None])
    np.testing.assert_allclose(found[30:] @ kernel[:, 0] + bias, wit[30:], atol=0.05)


def test_anchors_are_sentences_of_training_items(encoder):
    items = table()
    other = items.with_columns(text=pl.when(pl.col("item_key") == "p/39").then(pl.lit("Xyz.")).otherwise("text"))
    known = items["item_key"][:39]
    one, two = (encoder.fit(rows, known).maps for rows in (items, other))
    np.testing.assert_array_equal(one.anchors, two.anchors)


def test_a_kernel_is_kept_beside_the_run_and_needed(encoder, tmp_path):
    items = table()
    with pytest.raises(EncoderError, match="no anchors yet"):
        encoder(items)
    fitted = encoder.fit(items, items["item_key"])
    fitted.save(tmp_path / "kernel.safetensors")
    again = encoder.restore(tmp_path / "kernel.safetensors")
    assert isinstance(again(items), Item)
    np.testing.assert_array_equal(again(items).embedding, fitted(items).embedding)


def test_ridge_finds_what_is_there_and_nothing_in_noise():
    draw = np.random.default_rng(0)
    x, noise = draw.normal(size=(300, 8)) + 3.0, draw.normal(size=300)
    weights = draw.normal(size=8)
    kernel, bias = ridge(x, np.stack([x @ weights - 1.0, noise], 1))
    np.testing.assert_allclose(kernel[:, 0], weights, atol=1e-4)
    assert bias[0] == pytest.approx(-1.0, abs=1e-3)
    assert np.abs(kernel[:, 1]).max() < 0.15
    for rows in (1, 3):  # fewer rows than columns, and a single one
        kernel, bias = ridge(x[:rows], noise[:rows, None])
        assert np.isfinite(kernel).all()
        assert np.isfinite(bias).all()
