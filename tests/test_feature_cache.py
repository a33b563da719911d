"""The feature cache: unique texts once, resumable after a kill, sound after damage."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pluralprefs.encoders import cache
from pluralprefs.encoders.bert import BertEncoder
from pluralprefs.encoders.cache import Shards, encode_items, encode_texts
from pluralprefs.encoders.tokens import BUCKETS, Text
from pluralprefs.encoders.weights import EncoderError

FOLDER = Path(__file__).parent / "fixtures" / "bert" / "bert"
TEXTS = [" ".join("abcdefgh"[: 1 + row % 8]) + " tea" * (row // 8) for row in range(40)]


@pytest.fixture(scope="module")
def encoder() -> BertEncoder:
    return BertEncoder.load(FOLDER, max_length=48)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the batches that reach the encoder."""
    seen = []
    features = cache._features

    def counted(encoder, tokens):
        seen.append(tokens.ids.shape)
        return features(encoder, tokens)

    monkeypatch.setattr(cache, "_features", counted)
    return seen


def one_by_one(encoder: BertEncoder, texts: list[str]) -> np.ndarray:
    return np.concatenate([encode_texts(encoder, [text], cache=False, batch_tokens=16) for text in texts])


def test_features_are_those_of_each_text_alone_in_the_order_given(encoder, tmp_path):
    features = encode_texts(encoder, TEXTS, cache=tmp_path, batch_tokens=96)
    assert isinstance(features, np.memmap)
    assert features.dtype == np.float32
    assert not features.flags.writeable
    np.testing.assert_allclose(features, one_by_one(encoder, TEXTS), atol=2e-6)
    backwards = encode_texts(encoder, TEXTS[::-1], cache=tmp_path)
    np.testing.assert_array_equal(backwards, features[::-1])


def test_a_text_is_encoded_once_however_often_it_occurs(encoder, tmp_path, calls):
    features = encode_texts(encoder, ["tea", "coffee", "tea", "tea"], cache=tmp_path, batch_tokens=16)
    assert calls == [(1, 16), (1, 16)]
    np.testing.assert_array_equal(features[0], features[2])
    encode_texts(encoder, ["coffee", "a", "tea"], cache=tmp_path, batch_tokens=16)
    assert len(calls) == 3


def test_every_length_has_one_batch_shape(encoder, calls):
    encode_texts(encoder, TEXTS, cache=False, batch_tokens=128)
    assert len(set(calls)) == len({length for _, length in calls}) <= len(BUCKETS)
    assert all(batch * length <= 128 for batch, length in calls)


def test_no_text_is_no_work(encoder, tmp_path, calls):
    assert encode_texts(encoder, [], cache=tmp_path).shape == (0, encoder.dim)
    assert calls == []


def test_prompt_and_response_are_kept_apart(encoder, tmp_path):
    texts = [Text("tea", "coffee"), Text(None, "coffee"), Text("tea", None), Text("coffee", "tea")]
    assert len({cache.text_key(text) for text in texts}) == 4
    features = encode_texts(encoder, texts, cache=tmp_path)
    assert len(np.unique(features, axis=0)) == 4


@pytest.mark.parametrize("change", [{"pooling": "cls"}, {"normalise": True}, {"max_length": 32}, {"dtype": "bfloat16"}])
def test_an_encoder_that_differs_in_anything_has_a_folder_of_its_own(encoder, change, tmp_path):
    other = BertEncoder.load(FOLDER, **{"max_length": 48} | change)
    folders = {Shards.open(tmp_path, each).folder for each in (encoder, other)}
    assert len(folders) == 2


