"""`pluralprefs runs [show | compare | tag | note | prune | reindex]`: what has been run, and what came of it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pluralprefs.terminal import plainly, say, warn

if TYPE_CHECKING:
    import polars as pl

    from pluralprefs.registry import RunFolder

runs_app = typer.Typer(
    help="List the runs of a folder, look at one, compare two, tag and delete them.",
    epilog='Example: pluralprefs runs --where "model=low_rank and accuracy>0.7" --sort=-accuracy',
)
LEFT_ALONE = ("running", "unreadable")  # by `prune --where`
SHOWN = ("run", "status", "model", "data", "tags", "accuracy", "nll")
Where = Annotated[str | None, typer.Option(help='Filter: "model=low_rank and accuracy>0.7"')]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON lines.")]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]
Root = Annotated[Path, typer.Option("--root", help="Folder of run folders.")]
RUNS = Path("runs")
Named = Annotated[str, typer.Argument(help="Run folder, its name, or a part that no other name has.")]


@runs_app.callback(invoke_without_command=True)
@plainly
def runs(
    context: typer.Context,
    root: Root = RUNS,
    where: Where = None,
    sort: Annotated[str | None, typer.Option(help="Column to sort by; -accuracy: largest first.")] = None,
    columns: Annotated[str | None, typer.Option(help='Columns to show: run,status,accuracy; "all" for all.')] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs of a folder, oldest first."""
    if context.invoked_subcommand is not None:
        if (root, where, sort, columns, json) != (RUNS, None, None, None, False):
            raise ValueError(
                f"put options behind the command: pluralprefs runs {context.invoked_subcommand} --root ..."
            )
        return
    from pluralprefs.registry import list_runs

    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --root names the folder that `train` and `fit` write runs to")
    table = list_runs(root, where)
    if sort is not None:
        name = _known("--sort", sort.removeprefix("-"), table)
        table = table.sort(name, descending=sort.startswith("-"), nulls_last=True, maintain_order=True)
    if columns not in (None, "all"):
        chosen = [_known("--columns", name.strip(), table) for name in columns.split(",")]
        table = table.select(list(dict.fromkeys(chosen)))
    if json:
        say(table.write_ndjson().rstrip())
    elif columns is None:
        used = [name for name in SHOWN if name in table.columns and (name != "tags" or table["tags"].list.len().sum())]
        say(_text(table.select(used)))
    else:
        say(_text(table))


@runs_app.command(epilog="Example: pluralprefs runs show 7f3a")
@plainly
def show(
    run: Named,
    root: Root = RUNS,
    json: Annotated[bool, typer.Option("--json", help="run.json and labels, whole.")] = False,
    debug: Debug = False,
) -> None:
    """Everything about one run: where it ran, how it ended, what it holds, its results."""
    import json as codec

    from pluralprefs.registry import find_run, read_labels
    from pluralprefs.results import results_table

    folder = find_run(run, root)
    content = folder.read() | read_labels(folder.path) | {"status": folder.status}
    if json:
        say(codec.dumps(content, ensure_ascii=False, indent=2))
        return
    fields = _fields(folder, content)
    width = max(len(name) for name in fields)
    say("\n".join(f"{name:<{width}}  {value}" for name, value in fields.items()))
    if "metrics" in folder.tables() and (metrics := folder.table("metrics")).height:
        say("\n" + results_table(metrics))


