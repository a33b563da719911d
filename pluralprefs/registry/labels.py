"""What people say of a run: tags and a note, in labels.json, so that nobody but the run itself writes run.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pluralprefs.registry.environment import redact
from pluralprefs.registry.files import RegistryError, write_json

FILE = "labels.json"
LONGEST_TAG = 60


def read_labels(path: Path | str) -> dict[str, Any]:
    """Return {"tags": [...], "note": text or None} of a run folder; RegistryError where the file is broken."""
    file = os.path.join(path, FILE)
    try:
        with open(file, "rb") as opened:
            content = json.loads(opened.read())
    except FileNotFoundError:
        return {"tags": [], "note": None}
    except (OSError, ValueError) as error:
        raise RegistryError(f"{file}: unreadable ({error}); mend it or delete it") from error
    tags, note = (content.get(key) for key in ("tags", "note")) if isinstance(content, dict) else (0, 0)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags) or not isinstance(note, str | None):
        raise RegistryError(f'{file}: expected {{"tags": [texts], "note": text}}; mend it or delete it')
    return {"tags": tags, "note": note}


def tag(path: Path | str, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """Add and remove tags of a run, and return those it has then, in order. Removing what is not there is no error."""
    labels, gone = read_labels(path), set(remove)
    tags = sorted({*labels["tags"], *(_checked(name) for name in add)} - gone)
    write_json(Path(path) / FILE, redact({**labels, "tags": tags}))
    return tags


def note(path: Path | str, text: str) -> None:
    """Set the note of a run, one for each run; an empty text takes it away."""
    write_json(Path(path) / FILE, redact({**read_labels(path), "note": text.strip() or None}))


def _checked(name: str) -> str:
    if not name.strip() or "," in name or "\n" in name or len(name) > LONGEST_TAG:
        raise RegistryError(f"tag {name!r}: give a text of 1 to {LONGEST_TAG} characters without commas or line breaks")
    return name.strip()
