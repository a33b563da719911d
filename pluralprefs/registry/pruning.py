"""Delete run folders, and nothing else: direct children of one root that hold a run which has ended."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from pluralprefs.registry.files import RegistryError
from pluralprefs.registry.folder import open_run


def prunable(root: Path | str, name: str) -> Path:
    """Return the folder of the run `name` under `root` if it may be deleted.

    Raises RegistryError for whatever is no plain name, is a link, holds no readable run.json, or is running (which is
    what a run on another host looks like until it says otherwise).
    """
    path = Path(root) / name
    if Path(name).name != name or name.startswith("."):
        raise RegistryError(f"{name!r}: is not the name of a run in {root}; only folders right inside it are deleted")
    if path.is_symlink():
        raise RegistryError(f"{path}: is a link; what it points to is not inside {root}, delete it yourself")
    if open_run(path).status == "running":
        raise RegistryError(f"{path}: is running; end it first")
    return path


def prune(root: Path | str, names: Iterable[str]) -> list[str]:
    """Delete the named runs under `root` and return their names; nothing is deleted if one of them must not be.

    A folder is renamed out of sight first, so that one that is half deleted is never listed as a run.
    """
    paths = [prunable(root, name) for name in names]
    for path in paths:
        doomed = path.with_name(f".pruned-{path.name}-{secrets.token_hex(2)}")
        prunable(root, path.name).rename(doomed)
        shutil.rmtree(doomed)
    return [path.name for path in paths]
