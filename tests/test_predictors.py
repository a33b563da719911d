"""Predictors recover the order of held-out texts, know attributes by name, and are stored and found by name."""

import json
from dataclasses import fields
from hashlib import blake2b

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize

from pluralprefs.attributes.accuracy import accuracy, wilson
from pluralprefs.attributes.fitting import _draw_within, fit_predictors
from pluralprefs.attributes.heads import Rows, fit_heads
from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.attributes.sentences import kernel, read, sentences
from pluralprefs.attributes.store import AttributeStore, write_store
from pluralprefs.data.files import DataError

NAMES = ("humor", "politeness", "security")
DIM = 24
AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0][: len(NAMES)]


def noise(text):
    """A direction of its own for every text."""
    seed = int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")
    return np.random.default_rng(seed).normal(size=DIM) / 12


def encode(texts):
    """A toy encoder: "response|attribute|level" lies along the attribute's axis, with noise of its own."""
    rows = []
    for text in texts:
        response, name, level = text.split("|")
        rows.append(AXES[NAMES.index(name)] * (int(level) - 2) / 2 + noise(text) + 3 * noise(response) + 1.0)
    return np.asarray(rows, np.float32).reshape(len(texts), DIM)


def table(responses=16):
    """Ordered pairs of toy responses in all splits."""
    folds = ("train", "train", "validation", "heldout_responses")
    rows = []
    for response in range(responses):
        for name in NAMES:
            for low in range(5):
                for high in range(low + 1, 5):
                    fold = folds[response % 4]
                    apart = (low, high) == (1, 3) and fold in ("train", "validation")
                    texts = [f"r{response}|{name}|{level}" for level in (low, high)]
                    rows.append((f"r{response}", name, low, high, *texts, high - low,
                                 "heldout_levels" if apart else fold))  # fmt: skip
    names = ["response_id", "attribute", "low", "high", "low_text", "high_text", "gap", "split"]
    return pl.DataFrame(rows, schema=names, orient="row")


@pytest.fixture(scope="module")
def fitted():
    pairs = table()
    return pairs, fit_predictors(pairs, encode, encoder="toy", widths=())


def every_text(pairs):
    return sorted({*pairs["low_text"], *pairs["high_text"]})


def test_predictors_recover_the_order_of_held_out_texts(fitted):
    pairs, predictors = fitted
    rows = accuracy(predictors, pairs, encode)
    far = rows.filter(split="heldout_responses", gap=-2)
    assert far.height == 4
    assert far["accuracy"].min() >= 0.95
    assert rows.filter(split="heldout_levels", gap=2)["accuracy"].min() >= 0.95
    whole = rows.filter(pl.col("attribute").is_null() & pl.col("gap").is_null())
    assert whole["count"].sum() == pairs.height
    assert (rows["ci_low"] <= rows["accuracy"]).all()
    assert (rows["ci_high"] + 1e-9 >= rows["accuracy"]).all()


def test_accuracy_is_counted_by_hand(fitted):
    pairs, predictors = fitted
    mine = pairs.filter(split="heldout_responses", attribute="humor", gap=1)
    scores = lambda side: predictors.scores(encode(mine[side].to_list()))[:, 0]  # noqa: E731
    right = (scores("high_text") > scores("low_text")).mean()
    row = (
        accuracy(predictors, pairs, encode)
        .filter(split="heldout_responses", attribute="humor", gap=1)
        .row(0, named=True)
    )
    assert (row["count"], row["responses"], row["accuracy"]) == (16, 4, pytest.approx(right))
    assert wilson(1.0, 16)[0] == pytest.approx(1 / (1 + 1.959964**2 / 16))


def judge_of(scores):
    """One attribute whose score of a text is given."""
    one = np.ones((1, 1), np.float32)
    predictors = AttributePredictors(
        ("mood",),
        "toy",
        np.zeros(1, np.float32),
        1.0,
        one,
        one[0],
        0 * one[0],
        np.zeros((1, 1, 1), np.float32),
        0 * one,
    )
    return predictors, lambda texts: np.array([[scores[text]] for text in texts], np.float32).reshape(-1, 1)


