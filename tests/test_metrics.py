"""Metrics against slow loops, the laws of sums, intervals that cover, and the published figures of the protocol."""

import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from pluralprefs import baselines, contrasts, intervals, metrics
from pluralprefs.results import results_table


def predictions(log_odds, target, user, **columns):
    """A prediction table with sensible constants; `columns` overrides them with scalars or lists."""
    size = len(log_odds)
    content = {
        "example_id": [f"e{row}" for row in range(size)],
        "model": "m",
        "cell": "seen/testpair",
        "prompt_id": "p",
        "first_id": "a",
        "second_id": "b",
        "tie": False,
        "weight": 1.0,
        **columns,
        "log_odds": list(log_odds),
        "target": list(target),
        "user_id": list(user),
    }
    return pl.DataFrame(
        [
            pl.Series(name, value if isinstance(value, list) else [value] * size, dtype=kind)
            for name, kind in metrics.PREDICTIONS.items()
            for value in [content.get(name)]
        ]
    )


@pytest.fixture
def mixed():
    """Soft and hard targets, ties, weights, zeros, unknown users and two communities."""
    random = np.random.default_rng(1)
    size = 300
    target = random.choice([0.0, 1.0, 0.5, 0.2, 0.8], size=size)
    tie = random.random(size) < 0.1
    log_odds = np.where(random.random(size) < 0.1, 0.0, random.normal(size=size) * 3)
    user = [None if draw < 0.1 else f"u{int(draw * 20)}" for draw in random.random(size)]
    return predictions(
        log_odds,
        np.where(tie, 0.5, target),
        user,
        tie=tie.tolist(),
        weight=random.choice([0.5, 1.0, 2.0], size=size).tolist(),
        community_id=random.choice(["north", "south"], size=size).tolist(),
    )


def slow_metrics(table):
    """Every metric by plain loops over rows."""
    users, bins = {}, {}
    correct = decided = nats = mass = squares = 0.0
    for row in table.iter_rows(named=True):
        log_odds, target, weight = row["log_odds"], row["target"], row["weight"]
        probability = 1 / (1 + math.exp(-log_odds))
        loss = -target * math.log(probability) - (1 - target) * math.log(1 - probability)
        mine = users.setdefault(row["user_id"], [0.0, 0.0, 0.0, 0.0])
        if not row["tie"] and target != 0.5:
            hit = 0.5 if log_odds == 0 else float((log_odds > 0) == (target > 0.5))
            correct, decided = correct + weight * hit, decided + weight
            mine[0], mine[1] = mine[0] + weight * hit, mine[1] + weight
        nats, mass, squares = nats + weight * loss, mass + weight, squares + weight * (probability - target) ** 2
        mine[2], mine[3] = mine[2] + weight * loss, mine[3] + weight
        sure = max(probability, 1 - probability)
        won = 0.5 if log_odds == 0 else target if log_odds > 0 else 1 - target
        place = bins.setdefault(min(int((sure - 0.5) * 30), 14), [0.0, 0.0])
        place[0], place[1] = place[0] + weight * sure, place[1] + weight * won
    users.pop(None, None)
    accuracies = sorted(hit / all_ for hit, all_, _, _ in users.values() if all_)
    room = len(accuracies) / 10
    worst, left = 0.0, room
    for accuracy in accuracies:
        worst, left = worst + accuracy * min(1.0, left), left - min(1.0, left)
    return {
        "accuracy": correct / decided,
        "nll": nats / mass,
        "brier": squares / mass,
        "ece": sum(abs(sure - won) for sure, won in bins.values()) / mass,
        "macro_accuracy": sum(accuracies) / len(accuracies),
        "macro_nll": sum(loss / all_ for _, _, loss, all_ in users.values()) / len(users),
        "worst_decile_accuracy": worst / room,
    }


def values(rows):
    return dict(zip(rows["metric"], rows["value"], strict=True))


