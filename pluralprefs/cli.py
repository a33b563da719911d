"""The command line: `pluralprefs train | sweep | fit | evaluate | adapt | score | runs | data check | ...`.

Heavy imports wait until a command needs them. What a user got wrong is one line on standard error and exit code 2.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pluralprefs.attributes_cli import attributes_app
from pluralprefs.deploy_cli import export, serve
from pluralprefs.encode_cli import encode
from pluralprefs.personas_cli import personas_app
from pluralprefs.profile_cli import profile
from pluralprefs.registry_cli import runs_app
from pluralprefs.run_options import RUNS, Debug, Named, New, Root, Seed, opened
from pluralprefs.terminal import plainly, say, warn
from pluralprefs.users_cli import ask, choose, suggest
from pluralprefs.wandb_cli import Mirror, after, chosen, wandb_app

if TYPE_CHECKING:
    import polars as pl

    from pluralprefs.adapted import AdaptedUser
    from pluralprefs.experiment import Experiment
    from pluralprefs.registry import RunFolder
    from pluralprefs.run import Run

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="User-conditioned reward models: train, adapt to a user, score, and keep a registry of runs.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Look at comparison files.")
app.add_typer(data_app, name="data")
app.add_typer(attributes_app, name="attributes")
app.add_typer(personas_app, name="personas")
app.add_typer(runs_app, name="runs")
app.add_typer(wandb_app, name="wandb")

MODELS = (
    "bradley_terry, bradley_terry_mlp, individual, low_rank, lore, ideal_point, ideal_direction, attribute_attention; "
    "inferred from shots: fast_weights, variational, swap_symmetric, neural_process, meta_reward, set_pooled."
)
Source = Annotated[
    str, typer.Argument(help="An experiment file that defines `experiment`, or a run: folder, name or part of one.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a part: --set model.prototypes=8")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Seeds, for example 0,1,2")]
Vmap = Annotated[bool | None, typer.Option(help="Train all seeds in one program; as it is, on GPU and TPU only.")]


UserColumn = Annotated[str, typer.Option(help="Column of user ids.")]
CommunityColumn = Annotated[str, typer.Option(help="Column of communities.")]
PromptColumn = Annotated[str, typer.Option(help="Column of prompts.")]


@app.command(epilog="Example: pluralprefs train experiments/ukpconvarg1.py --only ideal_point --seeds 0,1,2")
@plainly
def train(
    source: Source,
    assignments: Set = None,
    seeds: Seeds = None,
    only: Annotated[str | None, typer.Option(help="Names of experiments, where the file has several: a,b")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder of run folders.", show_default="runs")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run SOURCE where it stopped.")] = False,
    vmap: Vmap = None,
    wandb: Mirror = None,
    coordinator: Annotated[
        str | None, typer.Option(envvar="PLURALPREFS_COORDINATOR", help="Several processes: address:port of the first.")
    ] = None,
    processes: Annotated[int | None, typer.Option(envvar="PLURALPREFS_PROCESSES", help="How many.", min=1)] = None,
    process: Annotated[
        int | None, typer.Option(envvar="PLURALPREFS_PROCESS", help="Which this is, from 0.", min=0)
    ] = None,
    debug: Debug = False,
) -> None:
    """Run an experiment file, repeat a recorded run, or continue one. The last line is the run folder.

    Several processes compute one run, of which the first writes and speaks; in a SLURM step and on a TPU pod they find
    each other.
    """
    from dataclasses import replace

    from pluralprefs import hosts

    hosts.connect(coordinator, processes, process)
    from pluralprefs import launch
    from pluralprefs.describe import override
    from pluralprefs.registry import find_run

    mode, tell = chosen(wandb), say if hosts.writes() else None
    if resume:
        if seeds is not None or only or root is not None:
            raise ValueError("--resume goes on in the run's own folder with the recorded experiment: leave out "
                             "--seeds, --only and --root")  # fmt: skip
        folder = launch.go_on(find_run(source, RUNS).path, tell=tell, vmap=vmap, overrides=assignments or ())
        if hosts.writes():
            _finish(folder, mode)
        return
    experiments = _experiments(source, only, root or RUNS)
    for assignment in assignments or ():
        experiments = [override(experiment, assignment) for experiment in experiments]
    if seeds is not None:
        experiments = [replace(experiment, seeds=_seeds(seeds)) for experiment in experiments]
    for experiment in experiments:
        folder = launch.record(experiment, root=root or RUNS, tell=tell, vmap=vmap)
        if hosts.writes():
            _finish(folder, mode)


@app.command(epilog="Example: pluralprefs sweep experiments/ukp_ideal_point.py --over model.prototypes=1,2,4,8")
@plainly
def sweep(
    source: Source,
    over: Annotated[list[str], typer.Option(help="Setting and values: model.prototypes=1,2,4; again for a grid.")],
    assignments: Set = None,
    seeds: Seeds = None,
    only: Annotated[str | None, typer.Option(help="Name of the experiment, where the file has several.")] = None,
    root: Root = RUNS,
    vmap: Vmap = None,
    wandb: Mirror = None,
    debug: Debug = False,
) -> None:
    """Run every combination of settings, a run each. The same command again goes on where it was stopped."""
    from dataclasses import replace

    from pluralprefs import sweep as sweeping
    from pluralprefs.describe import override

    mode, experiments = chosen(wandb), _experiments(source, only, root)
    if len(experiments) > 1:
        raise ValueError(f"{source}: has several experiments; choose one with --only")
    [experiment] = experiments
    for assignment in assignments or ():
        experiment = override(experiment, assignment)
    if seeds is not None:
        experiment = replace(experiment, seeds=_seeds(seeds))
    done, failed = sweeping.sweep(experiment, over, root=root, tell=say, vmap=vmap,
                                  ended=lambda folder: after(folder, mode))  # fmt: skip
    say(sweeping.sweep_table(done))
    say("\n".join(f"{folder.path}  {label}" for label, folder in done.items()))
    if failed:
        raise ValueError(f"{len(failed)} of {len(done) + len(failed)} runs failed: {'; '.join(failed)}")


@app.command(epilog="Example: pluralprefs fit my.jsonl --model low_rank --encoder minilm --user-column annotator")
@plainly
def fit(
    data: Annotated[Path, typer.Argument(help="Comparisons: .jsonl, .parquet or .csv.")],
    model: Annotated[str, typer.Option(help=MODELS)] = "low_rank",
    encoder: Annotated[str, typer.Option(help='"minilm", "attributes", a folder or a Hugging Face id.')] = "minilm",
    attributes: Annotated[
        Path | None, typer.Option(help="Folder of `pluralprefs attributes train`, for attribute_attention.")
    ] = None,
    assignments: Set = None,
    seeds: Seeds = None,
    root: Root = RUNS,
    user_column: UserColumn = "user_id",
    community_column: CommunityColumn = "community_id",
    prompt_column: PromptColumn = "prompt",
    save_users: Annotated[bool, typer.Option(help="Keep seen users' rows in the run, to score them later.")] = True,
    keep_ids: Annotated[bool, typer.Option("--keep-ids", help="Do not pseudonymise user ids.")] = False,
    wandb: Mirror = None,
    debug: Debug = False,
) -> None:
    """Fit a family to your own comparisons. The last line is the run folder."""
    from pluralprefs.launch import fit as fit_table

    mode = chosen(wandb)
    run = fit_table(
        data, model=model, encoder=encoder, attributes=attributes, root=root, seeds=_seeds(seeds or "0"),
        save_users=save_users, overrides=assignments or (), tell=say, user=user_column, prompt=prompt_column,
        pseudonymise=not keep_ids, community_column=community_column,
    )  # fmt: skip
    _finish(run.folder, mode)


@app.command(epilog="Example: pluralprefs evaluate runs/2026-... --data new.jsonl")
@plainly
def evaluate(
    run: Named,
    data: Annotated[Path, typer.Option(help="Comparisons to evaluate on.")],
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    json: Annotated[bool, typer.Option("--json", help="Metric rows as JSON lines.")] = False,
    debug: Debug = False,
) -> None:
    """Every metric, baseline and control on other data."""
    from pluralprefs.results import results_table

    loaded = opened(run, root, seed, communities)
    if communities is not None and loaded.rows is None:
        warn(f"{run}: kept no training rows, so comparisons of {communities} that are in {data} too are tested")
    rows = loaded.evaluate(loaded.read(data))
    if not rows.height:
        raise ValueError(f"{data}: nothing to test: its few pairs are all support of new users, or were trained on")
    say(rows.write_ndjson().rstrip() if json else results_table(rows))


@app.command(epilog="Example: pluralprefs adapt runs/2026-... --comparisons new_user.jsonl --out user.safetensors")
@plainly
def adapt(
    run: Named,
    comparisons: Annotated[Path, typer.Option(help="Comparisons of one user or of many; an empty file is the prior.")],
    out: Annotated[Path, typer.Option(help="Where the user states go (one safetensors file).")],
    user_id: Annotated[str, typer.Option(help="Name of the user of a file without users.")] = "",
    prior: Annotated[
        str | None, typer.Option(help='One user, from "population" or "community:NAME"; can be asked and updated.')
    ] = None,
    method: Annotated[str, typer.Option(help='"laplace" or "map"; the run\'s own by default.')] = "",
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Adapt to new users from their comparisons, all in one call.

    With --prior the file is of one user and keeps the encoded comparisons behind the state, no texts: `suggest` and
    `ask` need them. Without, it keeps states alone. States that were adapted with --communities are scored with them.
    """
    from pluralprefs.data.files import DataError

    loaded = opened(run, root, seed, communities)
    if not comparisons.is_file():
        raise DataError(f"{comparisons}: no such file; check the path")
    out.parent.mkdir(parents=True, exist_ok=True)
    empty = not comparisons.read_bytes().strip()
    if prior is not None:
        _one(loaded, comparisons, prior, method, user_id, empty).save(out)
        say(f"1 user adapted; state written to {out}")
        return
    found = {} if empty else loaded.adapt(loaded.read(comparisons, allow_empty=True), method=method)
    name = loaded.known_as(user_id) if user_id else ""
    if "" in found:
        found[name] = found.pop("")
        if not user_id:
            warn(f"{comparisons}: rows without a user are taken as one user without a name; --user-id names them")
    elif found and user_id:
        warn(f"{comparisons}: names its own users, so --user-id {user_id} is not used")
    if not found:
        found = {name: loaded.prior()}
    loaded.save_users(out, found)
    say(f"{len(found)} user{'s' if len(found) > 1 else ''} adapted; state written to {out}")


