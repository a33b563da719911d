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

from pluralprefs import baselines, encoders, experiment, hosts, launch
from pluralprefs.attributes.reading import SentenceEncoder
from pluralprefs.attributes.source import Predicted
from pluralprefs.data import comparisons, parts
from pluralprefs.data.batches import index_rows, item_table, vocabulary
from pluralprefs.data.comparisons import DataError
from pluralprefs.data.parts import read_parts
from pluralprefs.encoders.cache import encode_items, encode_together, fetch_texts
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.experiment import FAMILIES, Experiment, fingerprint, prepare, require_same_rows
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
    rows = index_rows(table[:40], items, vocabulary(table))  # some items are of no row
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


class Counts:
    """An attribute source of a user's own, which reads texts."""

    names = ("length",)

    def attributes(self, items: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(text) for text in items["text"].to_list()], np.float32)
        return lengths[:, None, None], np.ones((items.height, 1), bool)

    def save(self, folder: Path, /) -> None: ...


def some_experiment(folder: Path, **options) -> Experiment:
    data, encoder = partial(read_parts, str(folder / "part-*.jsonl")), partial(encoders.load, folder / "llama")
    shared = {"data": data, "encoder": encoder, "features": {"log_length": True}}
    return Experiment(**FAMILIES["individual"] | shared | options)


