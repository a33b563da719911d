"""Attributes of a run from predictors that read the texts, or from a store, end to end and by name."""

import sys
from dataclasses import replace
from functools import partial
from string import ascii_lowercase

import jax
import numpy as np
import polars as pl
import pytest
from test_attributes_cli import call, letters
from typer.testing import CliRunner

import pluralprefs as pp
from pluralprefs.attributes import fitting, source
from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.attributes.store import write_store
from pluralprefs.cli import app
from pluralprefs.data import batches, comparisons
from pluralprefs.data.files import DataError
from pluralprefs.data.ids import MESSAGES
from pluralprefs.data.lexicon import attributes, palette, palette_world
from pluralprefs.encoders.tokens import plain
from pluralprefs.experiment import fingerprint, new_model, prepare
from pluralprefs.models.attribute_attention import AttributeAttention
from pluralprefs.run import load
from pluralprefs.types import Item

NAMES = ("length", "vowels")


def known_predictors():
    """Two attributes of letter counts: length of the text, and how often it says a, e, i, o or u."""
    weight = np.zeros((2, 27), np.float32)
    weight[0, 26] = 1.0
    weight[1, [0, 4, 8, 14, 20]] = 1.0
    return AttributePredictors(
        NAMES, "toy", np.zeros(27, np.float32), 1.0, weight, np.ones(2, np.float32), np.zeros(2, np.float32),
        np.zeros((2, 27, 1), np.float32), np.zeros((2, 1), np.float32),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as `attributes train` and `embed` leave it, and the toy encoder wherever one is loaded."""
    for module in (fitting, source):
        monkeypatch.setattr(module, "embedder", lambda name: letters)
    known_predictors().save(tmp_path / source.PREDICTORS)
    return tmp_path


def table():
    rows = {"prompt": "p", "first": ["aa", "bcd", "eee"], "second": ["b", "aeiou", None], "user_id": "u", "target": 1.0}
    return comparisons.from_trl(pl.DataFrame(rows).with_columns(pl.col("second").fill_null("")))


def test_predicted_attributes_are_the_predictors_of_each_text(folder):
    items = batches.item_table(table())
    found = source.predicted(folder)
    values, mask = found.attributes(items)
    assert values.shape == (items.height, 2, 2)
    assert mask.all()
    text = items["text"].to_list()
    np.testing.assert_allclose(values[:, 0, 0], [len(one) / 100 for one in text], rtol=1e-6)
    np.testing.assert_allclose(values[:, 1, 0], [sum(one.count(v) for v in "aeiou") / 10 for one in text], rtol=1e-6)
    swapped, _ = source.predicted(folder, names=["vowels", "length"]).attributes(items)
    np.testing.assert_array_equal(swapped, values[:, ::-1])


def test_a_response_without_text_has_no_attributes(folder):
    items = batches.item_table(table()).with_columns(
        text=pl.when(pl.col("text") == "aa").then(None).otherwise(pl.col("text"))
    )
    values, mask = source.predicted(folder).attributes(items)
    none = items["text"].is_null().to_numpy()
    assert none.sum() == 1
    assert (~mask[none]).all()
    assert mask[~none].all()
    assert (values[none] == 0).all()


def test_messages_without_content_have_no_attributes_either(folder):
    contents = [[None], [None, None], ["aa"], [None, "aa"]]
    chats = [[{"role": "assistant", "content": content} for content in one] for one in contents]
    items = pl.DataFrame({"text": pl.Series(chats, dtype=MESSAGES)})
    values, mask = source.predicted(folder).attributes(items)
    assert mask[:, 0].tolist() == [False, False, True, True]
    assert (values[:2] == 0).all()
    lines = ["", "assistant: \nassistant: ", "aa", "assistant: \nassistant: aa"]
    assert [plain(chat) for chat in chats] == lines
    np.testing.assert_allclose(values[2:, 0, 0], [len(line) / 100 for line in lines[2:]], rtol=1e-6)


@pytest.mark.parametrize(("command", "name"), [("embed", "responses"), ("verify", "responses"), ("verify", "rewrites")])
def test_a_text_that_is_missing_is_one_line_that_names_its_place(folder, command, name):
    columns = {"response_id": ["a/1", "a/2"], "text": ["Rest.", "Run."], "prompt": "What now?"}
    whole = pl.DataFrame(columns)
    for table in ("responses", "rewrites"):
        text = pl.Series("text", ["Rest.", None]) if table == name else whole["text"]
        whole.with_columns(text).write_parquet(folder / f"{table}.parquet")
    done = call(command, "--folder", folder)
    assert done.exit_code == 2
    assert f"{name}.parquet: row 2, column 'text': is missing; write a text" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_stored_attributes_are_found_by_key_and_masked_where_missing(folder):
    items = batches.item_table(table())
    some = items.head(3)
    write_store(folder / "store", some["item_key"].to_list(), letters(some["text"].to_list()), known_predictors())
    values, mask = source.stored(folder).attributes(items)
    live, _ = source.predicted(folder).attributes(items)
    there = items["item_key"].is_in(some["item_key"].implode()).to_numpy()
    np.testing.assert_allclose(values[there], live[there], rtol=2**-7)
    np.testing.assert_array_equal(values[there][..., 0], live[there][..., 0])  # a score is float32
    assert mask[there].all()
    assert not mask[~there].any()
    with pytest.raises(DataError, match="no attribute 'warmth'"):
        source.stored(folder, names=["warmth"])
    with pytest.raises(DataError, match="holds none of these"):
        source.stored(folder).attributes(items.with_columns(item_key=pl.lit("x/") + pl.col("item_key")))


def judgements(count=240):
    """Two communities that disagree about vowels; the columns that stand for an encoder say nothing."""
    draw = np.random.default_rng(0)
    words = ["tea", "nth", "queue", "rhythm", "area", "shh", "audio", "myth"]
    noise = {text: draw.normal() for text in words}
    rows = []
    for n in range(count):
        first, second = draw.choice(words, 2, replace=False)
        more = sum(first.count(v) - second.count(v) for v in "aeiou")
        group = "yes" if n % 2 else "no"
        target = float((more > 0) == (group == "yes"))
        rows.append((f"p{n % 4}", str(first), str(second), target, f"u{n % 6}", group, noise[first], noise[second]))
    columns = ["prompt", "first", "second", "target", "user_id", "community_id", "attr:x:first", "attr:x:second"]
    return pl.DataFrame(rows, schema=columns, orient="row")


@pytest.mark.slow
def test_a_run_keeps_its_predictors_scores_new_texts_and_profiles_users(folder, monkeypatch):
    data = folder / "data.parquet"
    judgements().write_parquet(data)
    few = ["epochs=5", "shots=[0,4]", "draws=1", "users.rounds=2", "users.cross_fit=null", "controls=false",
           "refit=false", "model.stand_in=true"]  # fmt: skip
    run = pp.fit(data, model="attribute_attention", encoder="attributes", attributes=folder, root=folder / "runs",
                 overrides=few, progress=False)  # fmt: skip
    assert (run.folder.path / source.PREDICTORS).is_file()
    assert run.attributes.names == NAMES
    (folder / source.PREDICTORS).unlink()  # a run does not need the folder that it was fitted from
    again = load(run.folder.path)
    rows = {"prompt": ["p0"] * 2, "first": ["aeiou", "shh shh"], "second": ["nth", "oui oui"], "user_id": "z",
            "community_id": ["yes", "no"], "attr:x:first": 0.0, "attr:x:second": 0.0, "target": 1.0}  # fmt: skip
    new = comparisons.from_trl(pl.DataFrame(rows))
    scores = [one.score(new)["log_odds"] for one in (run, again)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert (scores[0] > 0).all()  # "yes" likes vowels, "no" does not
    without = load(run.folder.path, attributes=False)
    assert without.attributes is None
    assert without.fingerprint == again.fingerprint
    item = jax.tree.map(lambda x: x[0], again.arrays(new)[0])
    state = without.users.population
    masked = item.replace(attribute_mask=item.attribute_mask & False)
    bare = item.replace(attributes=None, attribute_mask=None)
    assert float(without.model.reward(state, bare)) == float(again.model.reward(state, masked))
    assert without.arrays(new)[0].attributes is None
    assert without.score(new)["log_odds"].is_finite().all()
    profile = again.profile()
    assert set(profile["kind"]) == {"preference", "attention"}
    assert profile["user"].n_unique() == len(set(np.asarray(again.rows.user)))
    run_of_folders = sys.modules["pluralprefs.run"]  # pp.run is the function
    adapt, adapted = run_of_folders.adapt_units, []
    with monkeypatch.context() as patch:
        patch.setattr(run_of_folders, "adapt_units", lambda *given: adapted.append(set(given[4])) or adapt(*given))
        two = again.profile(again.vocabulary.users[2:4])
    assert adapted == [{2, 3}]  # nobody else is solved
    whole = profile.filter(pl.col("user").is_in(again.vocabulary.users[2:4]))
    np.testing.assert_allclose(two["mean"], whole["mean"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(two["ci_low"], whole["ci_low"], rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match="user 'nobody': is no user of the training data"):
        again.profile(["nobody"])
    for wrong in (lambda: again.profile("u1"), lambda: again.profile(["u1"], community="yes")):
        with pytest.raises(TypeError, match="a list of names"):
            wrong()
    assert again.profile(again.adapt(new), community="yes")["community"].unique().to_list() == ["yes"]
    done = CliRunner().invoke(app, ["profile", str(run.folder.path), "--user", "u1"])
    assert done.exit_code == 0, done.output
    assert "vowels" in done.output
    again.save_users(folder / "users.safetensors", again.adapt(new))
    states = str(folder / "users.safetensors")
    done = CliRunner().invoke(app, ["profile", str(run.folder.path), "--users", states])
    assert done.exit_code == 2
    assert "users.safetensors: a user state does not say from which community" in done.stderr
    assert "one of no, yes" in done.stderr
    done = CliRunner().invoke(app, ["profile", str(run.folder.path), "--user", "nobody"])
    assert done.exit_code == 2
    assert "--user nobody" in done.stderr


def test_a_source_of_ones_own_is_asked_for_all_that_a_run_needs():
    class Constant:
        names = ("one",)

        def attributes(self, items):
            return np.ones((items.height, 1, 1), np.float32), np.ones((items.height, 1), bool)

    class Saved(Constant):
        def save(self, folder):
            """Nothing to keep."""

    columns = judgements(20)
    experiment = pp.Experiment(data=lambda: comparisons.from_trl(columns), model=AttributeAttention.init,
                               attributes=Constant)  # fmt: skip
    with pytest.raises(TypeError, match=r"Constant has no 'save'; a source has names, attributes\(items\) and save"):
        prepare(experiment, progress=False)
    found = prepare(replace(experiment, attributes=Saved), progress=False)
    assert isinstance(found.attributes, source.AttributeSource)
    assert found.features.attributes.shape == (found.items.height, 1, 1)


def test_unlabelled_responses_teach_a_stand_in_and_test_responses_do_not(folder, monkeypatch):
    class Reader:
        joint = prompt = False
        dim = 27

    def read(items, encoder, **_):
        return Item(embedding=letters(items["text"].to_list()))

    for name in ("encode_items", "encode_together"):
        monkeypatch.setattr(sys.modules["pluralprefs.experiment"], name, read)
    judged = comparisons.from_trl(judgements().drop("attr:x:first", "attr:x:second"))
    judged = judged.with_columns(fold=pl.lit("train"), cell=pl.lit("train"))
    words = ["tea", "nth", "queue", "rhythm", "area", "shh", "audio", "myth"]
    tested = judged["first"].is_in(["audio", "shh"]) | judged["second"].is_in(["audio", "shh"])
    judged = judged.with_columns(cell=pl.when(tested).then(pl.lit("seen/testpair")).otherwise("cell"))
    more = [one + two * n for one in ascii_lowercase for two in "aeiou" for n in range(4)]
    experiment = pp.Experiment(
        data=lambda: judged, encoder=Reader, model=partial(AttributeAttention.init, stand_in=True),
        attributes=partial(source.predicted, folder), features={"log_length": True}, unlabelled=lambda: more,
    )  # fmt: skip
    found = prepare(experiment, progress=False)
    taught = found.items["text"].is_in(set(words) - {"audio", "shh"}).sum()
    assert len(found.lesson.embedding) == taught + len(more)
    assert fingerprint(judged, more) == fingerprint(judged, found.unlabelled[::-1]) != fingerprint(judged, more[1:])
    for wrong, said in (
        ({"attributes": None}, "and there are none"),
        ({"model": AttributeAttention.init}, "stand_in=true"),
    ):
        with pytest.raises(ValueError, match=f"unlabelled: .*{said}"):
            prepare(replace(experiment, **wrong), progress=False)
    model = new_model(experiment, found, 0)
    alone = found.features.replace(attributes=None, attribute_mask=None)
    vowels = found.items["text"].str.count_matches("[aeiou]").to_numpy() / 10
    read_back = jax.vmap(lambda item: model._attributes(item)[0][1, 0])(alone)
    np.testing.assert_allclose(read_back, vowels, atol=0.02)
    with pytest.raises(ValueError, match="unlabelled: are responses alone"):
        prepare(replace(experiment, encoder=lambda: replace_joint(Reader)), progress=False)


def replace_joint(reader):
    """The reader, of prompts and responses together."""
    return type("Joint", (reader,), {"joint": True})()


def test_attributes_are_refused_where_nothing_reads_them(folder):
    with pytest.raises(ValueError, match="attribute_attention does"):
        pp.fit(table(), model="bradley_terry", encoder="attributes", attributes=folder, root=folder)


def test_the_palette_world_shows_texts_alone_and_knows_its_weights():
    world = palette_world(communities=3, users_per_community=4, comparisons_per_user=10, seed=1)
    assert world.truth["community"].shape == (3, len(attributes()))
    assert world.table.height == 120
    by_user = world.table.group_by("user_id").agg(pl.col("community_id").n_unique())
    assert (by_user["community_id"] == 1).all()
    shown = palette(communities=3, users_per_community=4, comparisons_per_user=10, seed=1)
    assert not [name for name in shown.columns if name.startswith("attr:")]
    assert shown["first"].to_list() == world.table["first"].to_list()
    levels = np.stack([world.table[f"attr:{name}:first"] - world.table[f"attr:{name}:second"] for name in attributes()])
    place = [world.community_ids.index(name) for name in world.table["community_id"]]
    user = [world.user_ids.index(name) for name in world.table["user_id"]]
    weights = world.truth["community"][place] + world.truth["user"][user]
    np.testing.assert_allclose((levels.T * weights).sum(1), world.table["true_log_odds"], atol=1e-9)
