"""The commands from end to end, on a small table of attribute columns."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from malformed import MALFORMED
from tables import write
from typer.testing import CliRunner

from pluralprefs import registry
from pluralprefs.cli import app
from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.describe import describe
from pluralprefs.experiment import Experiment, fingerprint
from pluralprefs.launch import fit
from pluralprefs.models.bradley_terry import BradleyTerry


def own_columns(path, **options):
    """A file whose users are in a column `annotator`."""
    write(path, **options)
    path.write_text(path.read_text("utf8").replace('"user_id"', '"annotator"'), "utf8")
    return path


REFUSED = [case for case in MALFORMED if case.rows is None]
OFTEN = ("one comparison is enough", "a user id may look like a path", "a text of a megabyte is read")
READ = [
    pytest.param(case, id=case.title, marks=() if case.title in OFTEN else pytest.mark.slow)
    for case in MALFORMED
    if case.rows is not None
]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fitted run and its folder."""
    folder = tmp_path_factory.mktemp("cli")
    data = write(folder / "data.jsonl")
    done = call("fit", data, "--model", "bradley_terry", "--encoder", "attributes", "--root", folder / "runs",
                "--set", "shots=[0,4]", "--set", "draws=1", "--set", "users.rounds=2")  # fmt: skip
    assert done.exit_code == 0, done.output + str(done.exception)
    return folder, done.output.strip().splitlines()[-1]


def test_fit_ends_with_the_run_folder_and_lists_it(fitted):
    folder, run = fitted
    assert run.startswith(str(folder / "runs"))
    listed = call("runs", "--root", folder / "runs", "--json")
    assert json.loads(listed.output)["status"] == "done"


def test_score_knows_seen_users_and_says_so(fitted):
    folder, run = fitted
    out = folder / "scores.parquet"
    assert call("score", run, "--input", folder / "data.jsonl", "--out", out).exit_code == 0
    scores = pl.read_parquet(out)
    assert set(scores["user_source"]) <= {"seen", "population"}
    assert (scores["user_source"] == "seen").sum() > 50
    assert scores["probability"].is_between(0, 1).all()
    assert scores["log_odds_std"].min() >= 0


def test_adapt_takes_many_users_or_none_and_score_uses_them(fitted):
    folder, run = fitted
    new = write(folder / "new.jsonl", users=3, per_user=6, seed=9)
    out = folder / "users.safetensors"
    assert "3 users adapted" in call("adapt", run, "--comparisons", new, "--out", out).output
    done = call("score", run, "--user", out, "--input", new)
    assert done.exit_code == 0, done.output
    assert {json.loads(line)["user_source"] for line in done.output.splitlines()} == {"adapted"}
    empty = folder / "empty.jsonl"
    empty.write_text("")
    assert call("adapt", run, "--comparisons", empty, "--out", folder / "prior.safetensors").exit_code == 0


