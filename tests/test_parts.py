"""Comparisons in many files: one table, of which each process reads its own files and makes what others need."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from processes import as_processes
from tables import letters, tiny_llama

from pluralprefs import baselines, encoders, hosts
from pluralprefs.data import comparisons, parts
from pluralprefs.data.batches import index_rows, item_table, vocabulary
from pluralprefs.data.comparisons import DataError
from pluralprefs.data.parts import read_parts
from pluralprefs.encoders.cache import encode_items, encode_together, fetch_texts, require_texts
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.experiment import fingerprint
from pluralprefs.token_batches import PackedBatches, TokenBatches
from pluralprefs.types import Item

TEXTS = ("prompt", "first", "second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty comparisons in one file and in three, of which the last repeats a judgement of the first."""
    path = tmp_path_factory.mktemp("parts")
    letters(path / "rows.jsonl")
    lines = (path / "rows.jsonl").read_text("utf8").splitlines()
    lines.append(lines[3])
    (path / "rows.jsonl").write_text("\n".join(lines), "utf8")
    for number, some in enumerate((lines[:25], lines[25:26], lines[26:])):
        (path / f"part-{number}.jsonl").write_text("\n".join(some), "utf8")
    tiny_llama(path / "llama")
    return path


@pytest.fixture(scope="module")
def whole(folder):
    return comparisons.read(folder / "rows.jsonl")


def say(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), "utf8")
    return path


def row(**fields) -> dict:
    return {"prompt": "tea?", "first": "a", "second": "b", "target": 1.0} | fields


def test_files_read_in_parts_are_the_table_of_one_file_with_all_rows(folder, whole):
    pattern = read_parts(str(folder / "part-*.jsonl"))
    assert pattern.equals(whole)
    assert read_parts([folder / f"part-{number}.jsonl" for number in range(3)]).equals(whole)
    assert fingerprint(pattern) == fingerprint(whole)
    assert pattern["example_id"].n_unique() == 61  # a judgement that is there twice has two ids


@pytest.mark.parametrize("count", [2, 5])
def test_each_process_opens_its_own_files_and_knows_all_but_the_texts_of_others(count, folder, whole, monkeypatch):
    opened: list[str] = []
    plain = comparisons.read
    monkeypatch.setattr(parts, "read", lambda path, **options: opened.append(path.name) or plain(path, **options))
    found = as_processes(count, lambda _: read_parts(str(folder / "part-*.jsonl")), monkeypatch)
    assert sorted(opened) == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]  # once each, of all processes
    for table in found:
        assert table.drop(TEXTS).equals(whole.drop(TEXTS))
        assert table.schema == whole.schema
    for text in TEXTS:
        known = np.stack([table[text].is_not_null().to_numpy() for table in found])
        assert (known.sum(axis=0) == 1).all()
        for table, rows in zip(found, known, strict=True):
            assert table[text].drop_nulls().to_list() == whole[text].filter(rows).to_list()
    expected = {2: [[0, 2], [1]], 5: [[0], [1], [2], [], []]}[count]
    sizes = [25, 1, 35]
    assert [table["first"].is_not_null().sum() for table in found] == [sum(sizes[i] for i in own) for own in expected]


