"""Processes of one run as threads of a test, which meet where processes would: quick, and each can be looked into."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils


def as_processes(count: int, work: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `work(process)` returns for each of `count` processes, or the exception that it raised."""
    own, meeting, given = threading.local(), threading.Barrier(count, timeout=60), [None] * count
    found: list[Any] = [None] * count

    def allgather(value, tiled=False):
        assert not tiled
        given[own.number] = np.array(value)
        meeting.wait()
        assert len({(part.shape, part.dtype) for part in given}) == 1, "processes gather arrays that do not fit"
        stacked = np.stack(given)
        meeting.wait()
        return stacked

    def run(number: int) -> None:
        own.number = number
        try:
            found[number] = work(number)
        except Exception as error:
            found[number] = error

    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: own.number)
        patch.setattr(multihost_utils, "process_allgather", allgather)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found
