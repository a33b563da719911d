"""pluralprefs: user-conditioned reward models in JAX.

    import pluralprefs as pp
    run = pp.fit("comparisons.jsonl", model="low_rank")
    users = run.adapt(run.read("new_users.jsonl"))
    scores = run.score(run.read("pairs.jsonl", labelled=False), users)

Names are imported on first use: `import pluralprefs` costs neither JAX nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluralprefs.adapt import fit_user, laplace_user
    from pluralprefs.asking import suggest
    from pluralprefs.choosing import choose
    from pluralprefs.contrasts import paired_difference
    from pluralprefs.data.comparisons import DataError, read, validate, write
    from pluralprefs.data.splits import leak_report, split
    from pluralprefs.describe import describe, resolve
    from pluralprefs.evaluate import evaluate
    from pluralprefs.experiment import Experiment
    from pluralprefs.launch import fit, run
    from pluralprefs.metrics import summarise
    from pluralprefs.registry import list_runs, load_table
    from pluralprefs.run import Run, load
    from pluralprefs.users import Pooled

__version__ = "0.1.0"

_WHERE = {
    "DataError": "data.comparisons",
    "Experiment": "experiment",
    "Pooled": "users",
    "Run": "run",
    "choose": "choosing",
    "describe": "describe",
    "evaluate": "evaluate",
    "fit": "launch",
    "fit_user": "adapt",
    "laplace_user": "adapt",
    "leak_report": "data.splits",
    "list_runs": "registry",
    "load": "run",
    "load_table": "registry",
    "paired_difference": "contrasts",
    "read": "data.comparisons",
    "resolve": "describe",
    "run": "launch",
    "split": "data.splits",
    "suggest": "asking",
    "summarise": "metrics",
    "validate": "data.comparisons",
    "write": "data.comparisons",
}

__all__ = [
    "DataError",
    "Experiment",
    "Pooled",
    "Run",
    "choose",
    "describe",
    "evaluate",
    "fit",
    "fit_user",
    "laplace_user",
    "leak_report",
    "list_runs",
    "load",
    "load_table",
    "paired_difference",
    "read",
    "resolve",
    "run",
    "split",
    "suggest",
    "summarise",
    "validate",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pluralprefs' has no attribute {name!r}")
    value = getattr(import_module(f"pluralprefs.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
