"""Build the API reference from the docstrings, with every warning an error: make docs."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc

import pluralprefs


class Written(str):
    """An annotation that is shown as it stands in the source: `Float[Array, "users dim"]`."""

    __repr__ = str.__str__


def as_written(annotation: Any, *_: Any) -> Any:
    """Return an annotation without evaluating it: shapes are strings that no evaluation makes plainer."""
    text = getattr(annotation, "__forward_arg__", annotation)
    return Written(text) if isinstance(text, str) else text


def modules() -> list[str]:
    """What pdoc must be told so that every module gets a page: where there is `__all__`, it sees no more than that."""
    told, seen = [], set()
    found = pkgutil.walk_packages(pluralprefs.__path__, "pluralprefs.")
    for name in ("pluralprefs", *(module.name for module in found)):
        if name not in seen:
            told.append(name)
            seen.update(pdoc.extract.walk_specs([name]))
    return told


def main(folder: Path) -> None:
    """Write one page a module, and a search index, into the folder."""
    warnings.simplefilter("error")
    pdoc.doc.safe_eval_type = pdoc.doc_types.safe_eval_type = as_written
    pdoc.render.configure(docformat="markdown", search=True)
    pdoc.pdoc(*modules(), output_directory=folder)
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
