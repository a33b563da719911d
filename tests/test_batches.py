"""Strings to integers, and an order of batches that resuming, streaming and scanning do not change."""

from __future__ import annotations

import time
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from pluralprefs.data import batches
from pluralprefs.data.comparisons import DataError
from pluralprefs.types import Comparisons, Item


def table(**columns) -> pl.DataFrame:
    """Three prompts' worth of votes; user w and community blue occur in test rows only."""
    base = pl.DataFrame(
        {
            "example_id": ["e0", "e1", "e2", "e3"],
            "prompt": ["P", "P", "Q", "Q"],
            "first": ["one", "three", "one", "four"],
            "second": ["two", "one", "four", "one"],
            "target": [1.0, 0.25, 0.5, 0.0],
            "tie": [False, False, True, False],
            "weight": [1.0, 2.0, None, 1.0],
            "user_id": ["v", None, "u", "w"],
            "annotator_id": ["r", "q", None, "s"],
            "community_id": ["red", "green", "red", "blue"],
            "prompt_id": ["p", "p", "q", "q"],
            "first_id": ["1", "3", "1", "4"],
            "second_id": ["2", "1", "4", "1"],
            "fold": ["train", "validation", "train", "test"],
            "source": ["toy"] * 4,
        }
    )
    return base.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def index_batch(rows: int, seed: int = 0, items: int = 7) -> Comparisons:
    rng = np.random.default_rng(seed)
    ids = lambda high: rng.integers(-1, high, rows).astype(np.int32)  # noqa: E731
    return Comparisons(
        first=rng.integers(0, items, rows).astype(np.int32),
        second=rng.integers(0, items, rows).astype(np.int32),
        target=rng.random(rows).astype(np.float32),
        tie=rng.random(rows) < 0.2,
        user=ids(5),
        community=ids(3),
        rater=ids(3),
        source=ids(2),
        offset=rng.normal(size=rows).astype(np.float32),
        weight=np.ones(rows, np.float32),
    )


def features(items: int = 7, dim: int = 3) -> Item:
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(items, dim)).astype(np.float32)
    return Item(embedding=embedding, index=np.arange(items, dtype=np.int32))


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_vocabulary_holds_names_of_training_rows_alone():
    found = batches.vocabulary(table())
    assert found.users == ("u", "v")
    assert found.communities == ("green", "red")
    assert found.items == ("p/1", "p/2", "p/3", "q/1", "q/4")
    assert found.sources == ("toy",)
    assert found.raters == ("q", "r")


def test_cells_narrow_the_vocabulary_further():
    found = batches.vocabulary(table(cell=["train", "unseen/support", "train_only_final", "seen/testpair"]))
    assert found.communities == ("red",)
    assert found.raters == ("r",)


def test_an_unsplit_table_and_an_absent_community_are_errors():
    with pytest.raises(DataError, match="split the table first"):
        batches.vocabulary(table(fold=["test"] * 4))
    with pytest.raises(DataError, match="no column 'stance'"):
        batches.vocabulary(table(), community="stance")


def test_a_table_becomes_arrays_whose_names_read_back():
    rows = table()
    items, names = batches.item_table(rows), batches.vocabulary(rows)
    found = batches.index_rows(rows, items, names)
    assert items["text"][found.first].to_list() == rows["first"].to_list()
    assert items["text"][found.second].to_list() == rows["second"].to_list()
    assert items["prompt"][found.first].to_list() == rows["prompt"].to_list()
    assert found.user.tolist() == [1, -1, 0, -1]
    assert found.community.tolist() == [1, 0, 1, -1]
    assert found.rater.tolist() == [1, 0, -1, -1]
    assert found.tie.tolist() == [False, False, True, False]
    assert found.weight.tolist() == [1.0, 2.0, 1.0, 1.0]
    np.testing.assert_array_equal(found.target, rows["target"].to_numpy().astype(np.float32))
    assert {found.first.dtype, found.user.dtype, found.source.dtype} == {np.dtype(np.int32)}
    assert {found.target.dtype, found.weight.dtype, found.offset.dtype} == {np.dtype(np.float32)}