def test_an_experiment_is_prepared_in_parts_as_it_is_whole(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PLURALPREFS_CACHE", str(tmp_path))
    wanted = prepare(some_experiment(folder), progress=False)
    for found in as_processes(2, lambda _: prepare(some_experiment(folder), progress=False), monkeypatch):
        assert not isinstance(found, Exception), found
        np.testing.assert_allclose(found.features.embedding, wanted.features.embedding, atol=1e-5)
        assert found.features.embedding.shape[1] > found.encoder.dim  # the lengths, too


@pytest.mark.parametrize("reader", ["source", "sentences"])
def test_what_needs_all_texts_on_every_process_says_so(reader, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PLURALPREFS_CACHE", str(tmp_path))
    own = {"source": {"attributes": Counts},
           "sentences": {"encoder": partial(SentenceEncoder.load, folder / "llama", anchors=4)}}  # fmt: skip
    asked = some_experiment(folder, **own[reader])
    prepare(asked, progress=False)  # one process has them
    for found in as_processes(2, lambda _: prepare(asked, progress=False), monkeypatch):
        assert isinstance(found, EncoderError)
        assert "have to be known to each process" in str(found)


def test_predicted_attributes_are_divided(folder, whole, monkeypatch):
    read: list[int] = []

    class Few:
        names, width = ("one", "two"), 2

        def read(self, texts, embed):
            read.append(len(texts))
            return np.array([[len(text), text.count("a")] for text in texts], np.float32)

        def embeddings(self, features):
            return np.stack([features, -features], axis=1)

    items = item_table(whole)
    source = Predicted(Few(), embed=np.asarray)
    wanted = experiment._attached(source, items, Item(embedding=None))

    def work(_: int) -> Item:
        mine = item_table(read_parts(str(folder / "part-*.jsonl")))
        return experiment._attached(source, mine, Item(embedding=None))

    for found in as_processes(2, work, monkeypatch):
        np.testing.assert_array_equal(found.attributes, wanted.attributes)
        assert found.attribute_mask.all()
    assert read[0] == items.height == read[1] + read[2]


CHANGES = {
    "targets": lambda table: table.with_columns(target=1 - pl.col("target")),
    "a text": lambda table: table.with_columns(
        first=pl.when(pl.int_range(pl.len()) == 3).then(pl.lit("z")).otherwise("first")
    ),
    "rows": lambda table: table.head(50),
    "columns": lambda table: table.with_columns(more=pl.lit(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_processes_with_different_data_are_told_so_before_they_compute_anything(change, whole, monkeypatch):
    def work(process: int) -> None:
        require_same_rows(CHANGES[change](whole) if process else whole)

    for found in as_processes(2, work, monkeypatch):
        assert isinstance(found, ValueError)
        assert "different data or experiments" in str(found)


def test_processes_with_the_same_rows_may_have_other_texts_of_them(folder, whole, monkeypatch):
    pattern = str(folder / "part-*.jsonl")
    assert as_processes(2, lambda _: require_same_rows(whole), monkeypatch) == [None, None]
    assert as_processes(2, lambda _: require_same_rows(read_parts(pattern)), monkeypatch) == [None, None]
    uneven = as_processes(2, lambda process: hosts.own_rows(np.ones(3 + process, bool)), monkeypatch)
    assert [type(found) for found in uneven] == [ValueError, ValueError]


def test_a_process_that_fails_by_itself_stops_all(folder, monkeypatch):
    pattern = str(folder / "part-0.jsonl")  # of which the second process reads nothing
    found = as_processes(2, lambda _: read_parts(pattern, promt="x"), monkeypatch)
    assert [type(error) for error in found] == [TypeError, DataError]
    assert "promt" in str(found[1])

    def odd(own: np.ndarray) -> np.ndarray:
        if 0 in own:
            raise ZeroDivisionError("by nothing")
        return own

    found = as_processes(2, lambda _: hosts.divided(np.ones(4, bool), odd), monkeypatch)
    assert [type(error) for error in found] == [ZeroDivisionError, RuntimeError]
    assert str(found[1]) == "ZeroDivisionError: by nothing"


def test_data_that_one_process_cannot_read_stop_all(whole, monkeypatch, tmp_path):
    def data() -> pl.DataFrame:
        if jax.process_index():
            raise DataError("b.jsonl: row 1: is cut short")
        return whole

    asked = Experiment(**FAMILIES["individual"], data=data, data_name="d")
    for error in as_processes(2, lambda _: launch.record(asked, root=tmp_path), monkeypatch):
        assert isinstance(error, DataError)
        assert str(error) == "b.jsonl: row 1: is cut short"
    assert not list(tmp_path.iterdir())


def test_a_written_table_may_be_shuffled_and_split(whole, tmp_path):
    order = [whole.height - 1, *range(whole.height - 1)]  # the second judgement of a pair comes first
    comparisons.write(whole[order[:2]], tmp_path / "a.parquet")
    comparisons.write(whole[order[2:]], tmp_path / "b.parquet")
    found = read_parts(str(tmp_path / "*.parquet"))
    assert found["example_id"].to_list() == whole["example_id"][order].to_list()


def test_a_part_without_rows_is_none(tmp_path, monkeypatch):
    say(tmp_path / "a.jsonl", row(first="b"))  # both responses are the same
    (tmp_path / "b.jsonl").write_text("", "utf8")
    say(tmp_path / "c.jsonl", row(prompt=[{"role": "user", "content": "tea?"}]))
    files = str(tmp_path / "*.jsonl")
    assert read_parts(files).height == 1
    assert [table.height for table in as_processes(3, lambda _: read_parts(files), monkeypatch)] == [1, 1, 1]
    (tmp_path / "c.jsonl").unlink()
    for error in as_processes(2, lambda _: read_parts(files), monkeypatch):
        assert isinstance(error, DataError)
        assert "no file holds comparisons" in str(error)


def test_columns_of_their_own_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    for name, more in zip("abc", ({"x": 1, "note": 1}, {"y": "s", "note": 2.5}, {"z": 2.5, "note": 3}), strict=True):
        say(tmp_path / f"{name}.jsonl", row(first=name + "1") | more)
    alone = read_parts(str(tmp_path / "*.jsonl"))
    assert alone.columns[-4:] == ["x", "note", "y", "z"]
    for found in as_processes(2, lambda _: read_parts(str(tmp_path / "*.jsonl")), monkeypatch):
        assert found.drop(TEXTS).equals(alone.drop(TEXTS))


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
    assert hosts.workers([np.packbits(one) for one in known], 6).tolist() == [0, 1, 0, 0, 1, 2]
    assert hosts.workers([np.packbits(np.ones(7, bool))] * 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    monkeypatch.setattr(hosts, "SLAB", 16)
    values = np.random.default_rng(0).normal(size=(6, 5))
    found = as_processes(3, lambda p: hosts.divided(known[p], lambda own: values[own]), monkeypatch)
    for each in found:
        np.testing.assert_array_equal(each, values)
    said = [b"x" * size for size in (0, 47, 16)]
    assert as_processes(3, lambda p: hosts.exchanged(said[p]), monkeypatch) == [said] * 3
    assert as_processes(2, lambda p: hosts.exchanged(b""), monkeypatch) == [[b"", b""]] * 2