def test_evaluate_prints_cells_and_baselines(fitted):
    folder, run = fitted
    done = call("evaluate", run, "--data", write(folder / "other.jsonl", users=4, seed=3))
    assert done.exit_code == 0, done.output
    assert "length only" in done.output


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "first": "a", "second": "b", "target": 7}\n')
    done = subprocess.run(
        [sys.executable, "-c", "from pluralprefs.cli import main; main()", "fit", bad, "--root", tmp_path / "runs"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "bad.jsonl" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", REFUSED, ids=[case.title for case in REFUSED])
def test_fit_refuses_a_malformed_file_in_one_line_and_leaves_nothing(case, tmp_path):
    path = case.write(tmp_path)
    done = call("fit", path, "--root", tmp_path / "runs")
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(f"pluralprefs: {path}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("column", "value", "says"), [("weight", 0, "column 'weight': all are 0"), ("fold", "test", "no row says train")]
)
def test_fit_refuses_what_teaches_nothing_before_it_encodes(column, value, says, tmp_path):
    data = write(tmp_path / "data.jsonl", users=2, per_user=4, **{column: lambda _: value})
    done = call("fit", data, "--encoder", "attributes", "--root", tmp_path / "runs")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"pluralprefs: {data}: ")
    assert says in done.stderr
    assert not (tmp_path / "runs").exists()
    assert call("data", "check", data).exit_code == 0  # such a file can be evaluated


def test_a_file_can_be_checked_by_the_columns_that_fit_takes(tmp_path):
    data = own_columns(tmp_path / "own.jsonl", users=3, per_user=5)
    done = call("data", "check", data)
    assert "--user-column names the column that does: annotator?" in done.stderr
    assert "users        3;" in call("data", "check", data, "--user-column", "annotator").output


def test_blank_ids_are_nobody(tmp_path):
    data = write(tmp_path / "data.jsonl", users=2, per_user=4)
    data.write_text(data.read_text("utf8").replace('"user 0"', '"  "'), "utf8")
    assert "no user      4 rows" in call("data", "check", data).output


def test_adapt_says_which_file_is_missing_and_makes_the_folder_of_its_result(fitted):
    folder, run = fitted
    done = call("adapt", run, "--comparisons", folder / "nothere.jsonl", "--out", folder / "x.safetensors")
    assert (done.exit_code, "nothere.jsonl: no such file" in done.stderr) == (2, True)
    new = write(folder / "some.jsonl", users=1, per_user=4, seed=2)
    assert call("adapt", run, "--comparisons", new, "--out", folder / "deep" / "x.safetensors").exit_code == 0
    assert (folder / "deep" / "x.safetensors").exists()


def test_attributes_that_are_nothing_like_those_of_training_are_refused(fitted):
    folder, run = fitted
    path = write(folder / "far.jsonl", users=1, per_user=1, seed=2)
    row = json.loads(path.read_text("utf8")) | {"first": "text of its own", "attr:x:first": 1e11}
    path.write_text(json.dumps(row), "utf8")
    done = call("adapt", run, "--comparisons", path, "--out", folder / "far.safetensors")
    assert done.exit_code == 2
    assert "column attr:x: 1e+11 of response" in done.stderr


@pytest.mark.parametrize("case", READ)
def test_fit_gives_a_defined_result_for_an_odd_file(case, tmp_path):
    encoder = Path(__file__).parent / "fixtures" / "bert" / "bert"
    done = call("fit", case.write(tmp_path), "--root", tmp_path / "runs", "--encoder", encoder)
    assert done.exit_code == 0, done.output + done.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert done.output.strip().splitlines()[-1] == str(run)
    assert json.loads((run / "run.json").read_text("utf8"))["status"] == "done"


def test_the_folds_of_a_file_are_honoured(tmp_path):
    data = write(tmp_path / "data.jsonl", fold=lambda row: ("train", "validation", "test")[row % 3])
    done = call("fit", data, "--model", "bradley_terry", "--encoder", "attributes", "--root", tmp_path / "runs",
                "--set", "users.rounds=1")  # fmt: skip
    assert done.exit_code == 0, done.output + done.stderr
    predictions = pl.read_parquet(Path(done.output.strip().splitlines()[-1]) / "predictions.parquet")
    asked = predictions.filter(
        pl.col("model") == "bradley_terry", pl.col("shots").is_null(), pl.col("control").is_null()
    )
    assert asked["example_id"].n_unique() == 8 * 24 // 3


EXPERIMENTS = """
from functools import partial
from pathlib import Path
from pluralprefs import encoders
from pluralprefs.data import comparisons
from pluralprefs.experiment import Experiment
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.users import Pooled

DATA = str(Path(__file__).parent / "data.jsonl")
experiments = {
    name: Experiment(
        data=partial(comparisons.read, DATA), encoder=partial(encoders.load, "attributes"), name=name,
        model=partial(BradleyTerry.init, item_effects=False), users=Pooled(rounds=1, levels=levels), shots=(0, 2),
        draws=1, controls=False,
    )
    for name, levels in (("pooled", ("user",)), ("shared", ()))
}
"""


def test_train_runs_some_of_a_file_with_seeds_and_settings_and_repeats_a_run(tmp_path):
    write(tmp_path / "data.jsonl")
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)
    root = tmp_path / "runs"
    done = call("train", tmp_path / "experiments.py", "--only", "shared", "--seeds", "0,3", "--set", "users.rounds=2",
                "--root", root)  # fmt: skip
    assert done.exit_code == 0, done.output + done.stderr
    [run] = root.iterdir()
    content = json.loads((run / "run.json").read_text("utf8"))
    assert content["seeds"] == [0, 3]
    assert content["model"] == "shared"
    assert set(pl.read_parquet(run / "predictions.parquet")["seed"]) >= {0, 3}
    again = call("train", run, "--root", root)
    assert again.exit_code == 0, again.output + again.stderr
    other = Path(again.output.strip().splitlines()[-1])
    assert other != run
    assert pl.read_parquet(other / "predictions.parquet").equals(pl.read_parquet(run / "predictions.parquet"))
    assert "nothing to resume" in call("train", run, "--resume").output
    assert "only backbone.mesh and encoder.mesh may" in call("train", run, "--resume", "--set", "users.rounds=1").stderr
    for mistake in (("--only", "none"), ("--set", "users.roundz=1"), ("--seeds", "a")):
        wrong = call("train", tmp_path / "experiments.py", *mistake, "--root", root)
        assert wrong.exit_code == 2
        assert len(wrong.stderr.strip().splitlines()) == 1
    assert len(list(root.iterdir())) == 2


