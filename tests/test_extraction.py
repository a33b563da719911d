"""Encoding many files: tasks share the work, and nothing but the texts decides what is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from pluralprefs import extraction
from pluralprefs.cli import app
from pluralprefs.data import comparisons
from pluralprefs.data.batches import item_table
from pluralprefs.encoders import cache
from pluralprefs.encoders.bert import BertEncoder
from pluralprefs.encoders.cache import encode_items
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.extraction import SUCCESS, Task, encode_files

FOLDER = Path(__file__).parent / "fixtures" / "bert" / "bert"


@pytest.fixture(scope="module")
def encoder() -> BertEncoder:
    return BertEncoder.load(FOLDER, max_length=16, prompt=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two files that share texts; short ones, so that one program is compiled."""
    folder = tmp_path_factory.mktemp("rows")
    word = "abcdefgh"
    rows = [
        {"prompt": f"{word[i % 3]} ?", "chosen": f"tea {word[i % 8]}", "rejected": f"{word[i % 5]} {word[i // 8]}"}
        for i in range(24)
    ]
    found = [folder / "a.jsonl", folder / "b.jsonl"]
    for path, part in zip(found, (rows[:14], rows[10:]), strict=True):
        path.write_text("\n".join(map(json.dumps, part)))
    return found


@pytest.fixture(scope="module")
def whole(encoder, files, tmp_path_factory) -> Path:
    """What one task writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert encode_files(encoder, files, folder, shards=5)
    return folder


@pytest.fixture
def mine(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_tasks_write_what_one_would_bit_for_bit(encoder, files, whole, tmp_path):
    assert not encode_files(encoder, files[::-1], tmp_path, shards=5, task=Task(1, 2))
    assert not (tmp_path / SUCCESS).exists()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
    assert encode_files(encoder, files, tmp_path, shards=5, task=Task(0, 2))
    assert contents(tmp_path) == contents(whole)


def test_success_counts_unique_texts_and_hashes_every_shard(files, whole):
    said = json.loads((whole / SUCCESS).read_text())
    tables = [item_table(comparisons.read(path)) for path in files]
    texts = {text for table in tables for text in table["text"]}
    prompts = {text for table in tables for text in table["prompt"]}
    assert said["texts"] == len(texts) + len(prompts) == sum(shard["texts"] for shard in said["shards"])
    assert len({shard["hash"] for shard in said["shards"]}) == 5
    assert all((whole / shard["file"]).is_file() for shard in said["shards"])


def test_a_run_reads_the_folder_as_its_cache_and_encodes_nothing(encoder, files, mine, monkeypatch):
    items = item_table(comparisons.read(files[0]))
    alone = encode_items(items, encoder, cache=False)
    monkeypatch.setattr(cache, "_features", None)  # a call would fail
    monkeypatch.setenv("PLURALPREFS_CACHE", str(mine))
    found = encode_items(items, encoder)
    np.testing.assert_allclose(found.embedding, alone.embedding, atol=2e-6)
    np.testing.assert_allclose(found.prompt, alone.prompt, atol=2e-6)


def test_a_task_that_was_stopped_goes_on_and_does_nothing_twice(encoder, files, whole, tmp_path, monkeypatch):
    done, plain = [], extraction._encode

    def stopped(store, name, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        plain(store, name, *rest)

    monkeypatch.setattr(extraction, "_encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode_files(encoder, files, tmp_path, shards=5)
    assert not (tmp_path / SUCCESS).exists()
    again = []
    monkeypatch.setattr(
        extraction, "_encode", lambda store, name, *rest: (again.append(name), plain(store, name, *rest))
    )
    assert encode_files(encoder, files, tmp_path, shards=5)
    assert sorted(done + again) == [f"shard-{number:05d}-of-00005" for number in range(5)]
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_shard_is_found_by_its_hash_and_encoded_again(encoder, files, whole, mine, damage):
    path = sorted(mine.glob("*/*.safetensors"))[3]
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-40])
    said: list[str] = []
    assert encode_files(encoder, files, mine, shards=5, tell=said.append)
    assert len([line for line in said if "damaged" in line and path.name in line]) == 1
    assert len([line for line in said if "there before" in line]) == 4
    assert contents(mine) == contents(whole)


def test_a_damaged_shard_of_another_task_is_no_success(encoder, files, mine):
    path = sorted(mine.glob("*/*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:40])
    (mine / SUCCESS).unlink()
    with pytest.raises(EncoderError, match=r"damaged .* run the task of shard 1 again"):
        encode_files(encoder, files, mine, shards=5, task=Task(0, 2))
    assert not (mine / SUCCESS).exists()


def test_a_folder_of_another_encoder_of_other_texts_or_shards_is_refused(encoder, files, mine):
    before = contents(mine)
    with pytest.raises(EncoderError, match="features of another encoder"):
        encode_files(BertEncoder.load(FOLDER, max_length=14), files, mine, shards=5)
    with pytest.raises(EncoderError, match="is of other texts"):
        encode_files(encoder, files[:1], mine, shards=5)
    with pytest.raises(EncoderError, match="but 4 shards are asked for"):
        encode_files(encoder, files, mine, shards=4)
    assert contents(mine) == before


def test_the_command_encodes_and_says_who_is_missing(files, tmp_path):
    command = ["encode", *map(str, files), "--encoder", str(FOLDER), "--max-length", "16", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, [*command, "--shards", "2", "--task", "0/2"])
    assert first.exit_code == 0, first.output
    assert "shards of other tasks are missing yet" in first.output
    second = CliRunner().invoke(app, [*command, "--shards", "2", "--task", "1/2"])
    assert re.search(r"_SUCCESS: all shards are there", second.output.replace("\n", " "))
    assert pl.Series([path.name for path in tmp_path.glob("*/*.safetensors")]).n_unique() == 2


@pytest.mark.parametrize("task", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_task_that_cannot_be_is_an_error(task):
    with pytest.raises(ValueError, match="give I/N with I from 0"):
        Task.read(task)