@runs_app.command(epilog="Example: pluralprefs runs compare 7f3a 99b0")
@plainly
def compare(
    a: Named,
    b: Named,
    root: Root = RUNS,
    draws: Annotated[int, typer.Option(min=100, help="Resamples of users.")] = 2000,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A minus B on the judgements that both predicted, with 95 % intervals over users."""
    from pluralprefs.registry import compare_runs, find_run
    from pluralprefs.registry.comparison import comparison_table

    one, other = find_run(a, root), find_run(b, root)
    compared = compare_runs(one, other, draws)
    if json:
        say(compared.write_ndjson().rstrip())
        return
    if one.read().get("data_fingerprint") != other.read().get("data_fingerprint"):
        warn("the two runs were fitted to different data: only the judgements that both predicted are compared")
    say(f"A  {one.path}\nB  {other.path}\n\n{comparison_table(compared)}")
    if lacking := compared.filter(compared["only_a"] + compared["only_b"] > 0)["cell"].unique().sort().to_list():
        say(f"\nJudgements that only one of the two predicted are left out in {', '.join(lacking)}; --json counts them")


@runs_app.command(epilog="Example: pluralprefs runs tag 7f3a --add paper --remove draft")
@plainly
def tag(
    run: Named,
    root: Root = RUNS,
    add: Annotated[list[str] | None, typer.Option(help="Tag to add; may be given again.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Tag to take away.")] = None,
    debug: Debug = False,
) -> None:
    """Add and remove tags of a run; `pluralprefs runs --where tags=paper` finds it."""
    from pluralprefs import registry

    say(", ".join(registry.tag(registry.find_run(run, root).path, add or (), remove or ())) or "no tags")


@runs_app.command(epilog='Example: pluralprefs runs note 7f3a "seed 2 diverged"')
@plainly
def note(
    run: Named,
    text: Annotated[str, typer.Argument(help='The note; "" takes it away.')],
    root: Root = RUNS,
    debug: Debug = False,
) -> None:
    """Write a note to a run, in place of an earlier one."""
    from pluralprefs import registry

    registry.note(registry.find_run(run, root).path, text)


@runs_app.command(epilog='Example: pluralprefs runs prune --where "status=failed"')
@plainly
def prune(
    names: Annotated[list[str] | None, typer.Argument(help="Names of runs in --root.")] = None,
    where: Where = None,
    root: Root = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Delete runs, after asking. Never one that is running, nor anything outside of --root."""
    from pluralprefs import registry
    from pluralprefs.registry.pruning import prunable

    if bool(names) == bool(where):
        raise ValueError("prune: name the runs, or choose them with --where, such as --where status=failed")
    if where:
        listed = registry.list_runs(root, where)
        chosen = [run for run, status in listed.select("run", "status").iter_rows() if status not in LEFT_ALONE]
        for status in LEFT_ALONE:
            if count := listed.filter(listed["status"] == status).height:
                warn(f"{count} {status}, left alone")
    else:
        chosen = list(dict.fromkeys(names or ()))
    for name in chosen:
        prunable(root, name)
    if not chosen:
        say("nothing to delete")
        return
    say("\n".join(chosen))
    if not yes and not typer.confirm(f"Delete {len(chosen)} run{'s' if len(chosen) > 1 else ''} of {root}?"):
        say("nothing deleted")
        return
    say(f"{len(registry.prune(root, chosen))} deleted")


@runs_app.command(epilog="Example: pluralprefs runs reindex --root runs")
@plainly
def reindex(root: Root = RUNS, debug: Debug = False) -> None:
    """Build the index of a folder again. Never needed: an index that is old or gone is seen and mended."""
    from pluralprefs import registry

    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    say(f"{registry.reindex(root)} runs")


def _known(option: str, name: str, table: pl.DataFrame) -> str:
    if name not in table.columns:
        near = difflib.get_close_matches(name, table.columns, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{option} {name}: no such column{hint}; columns are {', '.join(table.columns)}")
    return name


def _text(table: pl.DataFrame) -> str:
    import polars as pl

    with pl.Config(
        tbl_rows=-1, tbl_cols=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, fmt_str_lengths=200,
        tbl_width_chars=400, fmt_table_cell_list_len=20,
    ):  # fmt: skip
        return str(table)


def _fields(folder: RunFolder, content: dict[str, Any]) -> dict[str, Any]:
    """What `show` prints above the results, without what is empty."""
    parts = (content.get(part) for part in ("git", "process", "summary", "packages"))
    git, process, summary, packages = (part if isinstance(part, dict) else {} for part in parts)
    memory = content.get("peak_memory_bytes")
    fields = {
        "run": folder.path,
        "status": content["status"],
        "error": content.get("error"),
        "tags": ", ".join(content["tags"]),
        "note": content["note"],
        **{name: content.get(name) for name in ("model", "data", "rows", "data_fingerprint", "created", "finished")},
        "wall seconds": content.get("wall_seconds"),
        "peak memory": f"{memory / 2**20:,.0f} MiB" if isinstance(memory, int) else None,
        "seeds": ", ".join(map(str, content.get("seeds") or ())),
        "devices": ", ".join(map(str, content.get("devices") or ())),
        "host": process.get("host"),
        "git": f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}" if git else None,
        "python": content.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "command": " ".join(map(str, content.get("argv") or ())),
        "tables": ", ".join(folder.tables()),
        **{f"summary {name}": value for name, value in summary.items()},
    }
    return {name: value for name, value in fields.items() if value not in (None, "", [])}