def test_the_order_of_rows_changes_neither_items_nor_vocabulary():
    rows = table()
    turned = rows[[2, 0, 3, 1]]
    assert batches.item_table(turned).equals(batches.item_table(rows))
    assert batches.vocabulary(turned) == batches.vocabulary(rows)


def test_a_response_without_prompt_twin_is_an_item_of_its_own():
    items = batches.item_table(table())
    assert items["item_key"].to_list() == ["p/1", "p/2", "p/3", "q/1", "q/4"]
    assert items.columns == ["item_key", "item_id", "prompt_id", "prompt", "text"]


def test_a_table_put_together_and_filtered_is_a_table():
    whole = pl.concat([table().with_columns(source=pl.lit(name)) for name in "ab"])
    second = whole.with_columns(example_id=pl.int_range(pl.len()).cast(pl.Utf8)).filter(source="b")
    assert second["prompt_id"].n_chunks() > 1  # of which the first is empty
    items = batches.item_table(second)
    assert items.equals(batches.item_table(table()))
    known = batches.vocabulary(second)
    found = batches.index_rows(second, items, known)
    np.testing.assert_array_equal(found.first, batches.index_rows(table(), items, known).first)


def test_items_never_seen_in_training_have_no_index():
    rows = table(second_id=["2", "1", "4", "9"], second=["two", "one", "four", "nine"])
    found = batches.item_index(batches.item_table(rows), batches.vocabulary(rows))
    assert found.tolist() == [0, 1, 2, 3, 4, -1]


def test_attributes_of_the_two_sides_are_merged():
    columns = {"attr:care:first": [0.1, None, 0.5, 0.4], "attr:care:second": [0.2, 0.1, 0.4, 0.5]}
    items = batches.item_table(table(**columns, **{"attr:law:second": [1.0, None, None, None]}))
    assert items["attr:care"].to_list() == [0.1, 0.2, None, 0.5, 0.4]
    assert items["attr:law"].to_list() == [None, 1.0, None, None, None]


def test_conflicting_texts_and_attributes_name_the_item():
    with pytest.raises(DataError, match="item '1' of prompt 'p' has 2 values of 'text'"):
        batches.item_table(table(second=["two", "uno", "four", "one"]))
    with pytest.raises(DataError, match="item '1' of prompt 'q' has 2 values of 'attr:care'"):
        batches.item_table(table(**{"attr:care:first": [0.1] * 4, "attr:care:second": [0.1, 0.1, 0.1, 0.3]}))


def test_chats_are_items_too():
    chat = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = table(first=[chat(t) for t in table()["first"]], second=[chat(t) for t in table()["second"]])
    assert batches.item_table(rows)["text"].to_list()[1] == chat("two")
    with pytest.raises(DataError, match="values of 'text'"):
        batches.item_table(rows.with_columns(second=pl.Series([chat(str(i)) for i in range(4)])))


def test_a_response_outside_the_item_table_names_its_row():
    rows = table()
    with pytest.raises(DataError, match=r"row 2 \(example_id 'e2'\), first_id: item 'q/1'"):
        batches.index_rows(rows, batches.item_table(rows[:2]), batches.vocabulary(rows))