def test_every_metric_equals_a_slow_loop(mixed):
    expected = slow_metrics(mixed)
    columns = [mixed[name].to_numpy() for name in ("log_odds", "target", "tie", "weight")]
    assert metrics.evaluate_arrays(*columns, user=mixed["user_id"]) == pytest.approx(expected)
    found = values(metrics.summarise(mixed))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_zero_log_odds_count_one_half_and_ties_do_not_count():
    table = predictions([0.0, 2.0, 2.0, -1.0], [1.0, 0.5, 0.5, 0.9], ["a"] * 4, tie=[False, True, False, False])
    rows = metrics.summarise(table)
    assert values(rows)["accuracy"] == 0.25
    assert rows.filter(pl.col("metric") == "accuracy")["count"].item() == 2
    assert rows.filter(pl.col("metric") == "nll")["count"].item() == 4


def test_swapping_the_sides_changes_no_metric(mixed):
    swapped = mixed.with_columns(-pl.col("log_odds"), target=1 - pl.col("target"))
    for one, other in zip(metrics.summarise(mixed).rows(), metrics.summarise(swapped).rows(), strict=True):
        assert one == pytest.approx(other)


def test_row_order_changes_neither_values_nor_intervals(mixed):
    shuffled = mixed.sample(fraction=1.0, shuffle=True, seed=3)
    for one, other in zip(metrics.summarise(mixed).rows(), metrics.summarise(shuffled).rows(), strict=True):
        assert one == pytest.approx(other)


def test_sums_of_parts_merge_to_the_sums_of_the_whole(mixed):
    parts = [metrics.sums(mixed[start : start + 100]) for start in (0, 100, 200)]
    whole = metrics.sums(mixed)
    left = metrics.merge(metrics.merge(parts[0], parts[1]), parts[2])
    right = metrics.merge(parts[2], metrics.merge(parts[1], parts[0]))
    for table in (left, right):
        assert table.columns == whole.columns
        for one, other in zip(table.rows(), whole.rows(), strict=True):
            assert one == pytest.approx(other)


def test_padding_rows_of_weight_zero_are_dropped(mixed):
    padding = mixed.head(5).with_columns(weight=0.0, log_odds=50.0, example_id=pl.lit("pad") + pl.col("example_id"))
    assert metrics.summarise(pl.concat([mixed, padding])).equals(metrics.summarise(mixed))


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_diverged_log_odds_is_an_error_that_names_the_example(bad):
    table = predictions([1.0, bad], [1.0, 0.0], ["a", "b"])
    with pytest.raises(ValueError, match=r"example_id 'e1'.*log_odds") as caught:
        metrics.summarise(table)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="lack the column 'tie'"):
        metrics.summarise(predictions([1.0], [1.0], ["a"]).drop("tie"))


def test_an_empty_table_gives_no_rows():
    rows = metrics.summarise(predictions([], [], []))
    assert rows.is_empty()
    assert dict(rows.schema) == metrics.METRIC_ROWS


def test_one_user_has_values_but_no_interval():
    rows = metrics.summarise(predictions([1.0, -1.0], [1.0, 1.0], ["a", "a"]))
    assert values(rows)["accuracy"] == 0.5
    assert rows["ci_low"].null_count() == len(rows)


def test_unknown_users_are_clusters_of_their_own_and_have_no_macro_metrics():
    random = np.random.default_rng(0)
    rows = metrics.summarise(predictions(random.normal(size=50), random.choice([0.0, 1.0], 50), [None] * 50))
    assert set(rows["metric"]) == {"accuracy", "nll", "brier", "ece"}
    assert rows["users"].unique().to_list() == [0]
    assert rows["ci_low"].null_count() == 0


def test_extreme_log_odds_stay_finite():
    rows = metrics.summarise(predictions([1000.0, -1000.0], [0.0, 0.0], ["a", "b"]))
    assert values(rows)["nll"] == pytest.approx(500.0)


def test_the_bootstrap_interval_covers_the_truth_of_clustered_rows():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        user = np.repeat(np.arange(40), random.integers(2, 12, size=40))
        rate = np.clip(0.7 + 0.15 * random.normal(size=40), 0, 1)[user]
        hits = (random.random(len(user)) < rate).astype(float)
        low, high = intervals.bootstrap_interval(hits, user, draws=300, seed=trial)
        covered += low <= 0.6985 <= high  # the mean of the clipped rate
    assert 0.89 <= covered / 200 <= 0.985


