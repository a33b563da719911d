"""What holds in every test: eight CPU devices, no silent rank promotion, and the marks `slow` and `torch`.

Warnings are errors (pyproject.toml), and the shapes that annotations state are checked at every call (shapes.py).
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before JAX is imported anywhere: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# What takes long to compile is kept for the other processes of a session; to keep it all would cost more than it saves.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pluralprefs-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # two test processes on two cores: BLAS threads would only wait for each other
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["PLURALPREFS_WANDB"] = "off"  # a test that wants the mirror asks for it

import pytest
from jaxtyping import install_import_hook

install_import_hook("pluralprefs", "shapes.check")

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    """Leave out slow tests unless asked for, and skip torch tests unless TORCH=1."""
    if not (config.getoption("--slow") or "slow" in config.getoption("markexpr")):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if os.environ.get("TORCH") != "1":
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="needs PyTorch: make test TORCH=1"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public human judgements, which is not part of the repository."""
    folder = Path(os.environ.get("PLURALPREFS_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "protocol").is_dir():
        pytest.skip(f"no data at {folder}: name its folder in PLURALPREFS_DATA")
    return folder
