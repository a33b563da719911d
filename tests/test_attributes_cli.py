"""`pluralprefs attributes` from texts to stored scores, with the lexicon and a toy encoder, or with a chat server."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from chat_server import blocks, running
from tables import tiny_llama
from typer.testing import CliRunner

from pluralprefs.attributes import fitting
from pluralprefs.attributes.catalog import CATALOG, load
from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.attributes.store import AttributeStore
from pluralprefs.attributes.teacher import QUESTIONS
from pluralprefs.cli import app
from pluralprefs.data.lexicon import corpus


def call(*arguments):
    return CliRunner().invoke(app, ["attributes", *(str(argument) for argument in arguments)])


def letters(texts):
    """A toy encoder: how often each letter occurs, and the length."""
    rows = [[text.lower().count(chr(97 + i)) / 10 for i in range(26)] + [len(text) / 100] for text in texts]
    return np.asarray(rows, np.float32).reshape(len(texts), 27)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(fitting, "embedder", lambda name: letters)


def test_the_commands_go_from_texts_to_stored_scores(tmp_path, toy):
    data, folder = tmp_path / "data.parquet", tmp_path / "palette"
    corpus(users=4, communities=2, comparisons_per_user=3).write_parquet(data)
    names = "verbosity,politeness,security"
    rewrite = ("rewrite", data, "--folder", folder, "--attributes", names, "--per-community", 3)
    dry = call(*rewrite, "--dry-run")
    assert "calls" in dry.output, dry.output + dry.stderr
    assert not folder.exists()
    for command in (rewrite, *((name, "--folder", folder) for name in ("verify", "pairs", "train", "embed"))):
        done = call(*command)
        assert done.exit_code == 0, f"{command}: {done.output} {done.stderr} {done.exception!r}"
        assert str(folder)[:20] in done.output.replace("\n", "")
    again = call(*rewrite)
    assert "90 of them cached" in again.output
    accuracy = pl.read_parquet(folder / "accuracy.parquet")
    assert accuracy.filter(attribute="verbosity", split="heldout_responses", gap=4)["accuracy"].item() == 1.0
    assert call("embed", data, "--folder", folder).exit_code == 0
    store = AttributeStore.open(folder / "store")
    assert store.names == ("politeness", "security", "verbosity")
    table = pl.read_parquet(data)
    ids = [f"{p}/{i}" for p, i in table.select("prompt_id", "first_id").iter_rows()]
    assert store.lookup(ids, store.names).mask.all()


def test_an_adapter_of_each_attribute_is_trained_and_read_by_the_predictors(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "llama")
    draw = np.random.default_rng(0)
    rows = []
    for attribute, letter in (("security", "a"), ("humor", "e")):
        for number in range(60):
            other = " ".join(draw.choice([*"bcdfgh"], 4))
            split = "train" if number < 40 else "validation" if number < 50 else "heldout_responses"
            rows.append((f"r{number}", attribute, 0, 4, other, f"{other} {letter} {letter}", 4, split))
    columns = ["response_id", "attribute", "low", "high", "low_text", "high_text", "gap", "split"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(tmp_path / "pairs.parquet")
    monkeypatch.setenv("PLURALPREFS_CACHE", str(tmp_path / "cache"))
    done = call(
        "train", "--folder", tmp_path, "--encoder", tmp_path / "llama", "--adapters", 2, "--steps", 40, "--width", 2
    )
    assert done.exit_code == 0, f"{done.output} {done.stderr} {done.exception!r}"
    assert "2 adapters written to" in done.output.replace("\n", " ")
    found = AttributePredictors.load(tmp_path / "predictors.safetensors")
    [adapters] = tmp_path.glob("adapters-*")
    assert found.encoder == str(adapters)
    assert found.maps is None
    scores = found.scores(fitting.embedder(found.encoder)(["b c a a", "b c e e", "b c d"]))
    assert found.names == ("humor", "security")
    assert np.argmax(scores, axis=0).tolist() == [1, 0]  # each reads its own letter
    accuracy = pl.read_parquet(tmp_path / "accuracy.parquet").filter(split="heldout_responses", gap=4)
    assert accuracy["accuracy"].min() > 0.9


def test_without_a_file_the_answers_of_the_lexicon_are_rewritten(tmp_path):
    done = call("rewrite", "--folder", tmp_path, "--attributes", "humor", "--per-community", 2)
    assert "140 rewrites of 28 responses" in done.output  # of 14 topics, some of which are held out
    responses = pl.read_parquet(tmp_path / "responses.parquet")
    topics = {fold: set(part["community_id"]) for (fold,), part in responses.group_by("fold")}
    assert topics["heldout_communities"]
    assert not topics["heldout_communities"] & topics["train"]


POLITENESS = CATALOG["politeness"]
HIGHER = [question.format(**vars(POLITENESS)) for (way, _), question in QUESTIONS.items() if way == "higher"]
CALLS = {"rewrite": 5, "verify": 10 * 8 + 5}  # of one response at one attribute
MOST = {"rewrite": 5 * 512, "verify": 5 * 32}  # completion tokens of five attempts at one call


def honest(body):
    """Rewrite at a level as that many kind words, and count them when judging."""
    asked, texts = body["messages"][-1]["content"], blocks(body)
    if level := re.search(r"stands at level (\d)", asked):
        return json.dumps({"rewrite": texts[-1] + " kindly" * (int(level[1]) - 1)})
    if '{"answer"' in asked:
        first_has_more = texts[-2].count("kindly") > texts[-1].count("kindly")
        higher = any(question in asked for question in HIGHER)
        return json.dumps({"answer": "first" if first_has_more == higher else "second"})
    return json.dumps({"score": 5})


@pytest.fixture
def server(monkeypatch):
    """A chat server that the environment names, with its model and key."""
    with running(honest) as one:
        monkeypatch.setenv("PLURALPREFS_TEACHER", one.url)
        monkeypatch.setenv("PLURALPREFS_TEACHER_MODEL", "a-model")
        monkeypatch.setenv("PLURALPREFS_TEACHER_KEY", "the-key")
        yield one


def one_response(command, folder, *more):
    """The arguments of `rewrite` or `verify` for one response."""
    if command == "rewrite":
        data = folder / "one.jsonl"
        data.write_text('{"prompt": "Tea?", "first": "Assam, for two.", "second": "Sencha, for one.", "target": 1}\n')
        more = (data, "--attributes", "politeness", "--per-community", 1, *more)
    return command, "--folder", folder, *more


def test_a_server_is_asked_for_rewrites_and_judgements_from_the_command_line(server, tmp_path):
    for command, calls in CALLS.items():
        before = len(server.bodies)
        dry = call(*one_response(command, tmp_path, "--dry-run", "--price", "2,8"))
        assert dry.exit_code == 0, dry.stderr
        assert f"{calls} calls" in dry.output
        assert "never over" in dry.output
        assert len(server.bodies) == before
        done = call(*one_response(command, tmp_path))
        assert done.exit_code == 0, f"{done.output} {done.stderr}"
        assert len(server.bodies) == before + calls
    assert {body["model"] for body in server.bodies} == {"a-model"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer the-key"}
    assert pl.read_parquet(tmp_path / "verified.parquet")["agreement"].to_list() == [1.0] * 10
    done = call("pairs", "--folder", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert pl.read_parquet(tmp_path / "pairs.parquet").height == 10
    assert call(*one_response("rewrite", tmp_path, "--model", "another")).exit_code == 0
    assert server.bodies[-1]["model"] == "another"  # the command line goes before the environment


@pytest.mark.parametrize("command", CALLS)
def test_a_command_stops_at_its_cost_limit_and_goes_on_with_a_higher_one(server, tmp_path, command):
    if command == "verify":
        assert call(*one_response("rewrite", tmp_path)).exit_code == 0
    before, calls, half = len(server.bodies), CALLS[command], CALLS[command] // 2
    server.usage = (0, MOST[command])
    dear = ("--price", f"0,{1e6 / MOST[command]}")  # a call costs 1
    stopped = call(*one_response(command, tmp_path, *dear, "--max-cost", half))
    assert stopped.exit_code == 2
    assert f"max_cost={half}: stopped after {half} of {calls} tasks, {half}.0000 spent" in stopped.stderr
    assert "answers.jsonl: raise the limit to go on" in stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1
    assert len(server.bodies) == before + half
    assert call(*one_response(command, tmp_path, *dear, "--max-cost", calls)).exit_code == 0
    assert len(server.bodies) == before + calls


def test_a_command_that_was_killed_at_half_and_run_again_calls_as_often_as_one_that_was_not(server, tmp_path):
    assert call(*one_response("rewrite", tmp_path)).exit_code == 0
    before, cache = len(server.bodies), tmp_path / "answers.jsonl"
    half = before + CALLS["verify"] // 2
    server.hold_after = half
    code = "from pluralprefs.cli import main; main()"
    arguments = ["attributes", *map(str, one_response("verify", tmp_path))]
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 60
        while not (cache.read_bytes().count(b"\n") == half and len(server.bodies) == half + 8):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    assert not (tmp_path / "judgements.parquet").exists()
    server.hold_after = None
    done = call(*one_response("verify", tmp_path))
    assert done.exit_code == 0, done.stderr
    assert server.answered == before + CALLS["verify"]  # the eight under way at the kill never got an answer
    assert pl.read_parquet(tmp_path / "verified.parquet")["agreement"].to_list() == [1.0] * 10


def test_a_mistake_is_one_line(tmp_path):
    mistakes = {
        ("verify",): "attributes rewrite",
        ("pairs",): "attributes verify",
        ("train",): "attributes pairs",
        ("embed",): "attributes train",
        ("rewrite", "--attributes", "humour"): "did you mean 'humor'",
        ("rewrite", "--teacher", "nobody"): "use lexicon, or an address",
        ("rewrite", "--teacher", "http://localhost:1/v1"): "--model",
        ("rewrite", "--price", "cheap"): "two numbers",
        ("rewrite", "--max-cost", 3): "price",
        ("pairs", "--levels", "a"): "two levels",
    }
    for arguments, message in mistakes.items():
        done = call(*arguments, "--folder", tmp_path)
        assert done.exit_code == 2, arguments
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_set_of_ones_own_goes_with_the_folder(tmp_path):
    own = tmp_path / "own.toml"
    one = replace(CATALOG["politeness"], definition="how kind the words are")
    lines = [f"{name} = {value!r}" for name, value in vars(one).items() if name != "levels"]
    own.write_text("\n".join(["[[attributes]]", *lines, f"levels = {list(one.levels)!r}"]), "utf8")
    done = call("rewrite", "--folder", tmp_path, "--catalog", own, "--per-community", 1)
    assert done.exit_code == 0, done.stderr
    assert load(tmp_path / "attributes.json") == {"politeness": one}


@pytest.mark.parametrize("command", ["rewrite", "verify", "pairs", "train", "embed"])
def test_every_command_says_how_it_is_called(command):
    assert f"pluralprefs attributes {command}" in " ".join(call(command, "--help").output.split())