def test_the_bootstrap_respects_users_where_rows_repeat_them():
    hits = np.repeat(np.random.default_rng(0).choice([0.0, 1.0], 50), 20)
    by_user = intervals.bootstrap_interval(hits, np.repeat(np.arange(50), 20))
    by_row = intervals.bootstrap_interval(hits, [None] * 1000)
    assert by_user[1] - by_user[0] > 3 * (by_row[1] - by_row[0])


def test_the_bootstrap_equals_a_loop_that_copies_users():
    values_, user = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "b", "c", "c"])
    sums, sizes = np.array([1.0, 1.0, 1.0]), np.array([2.0, 1.0, 2.0])
    drawn = np.random.default_rng(5).integers(3, size=(400, 3))
    expected = np.percentile([sums[row].sum() / sizes[row].sum() for row in drawn], [2.5, 97.5])
    assert intervals.bootstrap_interval(values_, user, draws=400, seed=5) == pytest.approx(tuple(expected))


def test_many_users_are_resampled_in_bounded_memory():
    drawn = intervals.bootstrap(lambda counts: counts.sum(axis=1), 100_000, draws=250)
    assert drawn.tolist() == [100_000.0] * 200


def test_groups_draws_and_controls_are_kept_apart():
    one = predictions([1.0, 1.0], [1.0, 0.0], ["a", "b"], shots=2, draw=0)
    two = one.with_columns(draw=pl.lit(1, pl.Int64), log_odds=-pl.col("log_odds"))
    wrong = one.with_columns(control=pl.lit("wrong_user"))
    rows = metrics.summarise(pl.concat([one, two, wrong])).filter(pl.col("metric") == "accuracy")
    assert rows.select("shots", "control", "value", "count").rows() == [(2, None, 0.5, 2), (2, "wrong_user", 0.5, 2)]


def test_pooled_seeds_average_the_seeds_and_report_their_spread(mixed):
    seeds = [mixed.with_columns(seed=pl.lit(number, pl.Int64)) for number in (0, 1)]
    seeds[1] = seeds[1].with_columns(log_odds=-0.5 * pl.col("log_odds"))
    pooled = metrics.summarise(pl.concat(seeds), pool_seeds=True)
    single = [values(metrics.summarise(table)) for table in seeds]
    for name in ("accuracy", "nll", "brier", "ece", "macro_accuracy"):
        assert values(pooled)[name] == pytest.approx((single[0][name] + single[1][name]) / 2)
    assert values(pooled)["accuracy_seed_sd"] == pytest.approx(np.std([part["accuracy"] for part in single], ddof=1))
    assert pooled["seed"].null_count() == len(pooled)
    nll = pooled.filter(pl.col("metric") == "nll")
    assert nll["count"].item() == len(mixed)


def test_communities_are_scored_apart_and_the_worst_is_named(mixed):
    rows = metrics.summarise(mixed, by_community=True)
    accuracy = {}
    for name in ("north", "south"):
        inside = mixed.filter(pl.col("community_id") == name)
        accuracy[name] = slow_metrics(inside)["accuracy"]
        found = values(rows.filter(pl.col("community") == name, pl.col("metric") != "worst_community_accuracy"))
        assert found["accuracy"] == pytest.approx(accuracy[name])
    worst = rows.filter(pl.col("metric") == "worst_community_accuracy")
    assert worst["community"].item() == min(accuracy, key=accuracy.__getitem__)
    assert worst["value"].item() == pytest.approx(min(accuracy.values()))


def test_paired_difference_of_a_model_with_itself_is_zero(mixed):
    estimate = contrasts.paired_difference(mixed, mixed)
    assert (estimate.value, estimate.ci_low, estimate.ci_high, estimate.p) == (0.0, 0.0, 0.0, 1.0)


def test_paired_difference_equals_the_difference_of_the_means(mixed):
    better = mixed.with_columns(log_odds=pl.col("log_odds") + 2 * (pl.col("target") - 0.5), model=pl.lit("better"))
    for metric in ("nll", "accuracy"):
        estimate = contrasts.paired_difference(better, mixed.sample(fraction=1.0, shuffle=True, seed=1), metric)
        gap = values(metrics.summarise(better))[metric] - values(metrics.summarise(mixed))[metric]
        assert estimate.value == pytest.approx(gap)
        assert estimate.ci_low < estimate.value < estimate.ci_high
        assert estimate.p < 0.01


