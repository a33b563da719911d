"""The table: what is filled in, what is refused, and that TRL's layout goes in and comes out without loss."""

from __future__ import annotations

import json
from hashlib import blake2b

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pluralprefs.data import comparisons
from pluralprefs.data.comparisons import SCHEMA, DataError, from_trl, pseudonym, read, to_trl, validate

LAWS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ids = texts.filter(str.strip)  # a blank one is nobody's
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), min_size=1, max_size=3
)


def rows_of(response) -> st.SearchStrategy:
    row = st.fixed_dictionaries({
        "prompt": response, "chosen": response, "rejected": response,
        "margin": st.one_of(st.none(), st.floats(-5, 5)),
        "score_chosen": st.floats(0, 1), "score_rejected": st.floats(0, 1),
        "user_id": st.one_of(st.none(), ids), "community_id": st.one_of(st.none(), ids),
        "note": st.one_of(st.none(), texts), "tags": st.lists(texts, max_size=2),
    })  # fmt: skip
    unlike = row.filter(lambda r: r["chosen"] != r["rejected"])
    return st.lists(unlike, min_size=1, max_size=6)


def present(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@LAWS
@given(rows=st.one_of(rows_of(texts), rows_of(messages)))
def test_explicit_trl_rows_come_back_as_they_were(rows, tmp_path):
    table = read(write_lines(tmp_path / "in.jsonl", rows), pseudonymise=False)
    assert present(to_trl(table).to_dicts()) == present(rows)
    assert set(table["target"]) <= {0.0, 1.0}


@LAWS
@given(rows=st.one_of(rows_of(texts), rows_of(messages)), extract=st.booleans())
def test_implicit_trl_rows_come_back_as_they_were(rows, extract, tmp_path):
    joined = [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} | {"margin": row["margin"]} for row in rows
    ]
    table = read(write_lines(tmp_path / "in.jsonl", joined), extract_prompt=extract)
    assert present(to_trl(table, implicit=True).to_dicts()) == present(joined)


@LAWS
@given(rows=rows_of(messages), suffix=st.sampled_from([".jsonl", ".parquet"]))
def test_a_table_reads_back_as_it_was_written(rows, suffix, tmp_path):
    table = from_trl(read_raw(rows, tmp_path))
    comparisons.write(table, tmp_path / f"out{suffix}")
    assert read(tmp_path / f"out{suffix}").equals(table.select(read(tmp_path / f"out{suffix}").columns))


def read_raw(rows, folder):
    return comparisons.read_frame(write_lines(folder / "raw.jsonl", rows), ids=("user_id", "community_id"))


def test_csv_reads_back_as_it_was_written(tmp_path):
    rows = {"prompt": ["", "p\n"], "chosen": ["a,", '"b"'], "rejected": ["c", ""], "margin": [0.1, None]}
    table = from_trl(pl.DataFrame(rows))
    comparisons.write(table, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv").equals(table)


def test_sides_do_not_tell_who_won():
    pairs = [(f"a{n}", f"b{n}") for n in range(400)]
    forward = from_trl(pl.DataFrame({"chosen": [a for a, _ in pairs], "rejected": [b for _, b in pairs]}))
    backward = from_trl(pl.DataFrame({"chosen": [b for _, b in pairs], "rejected": [a for a, _ in pairs]}))
    assert forward["first"].equals(backward["first"])
    assert (forward["target"] + backward["target"]).unique().to_list() == [1.0]
    assert 160 < forward["target"].sum() < 240


def test_what_comes_in_twos_follows_the_sides():
    rows = pl.DataFrame({
        "chosen": list("abcdefgh"), "rejected": list("ijklmnop"),
        "chosen_id": [f"id-{t}" for t in "abcdefgh"], "rejected_id": [f"id-{t}" for t in "ijklmnop"],
        "attr:code:chosen": [float(ord(t)) for t in "abcdefgh"],
        "attr:code:rejected": [float(ord(t)) for t in "ijklmnop"],
    })  # fmt: skip
    table = from_trl(rows)
    assert set(table["target"]) == {0.0, 1.0}
    for side in ("first", "second"):
        assert table[f"{side}_id"].to_list() == [f"id-{t}" for t in table[side]]
        assert table[f"attr:code:{side}"].to_list() == [float(ord(t)) for t in table[side]]
    assert to_trl(table).select(rows.columns).equals(rows)


def test_shared_messages_become_the_prompt_and_shared_text_only_where_asked():
    ask, say = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}
    chat = from_trl(pl.DataFrame({"chosen": [[ask, say]], "rejected": [[ask, say | {"content": "y"}]]}))
    assert chat["prompt"].to_list() == [[ask]]
    text = pl.DataFrame({"chosen": ["Q: A: yes"], "rejected": ["Q: A: no"]})
    assert from_trl(text)["prompt"].to_list() == [""]
    assert from_trl(text, extract_prompt=True)["prompt"].to_list() == ["Q: A:"]


@pytest.mark.parametrize(("target", "tie"), [(0.5, True), (0.5, False), (0.7, False)])
def test_trl_cannot_say_ties_or_grades(target, tie):
    table = validate(
        pl.DataFrame({"first": ["a", "a"], "second": ["b", "c"], "target": [1.0, target], "tie": [False, tie]})
    )
    with pytest.raises(DataError, match="row 2, column 'target'"):
        to_trl(table)
    assert to_trl(table, ties="drop").height == table.height - 1