def test_a_seed_or_a_root_that_is_not_there_is_said(fitted, tmp_path):
    folder, run = fitted
    done = call("score", run, "--input", write(folder / "seeds.jsonl", users=2, seed=5), "--seed", 7)
    assert done.exit_code == 2
    assert "not fitted with seed 7" in done.output
    assert call("score", run, "--input", folder / "seeds.jsonl", "--seed", 0).exit_code == 0
    assert "no such folder" in call("runs", "--root", tmp_path / "nope").output
    assert "--root" in call("train", run, "--resume", "--root", tmp_path).output


def test_a_run_may_be_named_by_a_part_of_its_name_everywhere(tmp_path, monkeypatch):
    experiment = Experiment(data=partial(comparisons.read, "x"), model=BradleyTerry.init, name="m")
    with registry.create(tmp_path / "runs", ("m", "d"), describe(experiment)) as run:
        pass
    part, asked = run.name[-4:], []

    def found(what, *_, **__):
        asked.append(what)
        raise ValueError("asked for")

    for name in ("run.load", "launch.record", "launch.go_on"):
        monkeypatch.setattr(f"pluralprefs.{name}", found)
    for command in (
        ["adapt", part, "--comparisons", "x", "--out", "y"], ["score", part, "--input", "x"],
        ["evaluate", part, "--data", "x"], ["profile", part, "--user", "all"], ["suggest", part, "--pool", "x"],
        ["ask", part, "--pool", "x", "--user", "y"], ["choose", part, "--input", "x"], ["train", part],
    ):  # fmt: skip
        assert "asked for" in call(*command, "--root", tmp_path / "runs").stderr
        none = f"{part}: no run folder, and no run in {tmp_path} has this in its name"
        assert none in call(*command, "--root", tmp_path).stderr
    assert asked[:-1] == [run.path] * 7
    assert describe(asked[-1]) == describe(experiment)
    assert "has no table 'attribute_weights'" in call("profile", part, "--root", tmp_path / "runs").stderr
    monkeypatch.chdir(tmp_path)
    assert "asked for" in call("train", part, "--resume").stderr
    assert asked[-1] == Path("runs") / run.name
    assert "absent.py: no such file" in call("train", "absent.py").stderr


