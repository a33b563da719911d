"""An exported run scores in transformers as it does here; what does not fold is refused; files are whole or absent."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoder_run import attribute_table, copied, decoder_run, word_pairs
from handmade import handmade
from record_decoders import FIXTURES, KINDS, VOCABULARY, WORDS
from safetensors.numpy import load_file, save_file
from test_causal import DATED, TEMPLATE
from test_decoder import with_torch
from typer.testing import CliRunner

from pluralprefs import deploy_cli, encoders
from pluralprefs.adapting import user_rewards
from pluralprefs.backbone import Backbone
from pluralprefs.cli import app
from pluralprefs.describe import override
from pluralprefs.encoders.cache import encode_texts
from pluralprefs.encoders.decoder_weights import read_decoder, stored_parameters
from pluralprefs.encoders.features import Features
from pluralprefs.encoders.lora import Lora, attach, merge
from pluralprefs.encoders.tokens import Renderer, Text
from pluralprefs.experiment import FAMILIES, Experiment
from pluralprefs.export import ARCHITECTURES, ExportError, export, fold, why_not, write_weights
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.ideal_point import IdealPoint
from pluralprefs.models.low_rank import LowRank
from pluralprefs.types import Item

ROUNDED = [*WORDS, *(f"word {at}" for at in range(len(WORDS), VOCABULARY))]  # as many as the model has rows
linear = partial(BradleyTerry.init, item_effects=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return copied("llama", tmp_path_factory.mktemp("decoder") / "llama")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A run, a user of a community, and the folder that the user was exported into."""
    root = tmp_path_factory.mktemp("export")
    run = decoder_run(folder, root / "runs")
    user = somebody(run)
    return run, user, export(run, root / "out", user=user)


def somebody(run):
    """A user of a community, with a state that nobody solved for."""
    user, draw = run.adapt(prior="community:a"), np.random.default_rng(2)
    moved = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), user.posterior.mean)
    return replace(user, name="ana", posterior=user.posterior.replace(mean=moved))


def texts(table):
    """Prompts and responses of a table: first ones, then second ones."""
    return list(zip([*table["prompt"]] * 2, [*table["first"], *table["second"]], strict=True))


def said_here(run, user, table):
    scores = run.score(table, user=user)
    return np.concatenate([scores["reward_first"], scores["reward_second"]])


def code_of(out):
    """The Python of a model card, for its own folder."""
    [code] = (out / "README.md").read_text("utf8").split("```python\n")[1].split("```")[:1]
    return code.replace('"FOLDER"', repr(str(out)))


def ids_of(out):
    """The card's function of tokens, without PyTorch."""
    from transformers import AutoTokenizer

    code = code_of(out)
    names = {"tokenizer": AutoTokenizer.from_pretrained(out)}
    exec(code[code.index("def ids") : code.index("def rewards")], names)
    return names["ids"]


def everything(folder):
    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


# --- the head


def test_the_head_on_our_own_embeddings_gives_our_rewards(made):
    run, user, out = made
    table = word_pairs(64)
    head = load_file(out / "model.safetensors")["score.weight"]
    assert head.shape == (1, run.encoder.dim)
    again = encoders.load(out, max_length=16)  # the exported folder is read here too
    embedding = encode_texts(again, [response for _, response in texts(table)], cache=False)
    expected = said_here(run, user, table)
    np.testing.assert_allclose(embedding @ head[0] + fold(run, user).constant, expected, atol=1e-4)
    assert expected.std() > 0.1