@pytest.mark.parametrize(
    "words", [["first", "Second", "tie"], ["a", "B", "tie"], ["left", "right", "tie"], ["1", "2", "tie"]]
)
def test_words_name_sides(words, tmp_path):
    rows = [{"first": "x", "second": f"y{n}", "target": word} for n, word in enumerate(words)]
    table = read(write_lines(tmp_path / "in.jsonl", rows))
    assert table["target"].to_list() == [1.0, 0.0, 0.5]
    assert table["tie"].to_list() == [False, False, True]


def test_numbers_written_as_text_are_numbers(tmp_path):
    (tmp_path / "in.csv").write_text("first,second,target\na,b,1\na,c,0\na,d,0.5\n")
    table = read(tmp_path / "in.csv")
    assert table["target"].to_list() == [1.0, 0.0, 0.5]
    assert not table["tie"].any()


def test_missing_columns_are_filled_from_content():
    table = validate(pl.DataFrame({"first": ["a", "a"], "second": ["b", "b"], "target": [1, 1]}))
    assert table.columns == list(SCHEMA)
    assert table["first_id"].to_list() == [blake2b(b"a", digest_size=8).hexdigest()] * 2
    assert table["example_id"].n_unique() == 2
    assert table["weight"].to_list() == [1.0, 1.0]
    assert table["user_id"].null_count() == 2


def test_ids_do_not_depend_on_the_order_of_the_rows():
    rows = pl.DataFrame(
        {"first": ["a", "b", "a"], "second": ["c", "c", "c"], "target": [1.0, 0.0, 1.0], "mark": [1, 2, 1]}
    )
    forward, backward = validate(rows), validate(rows.reverse())
    assert forward.sort("example_id").equals(backward.sort("example_id"))


def test_identical_responses_are_dropped_and_counted_by_community():
    rows = {"first": list("abca"), "second": list("abxb"), "target": [1.0] * 4, "community_id": ["x", "x", "x", None]}
    checked = comparisons.check(pl.DataFrame(rows))
    assert checked.table.height == 2
    assert checked.dropped.rows() == [("x", 2)]
    assert "2 rows with identical responses (2 in 'x')" in comparisons.summary(*checked)


def test_users_become_pseudonyms_unless_asked_otherwise(tmp_path):
    rows = [
        {"first": "a", "second": t, "target": 1, "worker": w}
        for t, w in (("b", 7), ("c", 7), ("d", "Ана"), ("e", None))
    ]
    path = write_lines(tmp_path / "in.jsonl", rows)
    assert read(path, user="worker", pseudonymise=False)["user_id"].to_list() == ["7", "7", "Ана", None]
    hidden = read(path, user="worker", salt="s")["user_id"].to_list()
    assert hidden == [pseudonym("7", "s"), pseudonym("7", "s"), pseudonym("Ана", "s"), None]
    assert hidden[0] != pseudonym("7") != "7"


def test_whole_numbers_as_ids_lose_their_point():
    table = validate(
        pl.DataFrame({"first": ["a", "a"], "second": ["b", "c"], "target": [1, 0], "user_id": [7.0, None]})
    )
    assert table["user_id"].to_list() == ["7", None]


def test_the_caller_names_the_columns(tmp_path):
    row = {"question": "q", "first": "a", "second": "b", "target": 1, "debate": "d", "worker": "w"}
    path = write_lines(tmp_path / "in.jsonl", [row])
    table = read(path, prompt="question", user="worker", community="debate", pseudonymise=False)
    assert table.select("prompt", "user_id", "community_id").row(0) == ("q", "w", "d")
    assert {"question", "worker", "debate"}.isdisjoint(table.columns)
    both = read(path, prompt="question", user="debate", community="debate", pseudonymise=False)
    assert both.select("user_id", "community_id").row(0) == ("d", "d")
    with pytest.raises(DataError, match="did you mean 'worker'"):
        read(path, user="wroker")


def test_pairs_without_targets_are_read_at_weight_zero_where_asked(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"first": "a", "second": "b"}])
    table = read(path, labelled=False)
    assert table.select("target", "weight").row(0) == (0.5, 0.0)
    half = write_lines(
        tmp_path / "half.jsonl", [{"first": "a", "second": "b", "target": 1}, {"first": "a", "second": "c"}]
    )
    assert read(half, labelled=False)["weight"].to_list() == [1.0, 0.0]


def test_an_empty_file_is_a_table_without_rows_where_asked(tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    table = read(tmp_path / "in.jsonl", allow_empty=True)
    assert table.height == 0
    assert table.columns == list(SCHEMA)
    assert comparisons.summary(table).startswith("comparisons  0")


def test_the_summary_counts_what_is_there():
    table = validate(pl.DataFrame({
        "first": list("aabc"), "second": list("bbcd"), "target": [1.0, 0.0, 0.5, 0.7],
        "tie": [False, False, True, False],
        "user_id": ["u", "u", "v", None], "community_id": ["x", "x", "x", "y"],
    }))  # fmt: skip
    text = comparisons.summary(table)
    for line in (
        "comparisons  4",
        "users        2; comparisons each: min 1",
        "no user      1 rows",
        "communities  2;",
        "ties         1; graded targets 1",
        "repeated     1 judgements",
    ):
        assert line in text