def test_work_done_before_an_exception_is_not_done_again(encoder, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(cache, "SHARD_ROWS", 4)
    counted = cache._features

    def interrupted(encoder, tokens):
        if len(calls) == 6:
            raise KeyboardInterrupt
        return counted(encoder, tokens)

    monkeypatch.setattr(cache, "_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(encoder, TEXTS, cache=tmp_path, batch_tokens=48)
    kept = len(list(tmp_path.glob("*/*.safetensors")))
    assert kept >= 1
    monkeypatch.setattr(cache, "_features", counted)
    before = len(calls)
    features = encode_texts(encoder, TEXTS, cache=tmp_path, batch_tokens=48)
    resumed = len(calls) - before
    calls.clear()
    encode_texts(encoder, TEXTS, cache=False, batch_tokens=48)
    assert resumed < len(calls)
    np.testing.assert_allclose(features, one_by_one(encoder, TEXTS), atol=2e-6)


def test_a_killed_process_leaves_whole_shards_that_the_next_one_uses(encoder, tmp_path, calls):
    program = f"""
        import time
        from pluralprefs.encoders import cache
        from pluralprefs.encoders.bert import BertEncoder
        from tests_texts import TEXTS

        cache.SHARD_ROWS = 4
        features = cache._features
        cache._features = lambda *args: (time.sleep(0.3), features(*args))[1]
        encoder = BertEncoder.load({str(FOLDER)!r}, max_length=48)
        cache.encode_texts(encoder, TEXTS, cache={str(tmp_path / "c")!r}, batch_tokens=48)
    """
    (tmp_path / "tests_texts.py").write_text(f"TEXTS = {TEXTS!r}")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("c/*/*.safetensors"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    kept = Shards.open(tmp_path / "c", encoder).read({cache.text_key(Text(None, text)) for text in TEXTS})
    rows = sum(len(keys) for keys, _ in kept)
    assert 8 <= rows < len(TEXTS)
    features = encode_texts(encoder, TEXTS, cache=tmp_path / "c", batch_tokens=16)
    assert sum(batch for batch, _ in calls) == len(TEXTS) - rows
    np.testing.assert_allclose(features, one_by_one(encoder, TEXTS), atol=2e-6)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_shard_is_encoded_again_with_a_warning(encoder, tmp_path, damage, calls):
    features = np.array(encode_texts(encoder, TEXTS, cache=tmp_path))
    (path,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes({"truncated": content[:-40], "flipped": content, "empty": b""}[damage])
    calls.clear()
    with pytest.warns(UserWarning, match="damaged"):
        again = encode_texts(encoder, TEXTS, cache=tmp_path)
    assert calls
    np.testing.assert_allclose(again, features, atol=1e-6)
    calls.clear()
    encode_texts(encoder, TEXTS, cache=tmp_path)
    assert calls == []


@pytest.mark.slow
def test_two_processes_share_a_cache(encoder, tmp_path):
    program = f"""
        import sys
        from pluralprefs.encoders import cache
        from pluralprefs.encoders.bert import BertEncoder

        cache.SHARD_ROWS = 2
        encoder = BertEncoder.load({str(FOLDER)!r}, max_length=48)
        cache.encode_texts(encoder, {TEXTS!r}[int(sys.argv[1]) :], cache={str(tmp_path)!r}, batch_tokens=48)
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(program)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    running = [subprocess.Popen([*command, start], env=env) for start in ("0", "8")]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    assert not list(tmp_path.glob("*/.*"))
    np.testing.assert_allclose(encode_texts(encoder, TEXTS, cache=tmp_path), one_by_one(encoder, TEXTS), atol=2e-6)


def test_values_that_are_not_finite_never_enter_the_cache(encoder, tmp_path):
    import jax

    broken = encoder.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, encoder.params))
    with pytest.raises(EncoderError, match="not finite"):
        encode_texts(broken, ["tea"], cache=tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_the_default_folder_follows_the_environment(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("PLURALPREFS_CACHE", str(tmp_path / "features"))
    encode_texts(encoder, ["tea"])
    assert list((tmp_path / "features").glob("*/*.safetensors"))


def test_the_progress_bar_is_shown_where_asked_and_only_there(encoder, capsys):
    encode_texts(encoder, ["tea", "coffee"], cache=False)
    assert capsys.readouterr().err == ""
    encode_texts(encoder, ["tea", "coffee"], cache=False, progress="always")
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("joint", [False, True])
def test_items_carry_the_response_or_both_and_a_prompt_where_asked(joint, tmp_path):
    encoder = BertEncoder.load(FOLDER, max_length=48, joint=joint, prompt=True)
    chat = pl.Series("prompt", [[{"role": "user", "content": "tea ?"}], [{"role": "user", "content": "coffee ?"}]])
    items = pl.DataFrame({"item_key": [0, 1], "item_id": ["x", "y"], "text": ["good", "good"]}).with_columns(chat)
    item = encode_items(items, encoder, cache=tmp_path)
    plain = encode_items(items.with_columns(prompt=pl.Series(["tea ?", "coffee ?"])), encoder, cache=tmp_path)
    np.testing.assert_allclose(item.embedding, plain.embedding, atol=1e-6)
    np.testing.assert_allclose(item.prompt, one_by_one(encoder, ["tea ?", "coffee ?"]), atol=2e-6)
    assert np.array_equal(item.embedding[0], item.embedding[1]) is not joint


def test_a_prompt_is_encoded_only_where_asked(encoder, tmp_path):
    items = pl.DataFrame({"item_key": [0], "item_id": ["x"], "prompt": ["tea ?"], "text": ["good"]})
    assert encode_items(items, encoder, cache=tmp_path).prompt is None
