"""Users in shards: the same states as in one call, resumed after a stop, refused where they are not the same users."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from handmade import handmade
from tables import write

from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.models.low_rank import LowRank
from pluralprefs.user_shards import read_shard, write_shards
from pluralprefs.users import ravel


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Ten users in three tables: some have said less than their state has coordinates, some more."""
    path = write(tmp_path_factory.mktemp("many") / "said.jsonl", users=10, per_user=20, seed=2)
    rows = comparisons.read(path).with_columns(place=pl.int_range(pl.len()).over("user_id"))
    number = rows["user_id"].rank("dense")
    rows = rows.filter(pl.col("place") < pl.Series(np.where(number % 2 == 0, 2, 20)))
    number = rows["user_id"].rank("dense")
    return [rows.filter(number.is_between(*ends)) for ends in ((1, 4), (5, 8), (9, 10))]


@pytest.mark.parametrize(
    ("method", "square"),
    [
        pytest.param("laplace", False, marks=pytest.mark.slow),
        pytest.param("laplace", True, marks=pytest.mark.slow),
        ("map", False),
    ],
)
def test_shards_hold_what_one_call_gives(tables, tmp_path, method, square):
    run = handmade(tables[0], model=LowRank.init(key=jax.random.key(0), dim=2, rank=20))
    if square:  # of the size of a posterior's own root
        run = replace(run, users=run.users.replace(user_root=jnp.diag(run.users.user_root)))
    files = list(write_shards(run, tables, tmp_path, method=method))
    expected = {name: state for table in tables for name, state in run.adapt(table, method=method).items()}
    found = {name: state for file in files for name, state in read_shard(run, file).items()}
    assert set(found) == set(expected)
    assert [file.name for file in files] == [f"users-0000{i}.safetensors" for i in range(3)]
    kinds = set()
    for name, state in found.items():
        np.testing.assert_array_equal(ravel(state.mean)[0], ravel(expected[name].mean)[0])
        factors = state.covariance and (state.covariance.root, state.covariance.downdate)
        others = expected[name].covariance and (expected[name].covariance.root, expected[name].covariance.downdate)
        kinds.add(factors and factors[0].ndim)
        for factor, other in zip(factors or (), others or (), strict=True):
            np.testing.assert_array_equal(factor, other)
    assert kinds == (
        {None} if method == "map" else {2} if square else {1, 2}
    )  # with fewer comparisons than coordinates, and more


def test_a_stopped_call_goes_on_and_other_users_are_refused(tables, tmp_path, monkeypatch):
    run = handmade(tables[0])
    stopped = write_shards(run, tables, tmp_path)
    first = next(stopped).read_bytes()
    stopped.close()
    solved, whole = [], type(run).adapt_stacked

    def watched(self, table, **options):
        solved.append(table.height)
        return whole(self, table, **options)

    monkeypatch.setattr(type(run), "adapt_stacked", watched)
    files = list(write_shards(run, iter(tables), tmp_path))
    assert solved == [tables[1].height, tables[2].height]
    assert files[0].read_bytes() == first
    with pytest.raises(DataError, match="is of other users"):
        list(write_shards(run, tables[1:], tmp_path))
    with pytest.raises(DataError, match="is of other users or comparisons"):
        list(write_shards(run, [tables[0].with_columns(target=1 - pl.col("target"))], tmp_path))
    with pytest.raises(DataError, match="is of other users or comparisons"):  # the features are in the columns
        list(write_shards(run, [tables[0].with_columns(pl.col("attr:x:first") + 1)], tmp_path))
    assert list(write_shards(run, [tables[0].reverse()], tmp_path)) == files[:1]
    with pytest.raises(DataError, match="in table 1 and in an earlier one"):
        list(write_shards(run, [tables[0], tables[0]], tmp_path / "twice"))
    with pytest.raises(DataError, match="is no shard of users"):
        read_shard(handmade(tables[0], base="other"), files[0])
