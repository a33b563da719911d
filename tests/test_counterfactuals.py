"""Rewrites are asked once and sorted into folds; verification believes no teacher, and what it rejects is not used."""

import weakref

import polars as pl
import pytest

from pluralprefs.attributes import asking, verification
from pluralprefs.attributes.catalog import choose
from pluralprefs.attributes.counterfactuals import ask_each, rewrite_tasks, rewrites, sample_responses
from pluralprefs.attributes.folds import HELDOUT, HELDOUT_COMMUNITIES, with_folds
from pluralprefs.attributes.lexicon_teacher import LexiconTeacher
from pluralprefs.attributes.pairs import HELDOUT_LEVELS, ordered_pairs, shared_texts
from pluralprefs.attributes.teacher import Answer, Judge, Rewrite, ServerError, TeacherError, Usage, task_key
from pluralprefs.attributes.verification import judge, judging_tasks, report, verified
from pluralprefs.data.comparisons import from_trl
from pluralprefs.data.lexicon import base_answers, corpus
from pluralprefs.data.lexicon.phrases import CATALOG as PHRASES

NAMES = ("politeness", "verbosity", "security")
ATTRIBUTES = choose(NAMES)


def answers(count=4, communities=0):
    """The lexicon's first answers, dealt to communities."""
    rows = [
        {"response_id": f"r{i}", "prompt": one.prompt, "text": one.answer,
         "community_id": f"c{i % communities}" if communities else None}
        for i, one in enumerate(base_answers()[:count])
    ]  # fmt: skip
    return with_folds(pl.DataFrame(rows, schema_overrides={"community_id": pl.Utf8}))


class Spy:
    """A teacher that changes what the lexicon answers, and counts what it is asked."""

    def __init__(self, change=lambda task, answer: answer, phrases="train", name="spy", price=0):
        self.lexicon, self.change, self.name, self.price = LexiconTeacher(phrases), change, name, price
        self.asked = []

    def ask(self, task):
        self.asked.append(task)
        return self.change(task, self.lexicon.ask(task))

    def bound(self, task):
        return Usage(1, self.price, 0)


def flipped(task, answer):
    """What a judge who means the opposite says."""
    if isinstance(task, Judge) and answer.verdict:
        return Answer(verdict="second" if answer.verdict == "first" else "first")
    return answer


def only(name, change):
    """Change answers about one attribute."""
    return lambda task, answer: (
        change(task, answer) if isinstance(task, Judge) and task.attribute.name == name else answer
    )


@pytest.fixture(scope="module")
def said():
    """Four answers and their rewrites."""
    responses = answers()
    return responses, rewrites(
        responses,
        ATTRIBUTES,
        LexiconTeacher("train"),
        others={fold: LexiconTeacher("heldout") for fold in HELDOUT},
        progress=False,
    )


def verify(said, change=lambda task, answer: answer, **thresholds):
    judged = judge(*said, ATTRIBUTES, Spy(change), progress=False)
    return verified(*judged, **thresholds), judged.judgements


def test_every_response_attribute_and_level_has_a_rewrite(said):
    _, table = said
    assert table.height == 4 * 3 * 5
    assert table.select("response_id", "attribute", "level").n_unique() == table.height
    lengths = table.filter(attribute="verbosity").group_by("level").agg(pl.col("text").str.len_chars().mean())
    assert lengths.sort("level")["text"].is_sorted()


def test_a_rewrite_that_fails_is_left_out_and_counted(said):
    def change(task, answer):
        if isinstance(task, Rewrite) and task.level == 3:
            raise TeacherError("too rude to say")
        return answer

    heard = []
    table = rewrites(said[0], ATTRIBUTES, Spy(change), tell=heard.append, progress=False)
    assert sorted(table["level"].unique()) == [0, 1, 2, 4]
    assert "12 failed, the first: too rude to say" in heard[0]


def test_a_killed_pass_is_resumed_and_asks_each_task_once(tmp_path):
    responses, cache = answers(), tmp_path / "answers.jsonl"

    def dies(task, answer):
        if len(first.asked) > 25:
            raise ServerError("gone")
        return answer

    first, second = Spy(dies), Spy()
    with pytest.raises(ServerError, match="gone"):
        rewrites(responses, ATTRIBUTES, first, cache=cache, concurrency=1, progress=False)
    table = rewrites(responses, ATTRIBUTES, second, cache=cache, concurrency=1, progress=False)
    assert len(second.asked) == 4 * 3 * 5 - 25
    assert table.equals(rewrites(responses, ATTRIBUTES, Spy(), progress=False))


def test_the_cost_limit_holds_for_both_teachers_together():
    responses = answers()
    tasks = rewrite_tasks(responses, choose(["politeness"]))
    paid = lambda task, answer: Answer(text=answer.text, usage=Usage(1, 1_000_000, 0))  # noqa: E731
    both = [Spy(paid, name=name, price=1_000_000) for name in ("one", "other")]
    each = [both[i % 2] for i in range(len(tasks))]
    assert all(a.text for a in ask_each(tasks, each, max_cost=20.0, price=(1.0, 1.0), progress=False))
    with pytest.raises(TeacherError, match="max_cost"):
        ask_each(tasks, each, max_cost=19.0, price=(1.0, 1.0), progress=False)


