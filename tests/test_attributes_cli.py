"""`pluralprefs attributes` from texts to stored scores, with the lexicon and a toy encoder."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from pluralprefs.attributes import fitting
from pluralprefs.attributes.store import AttributeStore
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


def test_without_a_file_the_answers_of_the_lexicon_are_rewritten(tmp_path):
    done = call("rewrite", "--folder", tmp_path, "--attributes", "humor", "--per-community", 2)
    assert "10 rewrites of 2 responses" in done.output


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
    from pluralprefs.attributes.catalog import CATALOG, load

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
