"""`suggest`, `ask` and `choose` as somebody at a terminal meets them; every answer is on disk at once."""

import json
import os
import pty
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from handmade import handmade
from tables import write
from typer.testing import CliRunner

from pluralprefs import cli, users_cli
from pluralprefs.adapted import AdaptedUser
from pluralprefs.cli import app
from pluralprefs.data import comparisons
from pluralprefs.users import ravel


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run, and a pool of pairs without targets in `pool.jsonl`."""
    path = write(tmp_path / "pool.jsonl", users=1, per_user=30, seed=3)
    table = comparisons.read(path)
    lines = [json.loads(line) for line in path.read_text("utf8").splitlines()]
    for line in lines:
        del line["target"], line["user_id"]
    path.write_text("\n".join(map(json.dumps, lines)), "utf8")
    made = handmade(table)
    for module in (cli, users_cli):
        monkeypatch.setattr(module, "opened", lambda *_: made)
    return made


def call(*arguments, said=None):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=said)
    if done.exit_code == 1:
        raise done.exception
    return done


def state(user):
    return np.asarray(ravel(user.posterior.mean)[0])


def test_suggest_prints_the_best_questions_of_a_pool(run, tmp_path):
    done = call("suggest", "RUN", "--pool", tmp_path / "pool.jsonl", "-n", 3)
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert len(rows) == 3
    assert rows[0]["gain"] >= rows[1]["gain"] >= rows[2]["gain"] > 0
    out = tmp_path / "next.parquet"
    assert "5 pairs written" in call("suggest", "RUN", "--pool", tmp_path / "pool.jsonl", "--rule", "random", "--out",
                                     out).output  # fmt: skip
    assert pl.read_parquet(out)["example_id"].n_unique() == 5
    wrong = call("suggest", "RUN", "--pool", tmp_path / "pool.jsonl", "--rule", "guess")
    assert (wrong.exit_code, len(wrong.stderr.strip().splitlines())) == (2, 1)


def test_a_session_asks_saves_skips_undoes_and_goes_on(run, tmp_path):
    file = tmp_path / "u.safetensors"
    arguments = ("ask", "RUN", "--pool", tmp_path / "pool.jsonl", "--user", file)
    done = call(*arguments, said="1\nwhat?\n2\ns\nt\nu\nq\n")
    assert done.output.count("[1] first") == 2  # once at the start, once where nobody understood
    assert "2 comparisons, 1 skipped" in done.output
    assert done.output.count("nothing moved") == 1  # by what was skipped
    user = run.load_user(file)
    assert user.rows.target.tolist() == [1.0, 0.0, 0.5]
    assert user.rows.weight.tolist() == [1.0, 1.0, 0.0]
    done = call(*arguments, said="t\n2\n")  # the end of the input is a quit
    assert "goes on after 2 comparisons, 1 skipped" in done.output
    again = run.load_user(file)
    assert again.pairs[:3] == user.pairs
    assert len(set(again.pairs)) == 5
    assert again.rows.tie.tolist() == [False, False, False, True, False]
    pool = run.read(tmp_path / "pool.jsonl", labelled=False)
    answers = dict(zip(again.ids, again.rows.target.tolist(), strict=True))
    judged = pool.filter(pl.col("example_id").is_in(list(answers)) & (pl.col("example_id") != again.ids[2]))
    judged = judged.with_columns(
        weight=pl.lit(1.0), target=pl.col("example_id").replace_strict(answers, return_dtype=pl.Float64)
    )
    np.testing.assert_allclose(state(again), state(run.adapt(judged, prior="population")), atol=1e-6)
    undone = call(*arguments, said="u\nq\n")
    assert "was said before this session: [u] again" in undone.output
    assert len(run.load_user(file).ids) == 5  # one key takes back nothing that was there before
    undone = call(*arguments, said="u\n" * 7 + "q\n")
    assert "nothing to undo" in undone.output
    assert run.load_user(file).ids == ()


def test_a_user_of_a_community_is_adapted_and_scored_from_there(run, tmp_path):
    said = write(tmp_path / "said.jsonl", users=1, per_user=6, seed=5)
    file, pool = tmp_path / "u.safetensors", tmp_path / "pool.jsonl"
    done = call("adapt", "RUN", "--comparisons", said, "--prior", "community:b", "--out", file)
    assert "1 user adapted" in done.output
    user = run.load_user(file)
    scored = [json.loads(line) for line in call("score", "RUN", "--user", file, "--input", pool).output.splitlines()]
    table = run.read(pool, labelled=False)
    for expected, alike in ((run.score(table, user=user), True), (run.score(table, {"": user.posterior}), False)):
        assert np.allclose([row["log_odds"] for row in scored], expected["log_odds"], atol=1e-6) == alike
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    call("adapt", "RUN", "--comparisons", empty, "--prior", "population", "--user-id", "ana", "--out", file)
    assert run.load_user(file).name == run.known_as("ana")


def test_an_answer_is_on_disk_before_the_next_question(run, tmp_path, monkeypatch):
    """A terminal that is closed in the middle: whatever was answered is there."""
    file, saved = tmp_path / "u.safetensors", []
    whole = users_cli._answer

    def watched(question):
        saved.append(len(run.load_user(file).ids) if file.exists() else 0)
        if len(saved) == 4:
            raise KeyboardInterrupt
        return whole(question)

    monkeypatch.setattr(users_cli, "_answer", watched)
    CliRunner().invoke(
        app, ["ask", "RUN", "--pool", str(tmp_path / "pool.jsonl"), "--user", str(file)], input="1\n2\n1\n"
    )
    assert saved == [0, 1, 2, 3]
    assert len(run.load_user(file).ids) == 3
    assert not list(tmp_path.glob(".*tmp"))


def test_a_session_ends_with_its_pool_and_shows_what_moved(run, tmp_path):
    pool = tmp_path / "pool.jsonl"
    lines = pool.read_text("utf8").splitlines()
    pool.write_text("\n".join(lines[:2]), "utf8")
    done = call("ask", "RUN", "--pool", pool, "--user", tmp_path / "u.safetensors", said="1\n1\n")
    assert "nothing is left to ask" in done.output
    assert "linear x " in done.output
    assert "gain " in done.output
    assert "(was +0.00, +-" in done.output
    again = call("ask", "RUN", "--pool", pool, "--user", tmp_path / "u.safetensors", said="1\nu\nu\n2\n")
    assert again.output.count("nothing is left to ask: [u] undo") == 3  # an answer says nothing there
    assert sorted(run.load_user(tmp_path / "u.safetensors").rows.target.tolist()) == [0.0, 1.0]
    pool.write_text("", "utf8")
    assert call("ask", "RUN", "--pool", pool, "--user", tmp_path / "u.safetensors", said="").output.count(">") == 0


@pytest.mark.parametrize("command", ["ask", "suggest"])
def test_a_user_file_that_begins_elsewhere_is_refused(command, run, tmp_path):
    file, pool = tmp_path / "u.safetensors", tmp_path / "pool.jsonl"
    call("ask", "RUN", "--pool", pool, "--user", file, said="1\n")
    asked = [command, "RUN", "--pool", str(pool), "--user", str(file)]
    done = CliRunner().invoke(app, [*asked, "--prior", "community:elsewhere"], input="1\n")
    assert done.exit_code == 2
    assert "u.safetensors: begins at population, not at community:elsewhere: leave --prior out" in done.stderr
    assert len(run.load_user(file).ids) == 1
    assert CliRunner().invoke(app, [*asked, "--prior", "population"], input="q\n").exit_code == 0


def test_a_terminal_can_hold_the_session():
    """Keys through a pseudo-terminal reach the loop that reads them."""
    program = (
        "import polars as pl; from pluralprefs.users_cli import _answer\n"
        "row = pl.DataFrame({'prompt': ['Which?'], 'first': ['a'], 'second': ['b']})\n"
        "print('said', _answer(row), _answer(row))"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.write(ours, b"x\nT\n\x04")  # a key that means nothing, a tie, the end of the input
        output, _ = process.communicate(timeout=60)
    os.close(ours)
    assert output.splitlines()[-1].endswith("said t q")


def test_choose_ranks_the_responses_to_each_prompt(run, tmp_path):
    rows = [{"prompt": p, "response": f"r{i}", "attr:x": i - 1.0, "attr:y": p_number * i}
            for p_number, p in enumerate(("One?", "Two?")) for i in range(3)]  # fmt: skip
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf8")
    done = call("choose", "RUN", "--input", path, "--rule", "mean")
    found = pl.DataFrame([json.loads(line) for line in done.output.splitlines()])
    assert found["prompt"].to_list() == ["One?"] * 3 + ["Two?"] * 3
    assert found["rank"].to_list() == [1, 2, 3] * 2
    user: AdaptedUser = run.adapt(prior="population")
    given = pl.DataFrame(rows[3:]).drop("prompt")
    expected = run.score("Two?", given, user=user).sort("log_odds", descending=True)
    assert found["response"][3:].to_list() == expected["response"].to_list()
    path.write_text('{"prompt": "One?", "text": "r"}', "utf8")
    assert "column 'response' is missing" in call("choose", "RUN", "--input", path).stderr