def test_gather_looks_up_both_items_under_jit():
    items, rows = features(), index_batch(6)
    found = jax.jit(batches.gather)(items, rows)
    np.testing.assert_array_equal(found.first.embedding, items.embedding[rows.first])
    np.testing.assert_array_equal(found.second.index, rows.second)
    np.testing.assert_array_equal(found.user, rows.user)
    assert found.first.attributes is None


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_an_epoch_holds_each_row_once_and_then_padding(rows, batch_size):
    for number in range(3):
        order = np.asarray(batches.epoch_indices(3, number, rows, batch_size))
        assert sorted(order[order >= 0].tolist()) == list(range(rows))
        assert (order.ravel()[rows:] == -1).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [np.asarray(batches.epoch_indices(s, e, 50, 50)).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_step_has_the_same_rows_wherever_the_run_resumes():
    items, rows = features(), index_batch(10)
    whole = list(islice(batches.resident(items, rows, seed=5, batch_size=4), 8))
    for start in (0, 2, 3, 5, 7):
        resumed = list(islice(batches.resident(items, rows, seed=5, batch_size=4, start=start), 8 - start))
        assert_equal_trees(resumed, whole[start:])
    for step in (0, 2, 4, 7):
        indices = jax.jit(batches.batch_at, static_argnums=(2, 3))(jax.random.key(5), step, 10, 4)
        assert_equal_trees(batches.gather(items, batches.take_rows(rows, indices)), whole[step])


def test_an_epoch_laid_out_is_the_sequence_of_its_batches():
    items, rows = features(), index_batch(10)
    laid_out = batches.epoch(5, 1, rows, 4)
    steps = list(islice(batches.resident(items, rows, seed=5, batch_size=4, start=3), 3))
    for step, batch in enumerate(steps):
        assert_equal_trees(batches.gather(items, jax.tree.map(lambda leaf: leaf[step], laid_out)), batch)  # noqa: B023


def test_padding_has_no_weight_no_user_and_a_real_item():
    rows = index_batch(3)
    found = batches.take_rows(rows, np.array([2, -1]))
    assert found.weight.tolist() == [1.0, 0.0]
    assert found.user.tolist() == [rows.user[2], -1]
    assert found.first.tolist() == [rows.first[2], rows.first[0]]
    assert isinstance(found.weight, np.ndarray)
    assert_equal_trees(found, batches.take_rows(rows, jnp.array([2, -1])))


def test_streaming_from_a_file_equals_features_on_the_device_bit_for_bit(tmp_path):
    items, rows = features(), index_batch(10)
    np.save(tmp_path / "embedding.npy", items.embedding)
    mapped = items.replace(embedding=np.load(tmp_path / "embedding.npy", mmap_mode="r"))
    for start in (0, 4):
        ours = islice(batches.stream(mapped, rows, seed=2, batch_size=4, start=start), 7)
        assert_equal_trees(
            list(ours), list(islice(batches.resident(items, rows, seed=2, batch_size=4, start=start), 7))
        )
    first = next(batches.stream(tmp_path / "embedding.npy", rows, seed=2, batch_size=4))
    other = next(batches.resident(items, rows, seed=2, batch_size=4))
    np.testing.assert_array_equal(first.first.embedding, other.first.embedding)


def test_an_error_while_reading_ahead_reaches_the_caller():
    rows = index_batch(10)
    with pytest.raises(IndexError):
        list(islice(batches.stream(features(items=1), rows, seed=0, batch_size=4), 3))


def test_rows_are_grouped_by_user_in_their_order():
    rows = index_batch(40)
    found = batches.group_by_user(rows, 5)
    assert found.weight.shape == (5, max(np.bincount(rows.user[rows.user >= 0])))
    for user in range(5):
        kept = found.weight[user] > 0
        np.testing.assert_array_equal(found.target[user][kept], rows.target[rows.user == user])
        assert (found.user[user][kept] == user).all()
        assert kept.sum() == kept.argmin() or kept.all()


def test_a_user_keeps_the_first_rows_up_to_the_limit():
    rows = index_batch(40)
    whole, cut = batches.group_by_user(rows, 5), batches.group_by_user(rows, 5, max_rows=3)
    assert_equal_trees(cut, jax.tree.map(lambda leaf: leaf[:, :3], whole))
    assert batches.group_by_user(rows, 7).weight[5:].sum() == 0


def test_a_hundred_thousand_users_are_grouped_without_a_loop():
    rows = index_batch(200_000)
    rows = rows.replace(user=np.random.default_rng(0).integers(0, 100_000, 200_000).astype(np.int32))
    start = time.perf_counter()
    found = batches.group_by_user(rows, 100_000, max_rows=8)
    assert time.perf_counter() - start < 5  # loose, for busy machines
    assert found.weight.shape == (100_000, 8)


def test_padding_to_a_length_keeps_rows_and_refuses_to_lose_any():
    rows = index_batch(3)
    found = batches.pad_to(rows, 5)
    assert_equal_trees(jax.tree.map(lambda leaf: leaf[:3], found), rows)
    assert found.weight.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="3 comparisons do not fit 2 rows"):
        batches.pad_to(rows, 2)
    empty = batches.pad_to(jax.tree.map(lambda leaf: leaf[:0], rows), 2)
    assert empty.weight.tolist() == [0.0, 0.0]
    assert empty.user.tolist() == [-1, -1]