def test_paired_difference_averages_seeds_row_by_row(mixed):
    seeds = [
        mixed.with_columns(seed=pl.lit(number, pl.Int64), log_odds=pl.col("log_odds") * scale)
        for number, scale in ((0, 1), (1, 3))
    ]
    both = contrasts.paired_difference(pl.concat(seeds), mixed)
    assert both.value == pytest.approx(contrasts.paired_difference(seeds[1], mixed).value / 2)


def test_paired_difference_refuses_rows_that_differ(mixed):
    with pytest.raises(ValueError, match="lack 1 rows of the other side, first example_id 'e0'"):
        contrasts.paired_difference(mixed, mixed.filter(pl.col("example_id") != "e0"))
    with pytest.raises(ValueError, match="several values of model"):
        contrasts.paired_difference(pl.concat([mixed, mixed.with_columns(model=pl.lit("n"))]), mixed)
    with pytest.raises(ValueError, match="disagree about its target"):
        contrasts.paired_difference(mixed, mixed.with_columns(target=1 - pl.col("target")))
    with pytest.raises(ValueError, match="occurs twice"):
        contrasts.paired_difference(pl.concat([mixed, mixed]), mixed)
    with pytest.raises(ValueError, match="metric 'auc' is unknown"):
        contrasts.paired_difference(mixed, mixed, "auc")