def test_what_is_made_of_texts_is_what_one_process_makes(folder, whole, monkeypatch):
    encoder = encoders.load(folder / "llama", max_length=16, prompt=True)
    table = whole.with_columns(fold=pl.lit("train"))
    items = item_table(table)
    rows = index_rows(table, items, vocabulary(table))
    beside = Item(embedding=None, index=np.arange(items.height))
    asked = {
        kind: partial(kind.render, encoder, items=beside, rows=rows, budget=256, seed=3)
        for kind in (TokenBatches, PackedBatches)
    }
    alone = {
        kind: [make(table=items).batch(*one) for one in make(table=items).epoch(0)] for kind, make in asked.items()
    }
    features = encode_items(items, encoder, cache=False, progress=False)
    read: list[list[int]] = [[], []]

    def work(process: int):
        mine = read_parts(str(folder / "part-*.jsonl")).with_columns(fold=pl.lit("train"))
        own = item_table(mine)
        assert own.drop("prompt", "text").equals(items.drop("prompt", "text"))
        batches = {}
        for kind, make in asked.items():
            made = make(table=own)
            read[process].append(len(made.responses.held))
            assert len(made.responses.held) < items.height
            batches[kind] = [made.batch(*one) for one in made.epoch(0)]
        few = fetch_texts(own, np.array([0, 5, 7]))
        return {
            "fingerprint": fingerprint(mine),
            "length": baselines.length_only(mine, mine),
            "artefacts": baselines.artefact_log_odds(mine, mine),
            "features": encode_together(own, encoder, cache=False, progress=False),
            "texts": few["text"][[0, 5, 7]].to_list(),
            "batches": batches,
        }

    found = as_processes(2, work, monkeypatch)
    for each in found:
        assert not isinstance(each, Exception), each
        assert each["fingerprint"] == fingerprint(table)
        np.testing.assert_array_equal(each["length"], baselines.length_only(whole, whole))
        np.testing.assert_array_equal(each["artefacts"], baselines.artefact_log_odds(whole, whole))
        assert each["texts"] == items["text"][[0, 5, 7]].to_list()
        np.testing.assert_allclose(each["features"].embedding, features.embedding, atol=1e-6)
        np.testing.assert_allclose(each["features"].prompt, features.prompt, atol=1e-6)
        for kind, batches in each["batches"].items():
            jax.tree.map(np.testing.assert_array_equal, batches, alone[kind])
    np.testing.assert_array_equal(found[0]["features"].embedding, found[1]["features"].embedding)
    assert read[0][0] + read[1][0] == len(np.unique([rows.first, rows.second]))  # each text is read once


def test_sentences_need_all_texts_on_every_process(folder, whole, monkeypatch):
    def work(process: int):
        require_texts(item_table(whole), "all texts")
        require_texts(item_table(read_parts(str(folder / "part-*.jsonl"))), "all texts")

    assert [type(found) for found in as_processes(2, work, monkeypatch)] == [EncoderError] * 2


MISTAKES = {
    "missing": ([], "absent-.*no such files; check the pattern"),
    "text": ([row(first_id="x", second_id="y"), row(first="c", first_id="x", second_id="y")],
             r"b.jsonl: response 'x' of prompt .* is another text than in .*a.jsonl"),
    "example": ([row(example_id="1"), row(first="c", example_id="1")], r"b.jsonl: example_id '1' stands in"),
    "messages": ([row(), row(prompt=[{"role": "user", "content": "tea?"}])],
                 "b.jsonl: column 'prompt' holds message lists, and .*a.jsonl has texts there"),
    "type": ([row(note=1), row(note=[1])], "a column has one type here and another there"),
    "row": ([row(), row(target=3)], "b.jsonl: row 1, column 'target'"),
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_wrong_in_one_file_is_an_error_on_every_process(mistake, processes, tmp_path, monkeypatch):
    rows, message = MISTAKES[mistake]
    for name, one in zip("ab", rows, strict=False):
        say(tmp_path / f"{name}.jsonl", one)
    files = str(tmp_path / ("*.jsonl" if rows else "absent-*"))
    if processes == 1:
        with pytest.raises(DataError, match=message):
            read_parts(files)
        return
    for error in as_processes(processes, lambda _: read_parts(files), monkeypatch):
        assert isinstance(error, DataError)
        with pytest.raises(DataError, match=message):
            raise error


def test_processes_that_are_given_different_files_are_told_so(tmp_path, monkeypatch):
    files = [say(tmp_path / f"{name}.jsonl", row()) for name in "ab"]
    with pytest.raises(DataError, match=r"a.jsonl: is given twice"):
        read_parts([files[0], files[0]])
    with pytest.raises(DataError, match=r"no files of comparisons are given"):
        read_parts([])
    found = as_processes(2, lambda process: read_parts(files[: process + 1]), monkeypatch)
    assert ["find different files (1, 2 of them)" in str(error) for error in found] == [True, True]


def test_rows_are_divided_among_those_who_know_them_and_sent_in_slabs(monkeypatch):
    known = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    assert hosts.workers(known).tolist() == [0, 1, 0, 0, 1, 2]
    assert hosts.workers(np.ones((3, 7), bool)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    monkeypatch.setattr(hosts, "SLAB", 16)
    values = np.random.default_rng(0).normal(size=(6, 5))
    found = as_processes(3, lambda p: hosts.divided(known[p], lambda own: values[own]), monkeypatch)
    for each in found:
        np.testing.assert_array_equal(each, values)
    said = [b"x" * size for size in (0, 47, 16)]
    assert as_processes(3, lambda p: hosts.exchanged(said[p]), monkeypatch) == [said] * 3
    assert as_processes(2, lambda p: hosts.exchanged(b""), monkeypatch) == [[b"", b""]] * 2
