"""Hold BLAS to one thread while batches of small systems are solved on CPU.

XLA solves a batch by one LAPACK call a matrix (SciPy's), on threads of its own. Each call wakes the threads of BLAS
too, which then wait for each other in busy loops: where other work shares the cores, a hundred times as long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg.cython_lapack  # noqa: F401  (the library that JAX will call: what is not loaded cannot be limited)
from threadpoolctl import threadpool_limits

_lock = threading.Lock()
_inside: list[threadpool_limits] = []  # one entry for each block that is open; the first holds what was before


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread; also a decorator. Blocks of several threads may overlap: the last to end restores."""
    with _lock:
        _inside.append(_inside[0] if _inside else threadpool_limits(1, user_api="blas"))
    try:
        yield
    finally:
        with _lock:
            limits = _inside.pop()
            if not _inside:
                limits.restore_original_limits()
