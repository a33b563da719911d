"""The commands from end to end, on a small table of attribute columns."""

import json
import subprocess
import sys

import polars as pl
import pytest
from tables import write
from typer.testing import CliRunner

from pluralprefs.cli import app


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
