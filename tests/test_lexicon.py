"""The lexicon says the same thing at five levels, and its corpus carries the truth it was drawn from."""

import hashlib
import itertools

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pluralprefs.attributes.catalog import CATALOG as ATTRIBUTES
from pluralprefs.attributes.lexicon_teacher import expressed
from pluralprefs.data.comparisons import validate
from pluralprefs.data.lexicon import attributes, base_answers, corpus, corpus_world, express
from pluralprefs.data.lexicon.phrases import CATALOG
from pluralprefs.data.simulate import bayes_predictions, summarise
from pluralprefs.data.splits import split, support_draws

NORMS = "assertiveness directness empathy formality humor politeness sarcasm supportiveness verbosity"
VALUES = "achievement benevolence conformity hedonism power security self-direction stimulation tradition universalism"
# SHA-256 of the texts and targets of `corpus(seed=0)`, in its order: the numbers of the log rest on them.
CORPUS = "160e40cd91ea9dc510c507bfcc9b6427392c630fd5cc371263127e3a0b58ff88"


def test_all_nine_norms_and_ten_values_have_five_levels():
    assert attributes("norm") == tuple(NORMS.split())
    assert attributes("value") == tuple(VALUES.split())
    assert attributes() == tuple(sorted(NORMS.split() + VALUES.split()))
    assert tuple(sorted(list(CATALOG)[:9])) == attributes("norm"), "norms are said first"
    for name in set(attributes()) - {"verbosity"}:
        assert len(CATALOG[name].levels) == 5
        for level in range(5):
            assert len(CATALOG[name].phrases(level, "train")) >= 3, (name, level)
            assert len(CATALOG[name].phrases(level, "heldout")) >= 2, (name, level)
    with pytest.raises(ValueError, match="kind='style': use 'norm', 'value'"):
        attributes("style")


def test_norms_have_many_phrases_a_level_and_the_corpus_keeps_those_it_had():
    for name, level in itertools.product(set(NORMS.split()) - {"verbosity"}, range(5)):
        assert len(CATALOG[name].phrases(level, "train")) >= 18, (name, level)
        assert len(CATALOG[name].phrases(level, "heldout")) >= 7, (name, level)
        assert len(CATALOG[name].phrases(level, "corpus")) == 5, (name, level)
    for level in (3, 4):
        assert len(CATALOG["verbosity"].phrases(level, "train")) >= 12
        assert len(CATALOG["verbosity"].phrases(level, "heldout")) >= 7
    for name, level in itertools.product(VALUES.split(), range(5)):
        assert CATALOG[name].phrases(level, "corpus") == CATALOG[name].phrases(level, "all")


def test_the_further_phrases_of_a_norm_are_short_sentences():
    for name in NORMS.split():
        for level, text in enumerate(CATALOG[name].more):
            assert text.count("||") == (1 if text else 0), (name, level)
            for phrase in (said.strip() for said in text.replace("||", "|").split("|") if text):
                assert phrase, (name, level, "an empty phrase")
                assert len(phrase.split()) < 15 or (name, level) == ("verbosity", 4), phrase
                assert phrase[0].isupper(), phrase
                assert phrase[-1] in ".!?", phrase


def test_a_phrase_tells_its_level_apart_from_the_others_of_its_attribute():
    for name, level in itertools.product(attributes(), range(5)):
        for phrase in CATALOG[name].phrases(level):
            parts = (phrase, "Rest a day.") if CATALOG[name].place == "before" else ("Rest a day.", phrase)
            assert expressed(" ".join(parts), name) == level, phrase


def test_the_lexicon_and_the_catalogue_of_attributes_agree_on_names_kinds_and_poles():
    assert set(CATALOG) == set(ATTRIBUTES)
    for name, attribute in ATTRIBUTES.items():
        assert (CATALOG[name].low, CATALOG[name].high) == (attribute.low, attribute.high), name
        assert name in attributes(attribute.kind)


def test_a_value_is_a_short_sentence_after_the_answer():
    answer = base_answers()[4].answer
    for name, level in itertools.product(attributes("value"), range(5)):
        assert express(answer, name, level).startswith(answer + " ")
        for phrase in CATALOG[name].phrases(level):
            assert len(phrase.split()) < 15, phrase
            assert phrase[0].isupper(), phrase
            assert phrase[-1] in ".!", phrase
    assert express(answer, "security", 4) != express(answer, "power", 4)


def test_values_are_said_after_the_norms_and_leave_their_phrases_alone():
    answer = base_answers()[6].answer
    norms = {"politeness": 1, "humor": 4}
    assert express(answer, {**norms, "security": 0}, seed=3).startswith(express(answer, norms, seed=3) + " ")


def test_no_phrase_is_said_twice_nor_shared_between_training_and_held_out():
    said = {
        which: [phrase for entry in CATALOG.values() for level in range(5) for phrase in entry.phrases(level, which)]
        for which in ("train", "heldout", "all")
    }
    assert not set(said["train"]) & set(said["heldout"])
    assert len(set(said["all"])) == len(said["all"]) == len(said["train"]) + len(said["heldout"])
    for train, heldout in itertools.product(said["train"], said["heldout"]):
        assert heldout not in train


def test_held_out_rewrites_contain_no_training_phrase():
    answer = base_answers()[0].answer
    for name, level, seed in itertools.product(attributes(), range(5), range(8)):
        text = express(answer, name, level, seed, phrases="heldout")
        assert not any(phrase in text for phrase in CATALOG[name].phrases(level, "train"))


def test_base_answers_are_distinct_and_have_three_sentences():
    answers = base_answers()
    assert len(answers) >= 40
    assert len({base.prompt for base in answers}) == len({base.answer for base in answers}) == len(answers)
    for base in answers:
        assert base.prompt.endswith(("?", "."))
        assert base.answer.count(".") == 3, base.prompt
        assert "'" not in base.answer


