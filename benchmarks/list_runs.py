"""Question: how long do ten thousand runs take to list, and what does the index save against reading every run.json?

Command: make bench                       (or: python benchmarks/list_runs.py [runs])

Run folders with a run.json of the size that a fit writes. The same listing without an index, with one, and after one
run in a hundred has changed; what they return is compared first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from pluralprefs import registry
from pluralprefs.registry import index


def fill(root: Path, count: int) -> None:
    """Write `count` finished runs."""
    with registry.create(root, ("low_rank", "ukp"), {"described": ["pluralprefs.models.low_rank"] * 100}) as run:
        run.summarise({"accuracy": 0.7, "nll": 0.5})
    content = run.read()
    for number in range(1, count):
        path = root / f"2026-11-21T10-00-00-low_rank-ukp-{number:06d}"
        path.mkdir()
        (path / "run.json").write_text(json.dumps(content | {"seeds": [number]}))


def seconds(root: Path) -> float:
    """Seconds of one listing."""
    begin = time.perf_counter()
    registry.list_runs(root)
    return time.perf_counter() - begin


def main(count: int) -> None:
    """Print the three times and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fill(root, count)
        time.sleep(index.SETTLED / 1e9)

        def without() -> float:
            (root / index.FILE).unlink(missing_ok=True)
            return seconds(root)

        cold = min(without() for _ in range(3))
        expected = registry.list_runs(root)
        warm = min(seconds(root) for _ in range(5))
        assert registry.list_runs(root).equals(expected)
        for path in sorted(root.iterdir())[1::100]:
            os.utime(path / "run.json")
        changed = seconds(root)
        assert registry.list_runs(root).equals(expected)
    print(f"{count} runs: {cold:.2f} s without an index (it is written then), {warm:.2f} s with it, ratio "
          f"{cold / warm:.1f}; {changed:.2f} s where one run in a hundred has changed")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