def test_a_fold_depends_on_the_text_alone():
    responses = answers(20, communities=5)
    folds = dict(zip(responses["text"], responses["fold"], strict=True))
    shuffled = with_folds(responses.drop("fold").sample(fraction=1.0, shuffle=True, seed=1))
    assert dict(zip(shuffled["text"], shuffled["fold"], strict=True)) == folds
    apart = responses.filter(fold=HELDOUT_COMMUNITIES)["community_id"].unique()
    assert len(apart)
    assert not responses.filter(pl.col("community_id").is_in(apart.to_list()), pl.col("fold") == "train").height
    assert len(set(folds.values())) == 4


def test_a_text_that_a_heldout_community_shares_is_not_trained_on():
    responses = answers(20, communities=5)
    apart = responses.filter(fold=HELDOUT_COMMUNITIES).drop("fold").head(1)
    other = responses.filter(fold="train")["community_id"][0]
    both = with_folds(pl.concat([responses.drop("fold"), apart.with_columns(community_id=pl.lit(other))]))
    assert set(both.filter(pl.col("text") == apart["text"][0])["fold"]) <= set(HELDOUT)


def test_phrases_of_heldout_rewrites_never_occur_in_training(said):
    responses, table = said
    folds = table.join(responses.select("response_id", "fold"), on="response_id")
    assert set(folds["fold"]) >= {"train", "heldout_responses"}
    for name, level, text, fold in folds.select("attribute", "level", "text", "fold").iter_rows():
        wrong = PHRASES[name].phrases(level, "train" if fold in HELDOUT else "heldout")
        assert not [phrase for phrase in wrong if phrase in text]
    assert not shared_texts(ordered_pairs(verify(said)[0], responses))


def test_an_honest_teacher_is_believed(said):
    pairs, judgements = verify(said)
    assert pairs.height == 4 * 3 * 10
    assert judgements.height == pairs.height * 8
    assert pairs["kept"].all()
    assert set(pairs["agreement"]) == {1.0}
    rows = report(pairs, judgements)
    assert rows.height == 3 * 5
    assert set(rows["monotone"]) == {1.0}
    assert set(rows["order_bias"]) == {0.0}
    assert rows.filter(pl.col("gap").is_null())["pairs"].to_list() == [40] * 3


def test_a_teacher_that_lies_about_one_attribute_is_filtered_and_the_filter_is_used(said):
    pairs, judgements = verify(said, only("politeness", flipped))
    assert not pairs.filter(attribute="politeness")["kept"].any()
    assert pairs.filter(pl.col("attribute") != "politeness")["kept"].all()
    lied = report(pairs, judgements).filter(attribute="politeness", gap=2)
    assert lied.select("agreement", "monotone", "order_bias", "kept").row(0) == (0.0, 0.0, 0.0, 0)
    assert set(ordered_pairs(pairs, said[0])["attribute"]) == {"verbosity", "security"}


def test_a_judge_that_answers_by_position_agrees_by_half_and_is_caught(said):
    pairs, judgements = verify(
        said, lambda task, answer: Answer(verdict="first") if isinstance(task, Judge) else answer
    )
    assert set(pairs["agreement"]) == {0.5}
    assert set(report(pairs, judgements)["order_bias"]) == {1.0}
    with pytest.raises(ValueError, match="no pair of 120 is kept"):
        ordered_pairs(pairs, said[0])


def test_what_cannot_be_read_or_changes_the_meaning_is_not_kept(said):
    unread = only("security", lambda task, answer: Answer() if task.direction == "higher" or task.phrasing else answer)
    pairs, _ = verify(said, unread)
    assert set(pairs.filter(attribute="security")["readable"]) == {2}
    assert not pairs.filter(attribute="security")["kept"].any()
    strict, _ = verify(said, preserved=0.5)
    lost = strict.filter(~pl.col("kept"))
    assert set(lost["attribute"]) == {"verbosity"}
    assert set(lost["low"]) == {0}  # one sentence of three
    silent, _ = verify(said, lambda task, answer: answer if isinstance(task, Judge) else Answer())
    assert not silent["kept"].any()


@pytest.fixture
def few(said, monkeypatch):
    """Two responses at one attribute, 160 judgements and 10 checks, in blocks of 25."""
    responses, table = said
    monkeypatch.setattr(asking, "BLOCK", 25)
    return responses.head(2), table.filter(pl.col("response_id").is_in(["r0", "r1"]), attribute="politeness")