def test_intervals_of_accuracy_draw_responses_and_not_pairs():
    """Responses of their own difficulty: a bootstrap written with loops agrees, and pairs as trials are too sure."""
    draw = np.random.default_rng(4)
    pairs = pl.DataFrame(
        [(f"r{r}", "mood", low, high, f"{r}|{low}", f"{r}|{high}", high - low, "heldout_responses")
         for r in range(30) for low in range(5) for high in range(low + 1, 5)],
        schema=["response_id", "attribute", "low", "high", "low_text", "high_text", "gap", "split"], orient="row",
    )  # fmt: skip
    noise = np.repeat(draw.choice([0.2, 4.0], 30), 5)  # easy or hard
    scores = {f"{r}|{level}": level + noise[5 * r + level] * draw.normal() for r in range(30) for level in range(5)}
    predictors, embed = judge_of(scores)
    row = accuracy(predictors, pairs, embed).filter(pl.col("gap").is_null()).row(0, named=True)
    right = {f"r{r}": [scores[f"{r}|{h}"] > scores[f"{r}|{low}"] for low in range(5) for h in range(low + 1, 5)]
             for r in range(30)}  # fmt: skip
    names = list(right)
    drawn = [np.concatenate([right[names[i]] for i in draw.integers(30, size=30)]).mean() for _ in range(4000)]
    assert row["accuracy"] == pytest.approx(np.mean(list(right.values())))
    np.testing.assert_allclose([row["ci_low"], row["ci_high"]], np.percentile(drawn, [2.5, 97.5]), atol=0.012)
    low, high = wilson(row["accuracy"], row["count"])
    assert row["ci_high"] - row["ci_low"] > 1.3 * (high - low)


def test_where_all_pairs_are_right_each_response_is_one_trial():
    scores = {f"{r}|{level}": float(level) for r in range(4) for level in range(5)}
    pairs = table(responses=4).filter(attribute="humor").with_columns(
        attribute=pl.lit("mood"), split=pl.lit("train"),
        low_text=pl.format("{}|{}", pl.col("response_id").str.slice(1), "low"),
        high_text=pl.format("{}|{}", pl.col("response_id").str.slice(1), "high"),
    )  # fmt: skip
    predictors, embed = judge_of(scores)
    rows = accuracy(predictors, pairs, embed)
    assert set(rows["accuracy"]) == {1.0}
    assert set(zip(rows["ci_low"], rows["ci_high"], strict=True)) == {wilson(1.0, 4)}
    assert not accuracy(predictors, pairs.clear(), embed).height


def test_a_linear_head_is_the_minimum_that_scipy_finds():
    draw = np.random.default_rng(1)
    features = draw.normal(size=(40, 6)).astype(np.float32)
    pairs = [[(int(a), int(b)) for a, b in draw.integers(40, size=(size, 2))] for size in (30, 12)]
    heads = fit_heads(features, Rows.of(pairs), np.array([0.1, 0.01]), ["a", "b"])
    for rows, l2, found in zip(pairs, (0.1, 0.01), heads.weight, strict=True):
        low, high = np.array(rows).T
        difference = (features[high] - features[low]).astype(float)
        loss = lambda w, d=difference, s=l2: np.logaddexp(0, -d @ w).mean() + s / 2 * w @ w  # noqa: E731
        assert loss(found) <= minimize(loss, np.zeros(6)).fun + 1e-6
        np.testing.assert_allclose(found, minimize(loss, np.zeros(6), tol=1e-10).x, atol=2e-3)