@app.command(
    epilog="Example: pluralprefs score runs/2026-... --user user.safetensors --input pairs.jsonl --out scores.csv"
)
@plainly
def score(
    run: Named,
    data: Annotated[Path, typer.Option("--input", help="Pairs to score; no target needed.")],
    user: Annotated[Path | None, typer.Option(help="User states from `adapt`.")] = None,
    communities: New = None,
    out: Annotated[Path | None, typer.Option(help="Where scores go (.jsonl, .csv, .parquet); else printed.")] = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Rewards, P(first) and uncertainty of each pair, and whose state was used."""
    from pluralprefs.adapted import is_one_user, owned
    from pluralprefs.data.files import write_frame

    loaded = opened(run, root, seed, communities)
    table = loaded.read(data, labelled=False)
    users = loaded.load_users(user) if user else {}
    table = owned(table, users)
    if user and is_one_user(user):
        table = _departing(table, loaded.load_user(user))
    scores = loaded.score(table, users)
    if users and not (scores["user_source"] == "adapted").any():
        warn(f"{user}: none of its users is in {data}")
    if out is None:
        say(scores.write_ndjson().rstrip())
    else:
        write_frame(scores, out)
        say(f"{scores.height} scores written to {out}")


@app.command(epilog="Example: pluralprefs report 7f3a 99b0 --html report.html")
@plainly
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, their names, or parts that no other name has.")],
    html: Annotated[Path, typer.Option(help="Where the page goes: one file, which loads nothing.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Runs",
    root: Root = RUNS,
    debug: Debug = False,
) -> None:
    """Write one page about runs: tables that sort, and pictures."""
    from pluralprefs.registry import find_run
    from pluralprefs.report import write_report

    write_report([find_run(run, root) for run in runs], html, title)
    say(f"{html}: written")


app.command(
    epilog="Examples: pluralprefs profile runs/2026-... --community engineers · "
    "pluralprefs profile runs/2026-... --communities nurses.jsonl · pluralprefs profile runs/2026-... --user ana · "
    "pluralprefs profile runs/2026-... --users user.safetensors"
)(profile)
app.command(
    epilog="Examples: pluralprefs encode my.jsonl --out features · "
    "pluralprefs encode part-*.parquet --encoder models/llama --out features --task 3/16"
)(encode)
app.command(epilog="Example: pluralprefs suggest runs/2026-... --pool pool.jsonl --user user.safetensors -n 5")(suggest)
app.command(epilog="Example: pluralprefs ask runs/2026-... --pool pool.jsonl --user user.safetensors")(ask)
app.command(epilog="Example: pluralprefs choose runs/2026-... --user user.safetensors --input responses.jsonl")(choose)
app.command(
    epilog="Examples: pluralprefs export runs/2026-... --out reward-model · "
    "pluralprefs export runs/2026-... --user user.safetensors --out ana-model"
)(export)
app.command(
    epilog="Examples: pluralprefs serve runs/2026-... --users users.safetensors --port 8000 · curl "
    'localhost:8000/score -d \'{"prompt": "Which tea?", "responses": ["Assam", "Sencha"], "user": "ana"}\''
)(serve)


@data_app.command(epilog="Example: pluralprefs data check my.jsonl")
@plainly
def check(
    data: Annotated[Path, typer.Argument(help="Comparisons: .jsonl, .parquet or .csv.")],
    user_column: UserColumn = "user_id",
    community_column: CommunityColumn = "community_id",
    prompt_column: PromptColumn = "prompt",
    debug: Debug = False,
) -> None:
    """Validate a file and say what is in it."""
    from pluralprefs.data.comparisons import SCHEMA, read_checked, summary

    found = read_checked(data, user=user_column, community=community_column, prompt=prompt_column)
    say(summary(*found))
    others = [name for name in found.table.columns if name not in SCHEMA and not name.startswith("attr:")]
    if others and not found.table["user_id"].count():
        warn(f"{data}: no row names its user; --user-column names the column that does: {', '.join(others)}?")


def _one(loaded: Run, path: Path, prior: str, method: str, user_id: str, empty: bool) -> AdaptedUser:
    """The one user of a file, named by `user_id` where the file does not say."""
    from dataclasses import replace

    user = loaded.adapt(None if empty else loaded.read(path, allow_empty=True), prior=prior, method=method)
    if user.name and user_id:
        warn(f"{path}: names its own user, so --user-id {user_id} is not used")
    return replace(user, name=user.name or (loaded.known_as(user_id) if user_id else ""))


def _departing(table: pl.DataFrame, user: AdaptedUser) -> pl.DataFrame:
    """The user's own pairs depart from the user's community where they name none."""
    import polars as pl

    mine, own = pl.col("user_id") == user.name, user.own(table)
    return table.with_columns(
        pl.when(mine).then(own[name]).otherwise(pl.col(name)).alias(name) for name in table.columns
    )


def _experiments(source: str, only: str | None, root: Path) -> list[Experiment]:
    """The experiments of a file (`experiment`, or `experiments` by name) or of a run."""
    from pluralprefs.describe import resolve
    from pluralprefs.experiment import Experiment
    from pluralprefs.registry import find_run

    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file")
        defined = runpy.run_path(source)
        named: Any = defined.get("experiments", {name: defined[name] for name in ("experiment",) if name in defined})
    else:
        named = {"experiment": resolve(find_run(source, root).read()["experiment"])}
    if not named or not all(isinstance(found, Experiment) for found in named.values()):
        raise ValueError(f"{source}: defines no `experiment`; set experiment = Experiment(...)")
    wanted = only.split(",") if only else list(named)
    unknown = [name for name in wanted if name not in named]
    if unknown:
        raise ValueError(f"{source}: --only {','.join(unknown)}: it has {', '.join(named)}")
    return [named[name] for name in wanted]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
        if len(set(found)) < len(found):
            raise ValueError
        return found
    except ValueError:
        raise ValueError(f"--seeds {text!r}: give different whole numbers with commas, for example 0,1,2") from None


def _finish(folder: RunFolder, wandb: str) -> None:
    """Print the results table, mirror the run, then print the run folder alone on the last line."""
    from pluralprefs.results import results_table

    metrics = folder.table("metrics")
    say(results_table(metrics) if metrics.height else "no comparison is held out for testing, so there are no metrics")
    after(folder, wandb)
    say(str(folder.path))


def main() -> None:
    """Entry point of the `pluralprefs` command."""
    app()