def test_score_falls_back_to_the_prior_and_says_so(tmp_path):
    data = write(tmp_path / "data.jsonl", community_id=lambda row: "even" if row % 2 else "odd")
    done = call("fit", data, "--model", "bradley_terry", "--encoder", "attributes", "--root", tmp_path / "runs",
                "--set", "users.rounds=1", "--set", 'users.levels=["community","user"]')  # fmt: skip
    assert done.exit_code == 0, done.output + done.stderr
    run = done.output.strip().splitlines()[-1]
    community = lambda row: ("even", "unheard of", "odd")[row]  # noqa: E731
    asked = write(
        tmp_path / "asked.jsonl", users=1, per_user=3, community_id=community, user_id=lambda row: f"new {row}"
    )
    scored = call("score", run, "--input", asked)
    sources = [json.loads(line)["user_source"] for line in scored.output.splitlines()]
    assert sources == ["community", "population", "community"]


@pytest.mark.slow
def test_the_columns_and_ids_of_a_fit_hold_for_the_other_commands(tmp_path):
    data = own_columns(tmp_path / "data.jsonl")
    done = call("fit", data, "--model", "bradley_terry", "--encoder", "attributes", "--root", tmp_path / "runs",
                "--set", "users.rounds=1", "--user-column", "annotator", "--keep-ids")  # fmt: skip
    assert done.exit_code == 0, done.output + done.stderr
    run = done.output.strip().splitlines()[-1]
    new = own_columns(tmp_path / "new.jsonl", users=3, per_user=5, seed=4)
    assert "3 users adapted" in call("adapt", run, "--comparisons", new, "--out", tmp_path / "u.safetensors").output
    scores = [json.loads(line) for line in call("score", run, "--input", data).output.splitlines()]
    assert {row["user_id"] for row in scores} == {f"user {i}" for i in range(8)}
    assert sum(row["user_source"] == "seen" for row in scores) > 50


def test_evaluate_tells_kept_users_from_new_ones_and_leaves_trained_pairs_out(fitted):
    folder, run = fitted
    cells = lambda path: {  # noqa: E731
        (row["cell"], row["count"])
        for row in map(json.loads, call("evaluate", run, "--data", path, "--json").output.splitlines())
        if row["metric"] == "accuracy" and row["model"] == "bradley_terry" and row["control"] is None
    }
    new = folder / "others.jsonl"
    write(new, users=4, seed=3, user_id="other {}".format)
    assert {cell for cell, _ in cells(new)} == {"unseen/testpair"}
    again = cells(folder / "data.jsonl")  # the file of the fit: what was trained on tests nothing
    assert {cell for cell, _ in again} == {"seen/testpair", "unseen/testpair"}
    assert sum(count for cell, count in again if cell == "seen/testpair") < 8 * 24 / 2


def test_a_table_in_memory_is_read_like_a_file(tmp_path):
    frame = pl.read_ndjson(write(tmp_path / "data.jsonl")).rename({"user_id": "annotator"})
    with pytest.raises(TypeError):
        fit(frame, model="bradley_terry", encoder="attributes", root=tmp_path, nonsense=3)
    run = fit(frame, model="bradley_terry", encoder="attributes", root=tmp_path, user="annotator", progress=False,
              overrides=["users.rounds=1", "shots=[0]"])  # fmt: skip
    assert all(name.startswith("u_") for name in run.vocabulary.users)
    posterior = run.prior().replace(base="another model")
    table = comparisons.from_trl(frame, user="annotator")
    with pytest.raises(DataError, match="another model"):
        run.score(table, {table["user_id"][0]: posterior})


def test_a_change_of_any_column_changes_the_fingerprint(tmp_path):
    table = comparisons.read(write(tmp_path / "data.jsonl"))
    other = table.with_columns(pl.col("attr:x:first") * 2)
    assert fingerprint(other) != fingerprint(table) == fingerprint(table.reverse())