def test_a_rewrite_depends_on_its_seed_alone_and_seeds_vary_it():
    answer = base_answers()[3].answer
    assert express(answer, "humor", 4, seed=1) == express(answer, "humor", 4, seed=1)
    assert len({express(answer, "humor", 4, seed=seed, phrases="corpus") for seed in range(30)}) == 5
    for phrases in ("train", "heldout"):
        said = {express(answer, "humor", 4, seed=seed, phrases=phrases) for seed in range(200)}
        assert len(said) == len(CATALOG["humor"].phrases(4, phrases))


def test_levels_of_an_attribute_give_different_texts():
    for base, name in itertools.product(base_answers()[:5], attributes()):
        assert len({express(base.answer, name, level) for level in range(5)}) == 5


def test_verbosity_lengthens_every_answer_step_by_step():
    for base, phrases in itertools.product(base_answers(), ("train", "heldout")):
        lengths = [len(express(base.answer, "verbosity", level, phrases=phrases)) for level in range(5)]
        assert lengths == sorted(set(lengths))


def test_the_answer_stays_whole_in_every_rewrite_but_short_and_casual_ones():
    answer = base_answers()[1].answer
    for name, level in itertools.product(attributes(), range(5)):
        if (name, level) not in {("verbosity", 0), ("verbosity", 1), ("formality", 0), ("formality", 1)}:
            assert answer in express(answer, name, level)


def test_a_casual_voice_contracts():
    assert "don't" in express("Do not run. It is late.", "formality", 0).lower()
    assert "It's late" in express("Do not run. It is late.", "formality", 0)
    assert "Do not run." in express("Do not run. It is late.", "formality", 4)


def test_attributes_compose_and_keep_each_others_phrases():
    answer = base_answers()[2].answer
    polite = express(answer, "politeness", 4, seed=5)
    both = express(answer, {"politeness": 4, "humor": 4, "verbosity": 0}, seed=5)
    opening = polite.removesuffix(answer).strip()
    assert both.startswith(opening)
    assert any(phrase in both for phrase in CATALOG["humor"].phrases(4))
    assert answer.split(".")[1] not in both
    assert express(answer, {}) == answer


def test_unknown_attributes_and_levels_are_named():
    for arguments, message in [
        (("charm", 1), "'charm': use one of achievement, assertiveness"),
        (("humor", 5), "humor=5"),
        (("humor",), "level"),
    ]:
        with pytest.raises(ValueError, match=message):
            express("Yes.", *arguments)
    with pytest.raises(ValueError, match="'heldout'"):
        express("Yes.", "humor", 1, phrases="some")
    with pytest.raises(ValueError, match="communities=7"):
        corpus(communities=7)


def test_the_corpus_is_a_valid_table_of_about_400_unique_texts():
    table = corpus(users=20)
    checked = validate(table)
    assert_frame_equal(checked.select(table.columns), table)
    for side, other in (("first", "second"), ("second", "first")):
        assert checked.select(side, f"{side}_id").unique().height == checked[side].n_unique()
        assert checked.filter(pl.col(f"attr:humor:{side}").abs() > 1).is_empty()
        assert (checked[side] != checked[other]).all()
    texts = corpus_world().table.select(pl.concat_list("first", "second").explode().unique())
    assert 350 <= len(texts) <= 450
    assert_frame_equal(corpus(users=5, seed=2), corpus(users=5, seed=2))


def test_the_corpus_of_a_seed_stays_what_it_was_before_there_were_values():
    table = corpus(seed=0)
    assert {name.split(":")[1] for name in table.columns if name.startswith("attr:")} == set(attributes("norm"))
    rows = table.select("user_id", "prompt", "first", "second", "target").rows()
    assert hashlib.sha256(repr(rows).encode()).hexdigest() == CORPUS


def test_attribute_columns_are_what_the_texts_express():
    world = corpus_world(users=5, phrases="train")
    names = attributes("norm")
    row = world.table.row(7, named=True)
    answer = {one.prompt: one.answer for one in base_answers()}[row["prompt"]]
    levels = {name: int(2 * row[f"attr:{name}:first"] + 2) for name in names if row[f"attr:{name}:first"] != 0}
    for name in set(levels) - {"verbosity"}:
        assert any(phrase in row["first"] for phrase in CATALOG[name].phrases(levels[name], "train")), name
    assert answer.split(".")[0].split()[-1] in row["first"]
    np.testing.assert_array_equal(
        [row[f"attr:{name}:first"] for name in names], world.features(pl.Series([row["first_id"]]))[0]
    )


def test_communities_differ_as_their_weights_say():
    world = corpus_world(users=60)
    table, names = world.table, list(attributes("norm"))
    humour = pl.col("attr:humor:first") - pl.col("attr:humor:second")
    funnier_wins = table.filter(humour != 0).with_columns(wins=(humour > 0) == (pl.col("target") == 1))
    share = dict(funnier_wins.group_by("community_id").agg(pl.mean("wins")).rows())
    assert share["comedy_corner"] > 0.6 > 0.5 > share["engineers"]
    assert world.truth["community"][world.community_ids.index("engineers")][names.index("verbosity")] < 0


def test_the_corpus_can_be_split_and_has_a_bayes_reference():
    world = corpus_world(users=30)
    table = split(world.table)
    curve = bayes_predictions(world, support_draws(table, draws=1), table=table, shots=(0, 16), samples=1024)
    nll = summarise(curve, by=["shots"])["nll"].to_list()
    assert nll[1] < nll[0] < np.log(2)