def test_few_tasks_are_alive_at_once_and_the_tables_are_the_same(few, monkeypatch):
    now, most, heard = [], [], []

    def made(*parts):
        task = Judge(*parts)
        now.append(1)
        most.append(len(now))
        weakref.finalize(task, now.pop)
        return task

    monkeypatch.setattr(verification, "Judge", made)
    found = judge(*few, ATTRIBUTES, LexiconTeacher(), tell=heard.append, progress=False)
    assert len(most) == found.judgements.height == 160
    assert max(most) <= 2 * 25 + 1  # a block, and the next while it is taken
    assert heard[0].startswith("judgements: 160 answers, 0 of them cached")
    assert heard[1].startswith("kept meaning: 10 answers")
    monkeypatch.setattr(asking, "BLOCK", 1000)
    whole = judge(*few, ATTRIBUTES, LexiconTeacher(), progress=False)
    assert max(most) == 160
    assert all(one.equals(other) for one, other in zip(found, whole, strict=True))


def test_a_killed_verification_is_resumed_over_blocks_and_asks_each_task_once(few, tmp_path):
    options = {"cache": tmp_path / "answers.jsonl", "concurrency": 1, "progress": False}

    def dies(task, answer):
        if len(first.asked) > 85:
            raise KeyboardInterrupt
        return answer

    first, second, third = Spy(dies), Spy(), Spy()
    with pytest.raises(KeyboardInterrupt):
        judge(*few, ATTRIBUTES, first, **options)
    found = judge(*few, ATTRIBUTES, second, **options)
    asked = [task_key("spy", task) for task in [*first.asked[:85], *second.asked]]
    assert asked == list(dict.fromkeys(task_key("spy", task) for task in judging_tasks(*few, ATTRIBUTES)))
    again = judge(*few, ATTRIBUTES, third, **options)
    assert not third.asked
    assert all(one.equals(other) for one, other in zip(found, again, strict=True))


def test_a_pass_that_fails_where_its_answers_are_used_leaves_the_answers_free(few, tmp_path, monkeypatch):
    options = {"cache": tmp_path / "answers.jsonl", "progress": False}
    monkeypatch.setattr(verification, "NUMBER", {})
    with pytest.raises(KeyError) as caught:
        judge(*few, ATTRIBUTES, Spy(), **options)
    monkeypatch.undo()
    assert judge(*few, ATTRIBUTES, Spy(), **options).judgements.height == 160
    assert caught.value is not None  # its traceback was alive until here, and held the pass


def test_verdicts_stand_beside_what_was_asked(few):
    """A judge who knows one level alone: each row of the table is checked against the texts of its question."""
    responses, table = few
    texts = {(r, level): text for r, level, text in table.select("response_id", "level", "text").iter_rows()}
    top = {texts[r, 4] for r in responses["response_id"]}

    def says(task, answer):
        if isinstance(task, Judge) and {task.first, task.second} & top:
            return Answer(verdict="first" if task.first in top else "second")
        return Answer()

    rows = judge(*few, ATTRIBUTES, Spy(says), progress=False).judgements
    for row in rows.iter_rows(named=True):
        expected = None if row["high"] < 4 else "first" if row["order"] == "high_first" else "second"
        assert row["verdict"] == expected
        assert row["agrees"] == (None if expected is None else row["direction"] == "higher")
    assert rows.select("response_id", "low", "high").unique(maintain_order=True).rows() == [
        (r, low, high) for r in ("r0", "r1") for low in range(5) for high in range(low + 1, 5)
    ]


def test_equal_rewrites_are_not_asked_about():
    responses = answers(1)
    table = rewrites(responses, ATTRIBUTES, LexiconTeacher(), progress=False).with_columns(text=pl.lit("the same"))
    judged = judge(responses, table, ATTRIBUTES, Spy(), progress=False)
    assert not judged.judgements.height
    assert not verified(*judged)["kept"].any()


def test_one_pair_of_levels_is_left_out_of_training(said):
    pairs, _ = verify(said)
    table = ordered_pairs(pairs, said[0], (0, 4))
    trained = table.filter(pl.col("split").is_in(["train", "validation"]))
    assert not trained.filter(low=0, high=4).height
    assert table.filter(split=HELDOUT_LEVELS).select("low", "high").unique().rows() == [(0, 4)]
    assert not ordered_pairs(pairs, said[0], None).filter(split=HELDOUT_LEVELS).height
    with pytest.raises(ValueError, match="lower one first"):
        ordered_pairs(pairs, said[0], (3, 1))


def test_a_sample_of_responses_is_unique_bounded_and_independent_of_row_order():
    table = corpus(users=8, communities=2, comparisons_per_user=6)
    sample = sample_responses(table, per_community=5)
    assert sample["text"].n_unique() == sample.height == 10
    assert sample.equals(sample_responses(table.reverse(), per_community=5))
    assert not sample.equals(sample_responses(table, per_community=5, seed=1))
    chats = from_trl(
        pl.DataFrame({
            "prompt": [[{"role": "user", "content": "Tea?"}]],
            "chosen": [[{"role": "assistant", "content": "Yes."}]],
            "rejected": [[{"role": "assistant", "content": "No."}]],
        })
    )  # fmt: skip
    assert set(sample_responses(chats)["text"]) == {"Yes.", "No."}
    assert set(sample_responses(chats)["prompt"]) == {"Tea?"}