def test_an_encoder_that_was_trained_is_exported_with_its_adapters_merged(made, tmp_path):
    frozen = made[0]
    encoder = attach(frozen.encoder, Lora(rank=2), jax.random.key(0))
    moved = lambda path, leaf: leaf if leaf.any() else leaf + 0.1  # noqa: E731, the factors that begin at zero
    encoder = encoder.replace(params=jax.tree_util.tree_map_with_path(moved, encoder.params), weights="trained")
    run = replace(frozen, encoder=encoder, experiment=replace(frozen.experiment, backbone=Backbone()))
    user = somebody(run)
    out = export(run, tmp_path / "out", user=user)
    head, table = load_file(out / "model.safetensors")["score.weight"], word_pairs(16)
    embedding = encode_texts(encoders.load(out, max_length=16), [text for _, text in texts(table)], cache=False)
    expected = said_here(run, user, table)
    np.testing.assert_allclose(embedding @ head[0] + fold(run, user).constant, expected, atol=1e-4)
    assert np.abs(expected - said_here(frozen, user, table)).max() > 0.01
    # Frozen weights may be narrow; what was learned beside them is not rounded to them.
    part = lambda path, leaf: leaf if "dot_general" in str(path) else leaf.astype(jnp.bfloat16)  # noqa: E731
    narrow = encoder.replace(params=jax.tree_util.tree_map_with_path(part, encoder.params))
    written = everything(export(replace(run, encoder=narrow), tmp_path / "narrow", user=user))
    assert {value.dtype.name for value in written.values()} == {"float32"}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow.params)
    [kernel] = [value for name, value in written.items() if name.endswith("layers.0.self_attn.q_proj.weight")]
    expected = merge(narrow.replace(params=wide)).params["layers"][0]["query"]["kernel"]
    np.testing.assert_array_equal(kernel.T, expected)
    assert (np.asarray(jnp.asarray(kernel.T).astype(jnp.bfloat16), np.float32) != kernel.T).any()


@pytest.mark.parametrize(
    "model", [linear, partial(LowRank.init, rank=3), partial(LowRank.init, rank=3, weights="simplex")]
)
def test_a_head_is_the_reward_of_any_embedding_with_its_constant(model, folder, tmp_path):
    """Care, scale, community and the bias of a basis included."""
    run = decoder_run(folder, tmp_path, model)
    run = replace(run, users=run.users.replace(scale=jnp.float32(1.7)))
    if isinstance(run.model, LowRank):
        [layer] = run.model.basis
        run = replace(run, model=run.model.replace(basis=({**layer, "bias": layer["bias"] + 0.3},)))
    user = somebody(run)
    head = fold(run, user)
    items = Item(embedding=jax.random.normal(jax.random.key(3), (9, run.encoder.dim)))
    expected = user_rewards(run.model, run.users, items, user.posterior, user.community)
    np.testing.assert_allclose(np.asarray(items.embedding) @ head.weight + head.constant, expected, atol=1e-5)
    assert (abs(head.constant) > 0.1) == isinstance(run.model, LowRank)
    plain = fold(run, run.adapt(prior="population"))
    assert np.abs(plain.weight - head.weight).max() > 0.1


# --- the files


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_keeps_its_own_tensors_under_the_names_of_a_classifier(kind, tmp_path):
    folder, head = FIXTURES / kind, np.arange(16, dtype=np.float32)
    write_weights(tmp_path, folder, kind, head, words=50)
    before, after = everything(folder), everything(tmp_path)
    words = "model.decoder.embed_tokens.weight" if kind == "opt" else "model.embed_tokens.weight"
    assert set(after) == {name for name in before if not name.startswith("lm_head")} | {"score.weight"}
    np.testing.assert_array_equal(after.pop("score.weight"), head[None])
    table = after.pop(words)
    np.testing.assert_array_equal(table[:VOCABULARY], before[words])
    np.testing.assert_array_equal(table[VOCABULARY:], 0)
    assert len(table) == 50
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name])
    trained = tmp_path / "trained"
    trained.mkdir()
    write_weights(trained, read_decoder(folder, head=True).params, kind, head, words=50)
    ours = everything(trained)
    assert set(ours) == set(after) | {words, "score.weight"}
    for name, value in after.items():
        np.testing.assert_array_equal(value, ours[name])