def test_controls_give_the_wrong_user_gain_and_the_flip_rate():
    right = predictions([1.0, 1.0, -1.0, 1.0], [1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"])
    wrong = right.with_columns(control=pl.lit("wrong_user"), log_odds=pl.Series([1.0, -1.0, 1.0, 0.0]))
    flip = right.with_columns(control=pl.lit("label_flip"), log_odds=pl.Series([-1.0, -1.0, 1.0, 2.0]))
    rows = contrasts.controls(pl.concat([right, wrong, flip]))
    assert values(rows) == {"wrong_user_gain": 1.0 - 1.5 / 4, "flip_rate": 0.75}
    assert rows["users"].to_list() == [2, 2]


def test_majority_of_others_leaves_the_user_out_and_follows_the_sides():
    table = predictions([0.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0], ["a", "b", "c", "a", None])
    table = table.with_columns(
        first_id=pl.Series(["x", "y", "x", "q", "x"]), second_id=pl.Series(["y", "x", "y", "r", "y"])
    )
    # a, b, c and the unknown user all prefer x to y; nobody else judged (q, r).
    assert baselines.majority_of_others(table) == pytest.approx([np.log(4), -np.log(4), np.log(4), 0.0, np.log(4)])


def text_table(first, second, target, **columns):
    return predictions([0.0] * len(first), target, [f"u{row}" for row in range(len(first))], **columns).with_columns(
        first=pl.Series(first), second=pl.Series(second)
    )


def test_length_only_and_the_probe_find_a_preference_for_length_and_bullets():
    random = np.random.default_rng(0)
    texts = ["word " * count + ("\n- point" if count % 2 else "") for count in random.integers(1, 40, size=200)]
    first, second = texts[:100], texts[100:]
    longer = [float(len(one) > len(other)) for one, other in zip(first, second, strict=True)]
    table = text_table(first, second, longer)
    rows = baselines.artefact_probe(table, table)
    accuracy = rows.filter(pl.col("metric") == "accuracy")
    assert dict(zip(accuracy["model"], accuracy["value"], strict=True))["length only"] > 0.97
    mirrored = text_table(second, first, longer)
    assert baselines.artefact_log_odds(table, mirrored) == pytest.approx(-baselines.artefact_log_odds(table, table))


def test_the_logistic_fit_is_at_the_minimum_of_its_objective():
    random = np.random.default_rng(0)
    features, weight = random.normal(size=(60, 3)), random.uniform(0.5, 2, 60)
    target = random.random(60)
    slopes = baselines.fit_logistic(features, target, weight, ridge=0.1)
    gradient = features.T @ (weight * (1 / (1 + np.exp(-features @ slopes)) - target)) / weight.sum() + 0.1 * slopes
    assert np.abs(gradient).max() < 1e-8


def test_chats_and_missing_texts_have_artefacts_too():
    chat = [[{"role": "assistant", "content": "I'm sorry"}, {"role": "user", "content": "Why?"}], []]
    table = pl.DataFrame({"first": pl.Series(chat), "second": pl.Series(chat[::-1])})
    assert baselines.texts(table, "first") == ["I'm sorry\nWhy?", ""]
    assert baselines.artefact_differences(table)[0, -1] == 1.0
    assert baselines.texts(pl.DataFrame({"first": ["a", None]}), "first") == ["a", ""]


def test_the_results_table_repeats_models_that_ignore_the_shots(mixed):
    shot = [mixed.with_columns(cell=pl.lit("unseen/testpair"), shots=pl.lit(count, pl.Int64)) for count in (0, 8)]
    flat = mixed.with_columns(cell=pl.lit("unseen/testpair"), model=pl.lit("base"))
    lines = results_table(metrics.summarise(pl.concat([*shot, flat]))).splitlines()
    _, _, zero, eight = (line.split("|") for line in lines)
    assert [zero[1].strip(), eight[1].strip()] == ["unseen/testpair@0", "unseen/testpair@8"]
    assert zero[2] == eight[2] == zero[3]
    assert len({len(line) for line in lines}) == 1
    wide = results_table(metrics.summarise(pl.concat([shot[0], flat])), models=["base", "other", "more"])
    assert [line.split("|")[1].strip() for line in wide.splitlines()[2:]] == ["base", "other", "more"]


def test_the_results_table_refuses_to_choose_a_seed(mixed):
    seeds = pl.concat([mixed.with_columns(seed=pl.lit(number, pl.Int64)) for number in (0, 1)])
    with pytest.raises(ValueError, match="pool_seeds"):
        results_table(metrics.summarise(seeds))
    assert "; " in results_table(metrics.summarise(seeds, pool_seeds=True))


def test_metrics_do_not_import_jax_or_matplotlib():
    code = (
        "import sys; import pluralprefs.metrics, pluralprefs.contrasts, pluralprefs.baselines, pluralprefs.results;"
        "sys.exit('jax' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_baselines_reproduce_the_figures_of_the_protocol_on_ukpconvarg1(shared_data):
    rows = pl.read_parquet(shared_data / "protocol" / "ukpconvarg1.parquet")
    text = dict(pl.read_parquet(shared_data / "ukpconvarg1" / "arguments.parquet").select("argument_id", "text").rows())
    table = rows.select(
        pl.col("row").cast(pl.String).alias("example_id"),
        pl.col("user").alias("user_id"),
        pl.col("prompt").alias("prompt_id"),
        *("first_id", "second_id", "cell"),
        pl.col("target").cast(pl.Float64),
        pl.lit(False).alias("tie"),
        pl.lit(1.0).alias("weight"),
        *(pl.col(f"{side}_id").replace_strict(text).alias(side) for side in ("first", "second")),
    )
    test = pl.col("cell").is_in(["seen/testpair", "seen/newprompt", "unseen/testpair", "unseen/newprompt"])
    majority = table.with_columns(pl.Series("log_odds", baselines.majority_of_others(table))).filter(test)
    train = table.filter(pl.col("cell").is_in(["train", "validation"]))
    found = pl.concat(
        [
            baselines.prediction_rows(majority, majority["log_odds"].to_numpy(), "majority"),
            baselines.prediction_rows(table.filter(test), baselines.length_only(train, table.filter(test)), "length"),
        ]
    )
    summary = metrics.summarise(found).rows_by_key(["model", "cell", "metric"], named=True, unique=True)
    published = {
        "majority": (0.726, 0.557, 0.728, 0.549, 0.723, 0.558, 0.747, 0.525),
        "length": (0.692, 0.593, 0.677, 0.596, 0.714, 0.572, 0.699, 0.578),
    }
    cells = ("seen/testpair", "seen/newprompt", "unseen/testpair", "unseen/newprompt")
    for model, figures in published.items():
        mine = [summary[model, cell, name]["value"] for cell in cells for name in ("accuracy", "nll")]
        assert mine == pytest.approx(figures, abs=0.00105)
    accuracy = summary["majority", "seen/testpair", "accuracy"]
    assert (accuracy["ci_low"], accuracy["ci_high"]) == pytest.approx((0.710, 0.740), abs=0.003)