def test_scores_are_in_units_of_levels(fitted):
    pairs, predictors = fitted
    trained = every_text(pairs.filter(split="train"))
    scores = predictors.scores(encode(trained))
    for column, name in enumerate(NAMES):
        mine = [row for row, text in enumerate(trained) if text.split("|")[1] == name]
        wanted = np.array([(int(trained[row][-1]) - 2) / 2 for row in mine])
        assert np.abs(scores[mine, column] - wanted).mean() < 0.25
        assert abs((scores[mine, column] - wanted).mean()) < 0.05


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_permuting_the_names_permutes_the_outputs(fitted, hidden):
    pairs, _ = fitted
    order = [2, 0, 1]
    plain = fit_predictors(pairs, encode, widths=(), hidden=hidden, strengths=(1e-2,), seed=3)
    other = fit_predictors(
        pairs, encode, names=[NAMES[i] for i in order], widths=(), hidden=hidden, strengths=(1e-2,), seed=3
    )
    features = encode(every_text(pairs)[:9])
    np.testing.assert_allclose(other.scores(features), plain.scores(features)[:, order], atol=2e-3)
    chosen = plain.select([NAMES[i] for i in order])
    np.testing.assert_array_equal(chosen.embeddings(features), plain.embeddings(features)[:, order])
    assert accuracy(plain, pairs, encode).filter(split="heldout_responses", gap=-2)["accuracy"].min() >= 0.9


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_save_and_load_keep_every_bit(fitted, tmp_path, hidden):
    pairs, _ = fitted
    predictors = fit_predictors(pairs, encode, encoder="toy", widths=(), hidden=hidden, strengths=(1e-2,))
    predictors.save(tmp_path / "predictors.safetensors")
    loaded = AttributePredictors.load(tmp_path / "predictors.safetensors")
    for field in fields(AttributePredictors):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(predictors, field.name))
    features = encode(every_text(pairs)[:7])
    np.testing.assert_array_equal(loaded.embeddings(features), predictors.embeddings(features))


def test_an_embedding_begins_with_the_score_and_adds_what_the_score_lacks(fitted):
    pairs, predictors = fitted
    features = encode(every_text(pairs.filter(split="train")))
    embedding = predictors.embeddings(features)
    assert embedding.shape == (len(features), 3, 8)
    np.testing.assert_array_equal(embedding[..., 0], predictors.scores(features))
    for weight, directions in zip(predictors.weight, predictors.directions, strict=True):
        assert np.abs(weight @ directions).max() < 1e-4 * np.linalg.norm(weight) * np.linalg.norm(directions)
    assert predictors.embeddings(features[:0]).shape == (0, 3, 8)


@pytest.mark.parametrize("neutral", [False, True])
def test_a_head_learns_to_leave_what_other_attributes_say_alone(neutral):
    """Texts that express two attributes: scores follow their own attribute, and much less the other."""
    pairs = table()
    predictors = fit_predictors(pairs, encode, widths=(), neutral=neutral)
    for column, name in enumerate(NAMES):
        other = NAMES[(column + 1) % 3]
        own = predictors.scores(encode([f"new{r}|{name}|{level}" for r in range(8) for level in (0, 4)]))[:, column]
        rest = predictors.scores(encode([f"new{r}|{other}|{level}" for r in range(8) for level in (0, 4)]))[:, column]
        moved, leaked = (own[1::2] - own[::2]).mean(), np.abs((rest[1::2] - rest[::2]).mean())
        assert moved > 1.2
        assert leaked < 0.1 * moved


def test_texts_at_rest_are_of_one_response_unless_responses_are_neutral():
    pairs = table(responses=4).filter(split="train")
    place = {text: row for row, text in enumerate(every_text(pairs))}
    of = {row: text.split("|")[:2] for text, row in place.items()}
    within = _draw_within(pairs, "humor", place, np.random.default_rng(0))
    assert len(within) >= 3000
    assert all(of[a][0] == of[b][0] for a, b in within)
    assert all("humor" not in (of[a][1], of[b][1]) for a, b in within)


def words(sentences):
    """A toy encoder of sentences: a direction for each known word, none for the rest."""
    known = {"fine": 1.0, "awful": -1.0, "rain": 0.0}
    rows = []
    for sentence in sentences:
        row = np.zeros(4)
        for word, value in known.items():
            row[:2] += (word in sentence) * np.array([value, 1.0])
        row[2] = "rain" in sentence
        row[3] = 1.0
        rows.append(row / np.linalg.norm(row))
    return np.asarray(rows, np.float32).reshape(len(sentences), 4)


def test_a_text_is_read_as_the_mean_over_its_sentences_and_its_length():
    texts = ["It is fine. Rain fell.", "It is awful.", "Rain fell.\nRain fell. It is fine."]
    maps = kernel(texts, words, 0.5)
    found = read(texts, words, maps)
    for row, text in zip(found, texts, strict=True):
        parts = sentences(text)
        each = maps(words(parts), np.zeros(len(parts)))
        np.testing.assert_allclose(row[:-1], each.mean(0), rtol=1e-5, atol=1e-6)
        assert row[-1] == pytest.approx(0.3 * np.log(1 + len(text)))
    assert read([], words, maps).shape == (0, found.shape[1])