def sharded(folder, target, dtype=np.float32):
    """A checkpoint in three files, the last of which holds the language model's head alone."""
    tensors = {name: value.astype(dtype) for name, value in everything(folder).items()}
    names = sorted(tensors)
    own = [name for name in names if name != "lm_head.weight"]
    parts = [own[:9], own[9:], ["lm_head.weight"]]
    (target / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, target / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_files_stay_files_and_stored_types_stay_what_they_are(tmp_path):
    folder = copied("llama", tmp_path / "sharded")
    tensors = sharded(FIXTURES / "llama", folder, ml_dtypes.bfloat16)
    run = decoder_run(folder, tmp_path / "runs")
    out = export(run, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
    for file in files:
        held = load_file(out / file)
        assert {index["weight_map"][name] for name in held} == {file}
        assert all(value.dtype == ml_dtypes.bfloat16 for name, value in held.items() if name != "score.weight")
    after = everything(out)
    np.testing.assert_array_equal(after["model.norm.weight"], tensors["model.norm.weight"])
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"  # what the run computed in
    np.testing.assert_array_equal(
        read_decoder(out).params["norm"]["scale"], read_decoder(folder).params["norm"]["scale"]
    )


def test_parameters_are_written_in_files_of_a_bounded_size():
    params = read_decoder(FIXTURES / "llama").params
    files = dict(stored_parameters(params, "llama", file_bytes=6000))
    assert len(files) > 2
    assert sorted(files)[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(value.nbytes for value in held.values()) <= 6000 or len(held) == 1 for held in files.values())
    assert sum(len(held) for held in files.values()) == len(jax.tree.leaves(params))


def test_the_config_is_of_a_reward_model_and_names_nothing_of_this_machine(made, folder):
    _, _, out = made
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"}
    assert config["problem_type"] == "regression"
    assert config["pad_token_id"] not in (config["eos_token_id"], config["bos_token_id"])
    for file in out.iterdir():
        content = file.read_bytes()
        for private in (str(folder.parent), str(Path.home()), os.uname().nodename, "user 0", "u_"):
            assert private.encode() not in content or len(private) < 3, (file.name, private)


def test_a_padding_token_is_added_where_the_tokenizer_has_none_of_its_own(folder, tmp_path):
    """One that is also the end of a text would hide the last token, which is the one that is scored."""
    full = copied("llama", tmp_path / "full", ROUNDED)
    out = export(decoder_run(full, tmp_path / "runs"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] == VOCABULARY
    assert config["vocab_size"] == VOCABULARY + 1 == len(everything(out)["model.embed_tokens.weight"])
    own = copied("llama", tmp_path / "own", [*WORDS, "<pad>"])
    raw = json.loads((own / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (own / "tokenizer_config.json").write_text(json.dumps(raw))
    out = export(decoder_run(own, tmp_path / "runs"), tmp_path / "kept")
    config = json.loads((out / "config.json").read_text())
    assert (config["pad_token_id"], config["vocab_size"]) == (len(WORDS), VOCABULARY)


# --- texts


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("template", [None, TEMPLATE, DATED + TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
def test_the_tokens_of_the_card_are_those_of_the_run(joint, template, tmp_path, folder):
    options = {"chat_template": template} if template else {}
    own = copied("llama", tmp_path / "own", [*WORDS, "26", "Jul", "2024", "2024-07-26"], **options)
    run = decoder_run(folder, tmp_path / "runs")
    renderer = Renderer.load(own, max_length=40, segments=1, joined=True)
    run = replace(run, encoder=run.encoder.replace(joint=joint, renderer=renderer),
                  experiment=replace(run.experiment, encoder=partial(encoders.load, str(own))))  # fmt: skip
    out = export(run, tmp_path / "out")
    ids = ids_of(out)
    asked = [*texts(word_pairs(20)), ("a b c d e f g h " * 6, "good tea"), ("a ?", "tea " * 50), ("a b ?", "tea " * 35)]
    for prompt, response in asked:
        [found] = renderer([Text(prompt if joint else None, response)])
        assert ids(prompt, response) == found.ids


# --- the reference


@with_torch
def test_transformers_scores_64_pairs_as_we_do(made):
    run, user, out = made
    names = {}
    exec(code_of(out), names)  # the card, as it stands
    table = word_pairs(64)
    found = names["rewards"](texts(table))
    constant = fold(run, user).constant
    np.testing.assert_allclose(np.array(found) + constant, said_here(run, user, table), atol=1e-4)
    assert (names["model"].config.num_labels, names["model"].config.id2label) == (1, {0: "reward"})


@with_torch
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_loads_whole_and_scores_its_recorded_states(kind, tmp_path):
    """Hidden states were recorded from transformers, and equal ours: tests/test_decoder.py."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from pluralprefs.export import classification_config

    arrays = dict(np.load(FIXTURES / f"{kind}.npz"))
    head = np.random.default_rng(0).normal(size=arrays["hidden"].shape[-1]).astype(np.float32)
    config = classification_config(FIXTURES / kind, VOCABULARY, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path, FIXTURES / kind, kind, head, words=config["vocab_size"])
    model, notes = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == ARCHITECTURES[kind]
    assert not any(notes.values())
    ids, mask = arrays["ids"], arrays["mask"]
    expected = arrays["hidden"][np.arange(len(ids)), mask.sum(1) - 1] @ head
    for end in ("right", "left"):
        order = np.argsort(mask if end == "left" else ~mask, axis=1, kind="stable")
        padded = np.where(mask, ids, VOCABULARY)
        rows, real = (np.take_along_axis(x, order, axis=1) for x in (padded, mask))
        with torch.no_grad():
            found = model.eval()(torch.tensor(rows).long(), attention_mask=torch.tensor(real).long()).logits
        assert found.shape == (len(ids), 1)
        np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-4)


@with_torch
@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_scores_texts_as_the_run_does(kind, joint, tmp_path):
    folder = copied(kind, tmp_path / kind, chat_template=TEMPLATE if joint else None)
    run = decoder_run(folder, tmp_path / "runs", joint=joint)
    out = export(run, tmp_path / "out")
    names, table = {}, word_pairs(64)
    exec(code_of(out), names)
    user = run.adapt(prior="population")
    np.testing.assert_allclose(names["rewards"](texts(table)), said_here(run, user, table), atol=1e-4)


# --- what is refused


def features(run, **options):
    return Features.fit(np.eye(run.encoder.dim, dtype=np.float32), np.arange(1.0, run.encoder.dim + 1), **options)


LINEAR = (("linear", 16),)
REFUSED = [
    ({}, IdealPoint((), np.zeros((2, 16)), np.zeros(())), "a distance from an ideal point"),
    ({}, BradleyTerry(({}, {}), LINEAR, 0), "its MLP is not linear"),
    ({}, LowRank(({}, {}), 3), "its basis is an MLP"),
    ({}, BradleyTerry(None, LINEAR, 3), "3 responses have effects of their own; --drop-item-effects"),
    ({"pooling": "mean"}, None, "its encoder has mean pooling; fit with --set encoder.pooling=last"),
    ({"normalise": True}, None, "last pooling and normalised embeddings"),
]


@pytest.mark.parametrize(("options", "model", "reason"), REFUSED)
def test_a_run_that_does_not_fold_says_why_and_what_to_do(options, model, reason, made, tmp_path):
    run = made[0]
    run = replace(run, encoder=run.encoder.replace(**options), model=model or run.model)
    with pytest.raises(ExportError, match=reason) as error:
        export(run, tmp_path / "out")
    assert (
        "; score it with `pluralprefs score`, or, where it reads texts alone, over HTTP with `pluralprefs serve`"
        in str(error.value)
    )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_columns_beside_the_hidden_state_and_other_encoders_are_refused(folder, made):
    run, _, _ = made
    assert "reads the length of a text beside" in why_not(replace(run, maps=features(run)))
    assert "and a kernel's features beside" in why_not(replace(run, maps=features(run, anchors=3)))
    assert "reads attribute columns" in why_not(handmade(attribute_table()))
    bert = encoders.load(FIXTURES.parent / "bert" / "bert")
    assert "is a bert with" in why_not(replace(run, encoder=bert))


def test_item_effects_are_left_out_on_request_alone_and_the_card_says_so(folder, tmp_path):
    run = decoder_run(folder, tmp_path / "runs", partial(BradleyTerry.init, items=3))
    user = run.adapt(prior="population")
    out = export(run, tmp_path / "out", drop_item_effects=True)
    assert "Effects of 3 single responses were left out" in " ".join((out / "README.md").read_text("utf8").split())
    np.testing.assert_allclose(fold(run, user).weight, run.users.population["linear"], rtol=1e-6)


def test_a_user_of_whom_nothing_is_known_has_no_reward_without_a_population(folder, tmp_path):
    run = decoder_run(folder, tmp_path / "runs", linear)
    run = replace(run, users=run.users.replace(population=jax.tree.map(jnp.zeros_like, run.users.population)))
    with pytest.raises(ExportError, match="who has no state: every reward is 0"):
        export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", user=somebody(run)).is_dir()


def test_a_folder_is_never_written_over_and_never_half_written(made, tmp_path, monkeypatch):
    run, user, out = made
    with pytest.raises(ExportError, match="exists; name a new folder"):
        export(run, out, user=user)
    monkeypatch.setattr("pluralprefs.export.model_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, tmp_path / "new", user=user)
    assert not list(tmp_path.iterdir())


# --- the command and the card


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_exports_a_prior_a_user_or_a_single_state(made, tmp_path, monkeypatch):
    run, user, _ = made
    monkeypatch.setattr(deploy_cli, "opened", lambda *_: run)
    heads = {}
    user.save(tmp_path / "one.safetensors")
    run.save_users(tmp_path / "state.safetensors", {"ana": user.posterior})
    run.save_users(tmp_path / "two.safetensors", {"ana": user.posterior, "bo": user.posterior})
    cases = {"population": (), "community": ("--prior", "community:a"), "one": ("--user", tmp_path / "one.safetensors"),
             "state": ("--user", tmp_path / "state.safetensors", "--prior", "community:a")}  # fmt: skip
    for name, options in cases.items():
        done = call("export", "RUN", "--out", tmp_path / name, *options)
        assert (done.exit_code, "written" in done.output) == (0, True), done.output
        heads[name] = load_file(tmp_path / name / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(heads["one"], heads["state"])
    assert len({head.tobytes() for head in heads.values()}) == 3
    cards = {name: " ".join((tmp_path / name / "README.md").read_text("utf8").split()) for name in cases}
    assert "A reward model of a population" in cards["population"]
    assert "A reward model of a community, a" in cards["community"]
    assert "A reward model of one user" in cards["one"]
    assert "personal data" in cards["one"]
    assert all("5ca1ab1e" in card and run.fingerprint in card for card in cards.values())
    said = export(run, tmp_path / "said", user=replace(user, ids=("c1", "c2")))
    assert "adapted to 2 comparisons of theirs" in (said / "README.md").read_text("utf8")
    for options, message in (
        (("--user", tmp_path / "two.safetensors"), "holds 2 users, and a model is one's"),
        (("--format", "onnx"), 'the one format is "hf"'),
    ):
        done = call("export", "RUN", "--out", tmp_path / "no", *options)
        assert (done.exit_code, message in done.stderr, len(done.stderr.strip().splitlines())) == (2, True, 1)


def test_the_settings_that_make_a_run_fold_exist():
    for name, settings in (
        ("low_rank", ("encoder.joint=true",)), ("lore", ()), ("individual", ()),
        ("bradley_terry", ("features={}", "model.item_effects=false", "encoder.pooling=last",
                           "encoder.normalise=false")),
    ):  # fmt: skip
        experiment = Experiment(data=attribute_table, encoder=partial(encoders.load, "folder"), **FAMILIES[name])
        for setting in settings:
            experiment = override(experiment, setting)
        assert not experiment.features
