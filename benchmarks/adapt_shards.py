"""Question: how long do 100,000 new users take, and how much memory, when they are adapted shard by shard?

Command: python benchmarks/adapt_shards.py [users]

16 comparisons each over 8 attribute columns, 10,000 users a table: `user_shards.write_shards` from tables in memory to
files, and the largest resident memory after the first shard and at the end, which must not grow with users.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import polars as pl

from pluralprefs.data import batches, comparisons
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.experiment import Experiment
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.registry import RunFolder
from pluralprefs.run import Run
from pluralprefs.user_shards import write_shards
from pluralprefs.users import Users

SHARD, SHOTS, FEATURES, ITEMS = 10_000, 16, 8, 500


def tables(users: int) -> Iterator[pl.DataFrame]:
    """Draw the comparisons of one shard's users after the other."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(ITEMS, FEATURES))
    for start in range(0, users, SHARD):
        count = min(SHARD, users - start)
        unit = np.repeat(np.arange(count), SHOTS)
        first, second = draw.integers(0, ITEMS, (2, len(unit)))
        second = np.where(first == second, (second + 1) % ITEMS, second)
        log_odds = ((values[first] - values[second]) * draw.normal(size=(count, FEATURES))[unit]).sum(1)
        target = (draw.random(len(unit)) < 1 / (1 + np.exp(-log_odds))).astype(float)
        columns = {"prompt": ["Which?"] * len(unit), "target": target}
        for side, index in (("first", first), ("second", second)):
            columns |= {side: [f"text {i}" for i in index]}
            columns |= {f"attr:x{k}:{side}": values[index, k] for k in range(FEATURES)}
        names = [f"user {start + u}" for u in unit]
        yield comparisons.check(pl.DataFrame(columns | {"user_id": names})).table


def memory() -> float:
    """The largest resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(users: int) -> None:
    """Print seconds by shard and in all, and memory."""
    sample = next(tables(SHARD))
    items = batches.item_table(sample)
    encoder = AttributeEncoder.fit(items, items["item_key"])
    model = BradleyTerry.init(key=jax.random.key(0), dim=FEATURES, item_effects=False)
    run = Run(
        folder=RunFolder("bench"), experiment=Experiment(data=partial(comparisons.read, ""), model=BradleyTerry.init),
        model=model, users=Users.init(model, users=0, communities=0, strength=1.0), maps=None, encoder=encoder,
        vocabulary=batches.Vocabulary((), (), (), (), ()), attributes=None, notes={}, rows=None, items=None, judged=(),
        fingerprint="bench",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        waiting, seconds, size = 0.0, [], 0

        def timed() -> Iterator[pl.DataFrame]:
            nonlocal waiting
            source = tables(users)
            while True:
                begin = time.perf_counter()
                table = next(source, None)
                waiting += time.perf_counter() - begin
                if table is None:
                    return
                yield table

        begin = time.perf_counter()
        for path in write_shards(run, timed(), Path(folder)):
            seconds.append(time.perf_counter() - begin - waiting)
            size += path.stat().st_size
            if len(seconds) == 1:
                print(f"first shard: {seconds[0]:.1f} s with compilation, {memory():.2f} GB")
        rest = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
        print(f"{users} users x {SHOTS}, K = {FEATURES}: {seconds[-1]:.1f} s, {rest:.1f} s a shard after the "
              f"first; {memory():.2f} GB; {size / 1e6:.0f} MB on disk; drawing the data {waiting:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