def test_kernel_predictors_are_chosen_saved_and_read_back(tmp_path):
    said = {0: "All is awful.", 1: "It is awful, rain.", 2: "Rain fell.", 3: "It is fine, rain.", 4: "All is fine."}
    rows = [
        (f"r{r}", "mood", low, high, f"Answer {r}. {said[low]}", f"Answer {r}. {said[high]}", high - low,
         "validation" if r % 3 == 0 else "train")
        for r in range(9) for low in range(5) for high in range(low + 1, 5)
    ]  # fmt: skip
    columns = ["response_id", "attribute", "low", "high", "low_text", "high_text", "gap", "split"]
    pairs = pl.DataFrame(rows, schema=columns, orient="row")
    told = []
    predictors = fit_predictors(pairs, words, encoder="toy", widths=(0.3, 1.0), strengths=(1e-3, 1e-2),
                                report=lambda *fits: told.append(fits))  # fmt: skip
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert accuracy(predictors, pairs, words).filter(gap=4)["accuracy"].min() == 1.0
    predictors.save(tmp_path / "p.safetensors")
    loaded = AttributePredictors.load(tmp_path / "p.safetensors")
    texts = [f"New. {one}" for one in said.values()]
    score, again = (one.scores(one.read(texts, words))[:, 0] for one in (predictors, loaded))
    np.testing.assert_array_equal(score, again)
    assert (np.diff(score) > 0).all()


def test_wrong_names_features_and_files_are_refused_in_one_line(fitted, tmp_path):
    pairs, predictors = fitted
    for wrong, message in (
        (lambda: predictors.select(["wit"]), "'wit': no predictor"),
        (lambda: predictors.scores(np.zeros((2, 3), np.float32)), "embedding of 3 columns"),
        (lambda: fit_predictors(pairs, encode, names=["wit"]), "no training pair"),
        (lambda: fit_predictors(pairs, encode, widths=(), hidden=(4, 4)), "one hidden layer"),
        (lambda: AttributePredictors.load(tmp_path / "none"), "attributes train"),
        (lambda: AttributeStore.open(tmp_path), "attributes embed"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_a_lookup_is_independent_of_the_order_of_ids_and_names(fitted, tmp_path):
    pairs, predictors = fitted
    ids = every_text(pairs)[:12]
    features = encode(ids)
    store = write_store(tmp_path, ids, features, predictors)
    asked, names = [ids[5], "unheard of", ids[0], ids[5]], ["security", "wit", "humor"]
    found = AttributeStore.open(tmp_path).lookup(asked, names)
    assert found.mask.tolist() == [[True, False, True], [False] * 3, [True, False, True], [True, False, True]]
    columns = [NAMES.index("security"), NAMES.index("humor")]
    scores, embeddings = predictors.scores(features), predictors.embeddings(features)
    for row, at in ((0, 5), (2, 0), (3, 5)):
        np.testing.assert_array_equal(found.score[row, [0, 2]], scores[at, columns])
        np.testing.assert_allclose(found.embedding[row, [0, 2]], embeddings[at, columns], rtol=2**-8)
    assert not found.embedding[~found.mask].any()
    back = store.lookup(list(reversed(ids)), list(reversed(NAMES)))
    np.testing.assert_array_equal(back.score, scores[::-1, ::-1])


def test_a_store_is_replaced_whole_and_a_broken_one_is_refused(fitted, tmp_path):
    pairs, predictors = fitted
    ids = every_text(pairs)[:6]
    write_store(tmp_path, ids, encode(ids), predictors)
    with pytest.raises(ValueError, match="different"):
        write_store(tmp_path, ["a", "a"], encode(ids[:2]), predictors)
    assert AttributeStore.open(tmp_path).ids == tuple(ids)
    write_store(tmp_path, ids[:2], encode(ids[:2]), predictors.select(["humor"]))
    assert len(list(tmp_path.iterdir())) == 3
    assert AttributeStore.open(tmp_path).names == ("humor",)
    assert write_store(tmp_path, [], encode([]), predictors).lookup(["a"], NAMES).mask.sum() == 0
    about = json.loads((tmp_path / "index.json").read_text("utf8"))
    (tmp_path / "index.json").write_text(json.dumps(about | {"width": 3}), "utf8")
    with pytest.raises(DataError, match="not a whole attribute store"):
        AttributeStore.open(tmp_path)
