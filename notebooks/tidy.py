"""Keep in executed notebooks what a reader sees, and nothing that changes from run to run: make notebooks KEEP=1.

Outputs stay. Execution counts, times, widget states and the version of the kernel go, as do warnings on standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tidy(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without what is noise in a diff; cells are named by their place."""
    book.metadata = nbformat.from_dict(METADATA)
    for place, cell in enumerate(book.cells):
        cell.id, cell.metadata = f"cell-{place}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.output_type = "display_data"  # a result must have a count
    return book


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = tidy(nbformat.read(name, as_version=4))
        Path(name).write_text(nbformat.writes(found), encoding="utf-8")
