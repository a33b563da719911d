"""The floors of the package: a module imports from lower floors or from its own folder; light commands stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first; a word is a module or a folder of pluralprefs, and neighbours on a floor do not import each other.
FLOORS = [
    "pytrees",
    "types terminal",
    "intervals likelihoods sharding describe",
    "metrics hosts",
    "contrasts results",
    "models encoders data registry baselines",
    "users attributes extraction",
    "newton blas personas",
    "adapt train token_batches",
    "fitting",
    "adapting",  # lazily, adapting and pooling may import each other
    "pooling peers",
    "training evaluate adapted windows judging directions",
    "spread prompted backbone",
    "trust",
    "inferring",
    "communities asking choosing user_shards fspo adapters",
    "profiles",
    "experiment",
    "seeds",
    "saving profiled",
    "run plots",
    "launch answering model_card teacher_cli run_options",
    "export serve sweep report",
    "attributes_cli deploy_cli encode_cli personas_cli profile_cli registry_cli users_cli wandb_cli",
    "cli",
    "__init__",
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names.split()}
LAZY_PAIRS = [{"adapting", "pooling"}]
FAMILY_MAY_IMPORT = "pluralprefs.models.layers"
WITHOUT_MODELS = {"registry", "plots"}
LIGHT = [
    *("data.comparisons", "data.splits", "data.sources", "registry", "metrics", "describe", "encoders"),
    *("attributes.catalog", "cli", ""),
]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob("pluralprefs/**/*.py")}


def part(module: str) -> str:
    """Return the word of FLOORS that a module belongs to: `pluralprefs.data.splits` is of `data`."""
    return [*module.split("."), "__init__"][1]


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each module of the package that `node` imports, and whether only once a function runs; not for types."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    else:
        children = list(ast.iter_child_nodes(node))
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        origin = "." * node.level + (node.module or "")
        within = [f"{origin}.{alias.name}" for alias in node.names]
        names = [name if name in MODULES or f"{name}.__init__" in MODULES else origin for name in within]
    yield from ((name, lazy) for name in names if name.split(".")[0] in ("pluralprefs", ""))
    for child in children:
        yield from imports(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def breaches(module: str, source: str) -> Iterator[str]:
    """Yield what the imports of a module break, a sentence each."""
    here = part(module)
    if here not in FLOOR:
        yield f"{module} stands on no floor: add {here!r} to FLOORS in tests/test_architecture.py"
        return
    for name, lazy in imports(ast.parse(source)):
        there = part(name)
        if name.startswith("."):
            yield f"{module} imports {name}: write the whole name"
        elif there not in FLOOR:
            yield f"{module} imports {name}, which stands on no floor"
        elif there == here == "models" and name not in (FAMILY_MAY_IMPORT, module):
            yield f"{module} imports another family, {name}: share through {FAMILY_MAY_IMPORT}"
        elif there == "models" and here in WITHOUT_MODELS:
            yield f"{module} imports {name}: it reads tables and knows no model"
        elif FLOOR[there] >= FLOOR[here] + lazy and here != there and not (lazy and {here, there} in LAZY_PAIRS):
            yield f"{module} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]}): import from below only"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_lower_floors_or_its_own_folder(module):
    found = list(breaches(module, MODULES[module].read_text(encoding="utf-8")))
    assert not found, "; ".join(found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("pluralprefs.data.splits", "from pluralprefs.train import train", "import from below"),
        ("pluralprefs.data.splits", "def f():\n    from pluralprefs import launch", "import from below"),
        ("pluralprefs.data.splits", "from pluralprefs.encoders import load", "import from below"),
        ("pluralprefs.data.splits", "from pluralprefs import DataError", "import from below"),
        ("pluralprefs.data.splits", "from .files import DataError", "write the whole name"),
        ("pluralprefs.models.low_rank", "import pluralprefs.models.bradley_terry", "another family"),
        ("pluralprefs.models.low_rank", "from pluralprefs.models import bradley_terry", "another family"),
        ("pluralprefs.plots", "def f():\n    from pluralprefs.models.low_rank import LowRank", "knows no model"),
        ("pluralprefs.data.lexicon.values", "from pluralprefs.attributes import catalog", "import from below"),
        ("pluralprefs.attributes.catalog", "from pluralprefs.cli import main", "import from below"),
        ("pluralprefs.novelty", "", "stands on no floor: add 'novelty'"),
        ("pluralprefs.cli", "from pluralprefs.novelty import x", "which stands on no floor"),
        ("pluralprefs.data.splits", "from pluralprefs.data.files import DataError", None),
        ("pluralprefs.data.splits", "def f():\n    from pluralprefs.encoders import load", None),
        ("pluralprefs.adapting", "def f():\n    from pluralprefs.pooling import fit_pooled", None),
        ("pluralprefs.types", "if TYPE_CHECKING:\n    from pluralprefs.run import Run", None),
        ("pluralprefs.models.low_rank", "from pluralprefs.models import layers", None),
    ],
)
def test_the_check_finds_what_it_is_for(module, source, message):
    found = list(breaches(module, source))
    assert message in found[0] if message else not found


def test_no_module_is_named_for_what_is_left_over():
    leftover = {"utils", "util", "helpers", "common", "misc"}
    assert not [name for name in MODULES if leftover & set(name.split("."))]


@pytest.mark.parametrize("light", LIGHT)
def test_light_modules_import_nothing_heavy(light):
    heavy = {"jax", "flax", "transformers", "wandb", "torch", "matplotlib"}
    assert not heavy & loaded_by(f"pluralprefs.{light}".rstrip("."))


def test_tables_and_figures_load_no_model():
    assert not {name for name in loaded_by("pluralprefs.registry, pluralprefs.plots") if "pluralprefs.models" in name}


def loaded_by(modules: str) -> set[str]:
    """Return the names in `sys.modules` of a fresh Python that imports `modules`."""
    code = f"import {modules}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
