"""Pictures of profiles, users, groups and training draw the numbers of their tables, with intervals and counts."""

import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_plots import metric_rows

from pluralprefs import plots
from pluralprefs.plots import profiles, users, worst
from pluralprefs.profiles import SCHEMA, over_seeds

ATTRIBUTES = ("warmth", "detail", "wit", "order")


def weights(means, half=0.1, kind="preference", user=None, seed=0):
    """Rows of communities with these means; "" is the population."""
    rows = [
        {"community": community, "user": user, "attribute": attribute, "kind": kind, "mean": float(value), "seed": seed,
         "ci_low": value - half, "ci_high": value + half, "n": 100 + place}
        for place, (community, values) in enumerate(means.items())
        for attribute, value in zip(ATTRIBUTES, values, strict=False)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA)


FOUR = {
    "": (0, 0, 0.5, 0),
    "a": (1, -1, 0.5, 0.1),
    "b": (-1, 1, 0.4, 0),
    "c": (0.9, -1.1, 0.5, 0),
    "d": (-1, 0.9, 0.5, 0),
}


def texts(ax):
    return [text.get_text() for text in ax.texts]


def ticks(labels):
    return [label.get_text() for label in labels]


def test_a_heat_map_draws_deviations_and_greys_what_crosses_zero():
    ax = plots.heat_map(weights(FOUR))
    names, across = ticks(ax.get_yticklabels()), ticks(ax.get_xticklabels())
    image = ax.get_images()[0]
    drawn = image.get_array()
    for community, values in list(FOUR.items())[1:]:
        row = next(place for place, name in enumerate(names) if name.startswith(f"{community} "))
        for attribute, value, base in zip(ATTRIBUTES, values, FOUR[""], strict=True):
            cell = drawn[row, across.index(attribute)]
            if abs(value - base) < np.hypot(0.1, 0.1):
                assert np.ma.is_masked(cell) or np.isnan(cell)
            else:
                assert cell == pytest.approx(value - base)
    assert to_hex(image.get_cmap()(np.nan)) == profiles.UNSURE
    low, high = image.get_clim()
    assert low == -high
    assert "−1.0" in texts(ax)
    assert "0.0" in texts(ax)
    assert any(name == "a (n = 101)" for name in names)
    assert "minus the population" in ax.figure.axes[1].get_ylabel()


def test_alike_communities_and_attributes_stand_side_by_side():
    ax = plots.heat_map(weights(FOUR))
    order = [name[0] for name in ticks(ax.get_yticklabels())]
    assert abs(order.index("a") - order.index("c")) == 1
    assert abs(order.index("b") - order.index("d")) == 1


def test_a_map_of_the_truth_takes_order_and_colours_of_another():
    learned, truth = weights(FOUR), weights({name: 3 * np.array(row) for name, row in FOUR.items()}, half=0)
    truth = truth.with_columns(n=None).sample(fraction=1.0, shuffle=True, seed=1)
    one, other = plots.heat_map(learned), plots.heat_map(truth, like=learned)
    names = [name.partition(" ")[0] for name in ticks(one.get_yticklabels())]
    assert ticks(other.get_yticklabels()) == names
    assert ticks(one.get_xticklabels()) == ticks(other.get_xticklabels())
    assert one.get_images()[0].get_clim() == other.get_images()[0].get_clim()
    row, column = names.index("b"), ticks(one.get_xticklabels()).index("detail")
    assert [ax.get_images()[0].get_array()[row, column] for ax in (one, other)] == pytest.approx([1.0, 3.0])
    with pytest.raises(ValueError, match="heat_map: no community 'a'"):
        plots.heat_map(truth.filter(pl.col("community") != "a"), like=learned)


def test_dots_stand_beside_the_truth_where_it_is_known():
    truth = weights({name: np.array(row) + 7 for name, row in FOUR.items()})
    ax = plots.profile_dots(weights(FOUR), communities=["b"], attributes=["wit", "warmth"], truth=truth)
    bars = [list(line.get_xdata()) for line in ax.get_lines() if line.get_marker() == "|"]
    assert bars == [[7.4, 6.0], [7.5, 7.0]]
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "truth"
    with pytest.raises(ValueError, match="no community 'b'"):
        plots.profile_dots(weights(FOUR), communities=["b"], truth=truth.filter(pl.col("community") != "b"))


def test_the_interval_of_a_deviation_holds_both_errors():
    grid = profiles.grid_of(weights(FOUR, half=0.3), "preference", "test")
    found = profiles.deviations(grid)
    np.testing.assert_allclose(found.high - found.mean, np.hypot(0.3, 0.3))
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(20000, 4)) * 0.3  # of four communities, around their mean
    against = profiles.deviations(grid, "communities")
    np.testing.assert_allclose(against.high - against.mean, (noise[:, 0] - noise.mean(1)).std(), rtol=0.02)
    np.testing.assert_allclose(against.mean.sum(0), 0, atol=1e-12)
    assert [row[0] for row in against.mean] != [row[0] for row in found.mean]


def test_an_unknown_interval_is_grey_and_one_of_the_population_adds_nothing():
    unknown = pl.when(pl.col("community").is_in(["", "a"])).then(None)
    rows = weights(FOUR).with_columns(ci_low=unknown.otherwise("ci_low"), ci_high=unknown.otherwise("ci_high"))
    found = profiles.deviations(profiles.grid_of(rows, "preference", "test"))
    assert np.isnan(found.high[0]).all()
    np.testing.assert_allclose(found.high[1] - found.mean[1], 0.1)
    ax = plots.heat_map(rows)
    row = next(place for place, name in enumerate(ticks(ax.get_yticklabels())) if name.startswith("a "))
    assert np.ma.getmaskarray(ax.get_images()[0].get_array())[row].all()


def test_a_large_heat_map_writes_signs_and_a_small_one_numbers(monkeypatch):
    monkeypatch.setattr(profiles, "NUMBERED", 3)
    assert set(texts(plots.heat_map(weights(FOUR)))) == {"+", "−"}


def test_dots_have_intervals_counts_and_a_zero():
    ax = plots.profile_dots(weights(FOUR), communities=["b", "a"], attributes=["wit", "warmth"])
    assert ticks(ax.get_yticklabels()) == ["wit", "warmth"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["b (n = 102)", "a (n = 101)", "population (n = 100)"]
    segments = [lines.get_segments() for lines in ax.collections]
    assert np.allclose([[s[0][0], s[1][0]] for s in segments[0]], [[0.3, 0.5], [-1.1, -0.9]])
    dots = {line.get_label(): line.get_xdata() for line in ax.get_lines() if line.get_marker() != "None"}
    assert list(dots["a (n = 101)"]) == [0.5, 1.0]
    assert len({line.get_marker() for line in ax.get_lines() if line.get_label() in labels}) == 3
    assert "log-odds per unit" in ax.get_xlabel()


def test_what_is_liked_most_comes_first():
    ax = plots.profile_dots(weights({"a": (0, 3, 1, -2)}))
    assert ticks(ax.get_yticklabels()) == ["detail", "wit", "warmth", "order"]


def test_a_radar_is_closed_and_marks_zero():
    ax = plots.radar(weights(FOUR), communities=["a", "b"])
    circle, a, b = ax.get_lines()
    assert set(circle.get_ydata()) == {0.0}
    assert list(a.get_ydata()) == [1, -1, 0.5, 0.1, 1]
    assert ticks(ax.get_xticklabels()) == list(ATTRIBUTES)
    assert len(ax.collections) == 2, "bands"
    assert b.get_label() == "b (n = 102)"


def user_rows(count=12):
    """Users of two communities, apart in warmth."""
    draw = np.random.default_rng(1)
    parts = []
    for number in range(count):
        community = "ab"[number % 2]
        mean = np.array([3.0 if community == "a" else -3.0, 1, 0, 0]) + draw.normal(size=4) * [0.2, 0.3, 0.1, 0.01]
        parts.append(weights({community: mean}, user=f"user {number}").with_columns(n=pl.lit(number, pl.Int64)))
    return pl.concat(parts)


def test_a_user_stands_beside_the_community_with_what_differs_on_top():
    own = weights({"a": (1, 2, 0.5, 0.1)}, half=0.4, user="ana")
    ax = plots.user_profile(pl.concat([own, weights(FOUR)]), "ana")
    assert ticks(ax.get_yticklabels())[0] == "detail"
    community, user = (line for line in ax.get_lines() if line.get_marker() in "Do")
    assert list(user.get_xdata()) == [2, 1, 0.5, 0.1]
    assert list(community.get_xdata()) == [-1, 1, 0.5, 0.1]
    assert community.get_label() == "a (101 comparisons)"
    assert user.get_label() == "ana (100 comparisons)"


def test_a_profile_by_shots_draws_what_moves():
    parts = [weights({"a": (n, 0.1, -2 * n, 0)}, user="ana").with_columns(shots=pl.lit(n)) for n in (0, 2, 8)]
    ax = plots.profile_by_shots(pl.concat(parts), attributes=["wit", "warmth"])
    assert {"wit", "warmth"} == set(texts(ax))
    lines = [line for line in ax.get_lines() if line.get_marker() != "None"]
    assert list(lines[0].get_ydata()) == [0, -4, -16]
    assert ticks(ax.get_xticklabels()) == ["0", "2", "8"]
    moving = plots.profile_by_shots(pl.concat(parts))
    assert [line.get_color() for line in moving.get_lines()][1] == plots.accuracy.COLOURS[0]
    assert texts(moving)[0] == "wit", "the lowest at the end"


def test_the_map_of_users_is_their_plane_of_most_variance():
    rows = user_rows()
    ax = plots.user_map(rows)
    x = np.concatenate([dots.get_offsets()[:, 0] for dots in ax.collections if len(dots.get_offsets()) == 6])
    assert np.allclose(np.abs(x), 3, atol=1)
    table = rows.pivot(on="attribute", index=["user", "community"], values="mean").select(ATTRIBUTES).to_numpy()
    values = np.linalg.eigvalsh(np.cov(table.T))[::-1]
    plane, share = users.principal_plane(table)
    np.testing.assert_allclose(share, values[:2] / values.sum())
    np.testing.assert_allclose(plane.var(0, ddof=1), values[:2])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a (6 users)", "b (6 users)"]
    assert "user 3" not in str(texts(ax)), "ids are personal data"
    assert "99 % of the variance" in ax.get_xlabel()
    spread = rows.filter(community="a", attribute="warmth")["mean"].std()
    bars = ax.containers[0].lines[2][0].get_segments()[0]
    assert bars[1][0] - bars[0][0] == pytest.approx(2 * 1.96 * spread / np.sqrt(6), rel=0.1)


def worst_rows():
    rows = metric_rows(["better for all", "better for few", "neither"])
    lows = {"better for all": 0.4, "better for few": 0.5, "neither": 0.3}
    values = {"better for all": 0.8, "better for few": 0.7, "neither": 0.6}
    at = pl.col("model")
    rows = rows.with_columns(value=at.replace_strict(values)).with_columns(ci_low=pl.col("value") - 0.02,
                                                                          ci_high=pl.col("value") + 0.02)  # fmt: skip
    worst_ = rows.with_columns(
        value=at.replace_strict(lows), metric=pl.lit("worst_community_accuracy"), community=pl.lit("x"),
        ci_low=at.replace_strict(lows) - 0.1, ci_high=at.replace_strict(lows) + 0.1,
    )  # fmt: skip
    return pl.concat([rows, worst_])


def test_the_frontier_joins_the_models_that_none_beats():
    ax = plots.worst_group_frontier(worst_rows(), "unseen/testpair", "worst_community_accuracy")
    step = next(line for line in ax.get_lines() if line.get_drawstyle().startswith("steps"))
    assert step.get_xydata().tolist() == pytest.approx(np.array([[70, 50], [80, 40]]))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[2] == "neither (30 users, 900 judgements)"
    bars = [bar.get_segments()[0] for bar in ax.containers[0].lines[2]]
    assert np.allclose([bars[0][0][0], bars[0][1][0]], [78, 82])
    assert np.allclose([bars[1][0][1], bars[1][1][1]], [30, 50])
    assert worst.undominated(np.array([[1.0, 1.0], [1.0, 1.0]])).all()


def test_the_wrong_user_gap_is_in_points_around_zero():
    rows = metric_rows(["a"]).with_columns(metric=pl.lit("wrong_user_gain"), value=pl.lit(0.05), ci_low=pl.lit(-0.01))
    ax = plots.wrong_user_gap(rows)
    assert any(set(line.get_xdata()) == {0} for line in ax.get_lines())
    assert any(list(line.get_xdata()) == pytest.approx([5]) for line in ax.get_lines())
    assert "points" in ax.get_xlabel()


def test_training_curves_show_every_training_and_their_mean():
    rows = [
        {"seed": s, "training": t, "epoch": e, "loss": 1.0 / e + t} for s in (0, 1) for t in (1, 2) for e in (1, 2, 3)
    ]
    rows.append({"seed": 1, "training": 2, "epoch": 4, "loss": 0.0})
    ax = plots.training_curves(pl.DataFrame(rows))
    means = [line for line in ax.get_lines() if line.get_label().startswith("seed")]
    assert [line.get_label() for line in means] == [f"seed {seed}: mean of 2 trainings" for seed in (0, 1)]
    assert means[1].get_ydata() == pytest.approx([2.5, 2.0, 1.5 + 1 / 3]), "only epochs that both reach"
    assert len(ax.get_lines()) == 6
    band = ax.collections[0].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(2.5 + 1.96 * np.std([2, 3], ddof=1) / np.sqrt(2), abs=1e-3)


def test_profile_plots_draw_on_the_axes_they_are_given():
    one, two, three, four = Figure().subplots(1, 4)
    polar = Figure().add_subplot(projection="polar")
    assert plots.heat_map(weights(FOUR), ax=one) is one
    assert plots.profile_dots(weights(FOUR), ax=two) is two
    assert plots.user_map(user_rows(), ax=three) is three
    assert plots.radar(weights(FOUR), ax=polar) is polar
    with pytest.raises(ValueError, match="polar"):
        plots.radar(weights(FOUR), ax=four)


def test_profiles_that_cannot_be_drawn_are_explained():
    twice = pl.concat([weights(FOUR), weights(FOUR, seed=1)])
    many = {f"c{number}": (0, 1, 2, 3) for number in range(7)}
    for call, message in (
        (lambda: plots.heat_map(twice), "over_seeds"),
        (lambda: plots.heat_map(weights(FOUR), "shapley"), "the table has preference"),
        (lambda: plots.heat_map(weights({"a": (0, 1, 2, 3)})), "no rows of the population"),
        (lambda: plots.heat_map(weights({"": (0, 1, 2, 3)})), "no communities"),
        (lambda: plots.heat_map(weights(FOUR), against="x"), '"population" or "communities"'),
        (lambda: plots.profile_dots(weights(many | {"": (0, 0, 0, 0)})), "up to six"),
        (lambda: plots.profile_dots(weights(FOUR), communities=["z"]), "no community 'z'"),
        (lambda: plots.radar(weights(FOUR), attributes=["wit"]), "3 to 12 attributes"),
        (lambda: plots.user_profile(weights(FOUR), "ana"), "the table has 0 users"),
        (lambda: plots.user_profile(user_rows(), "user 1"), "add the run's attribute_weights"),
        (lambda: plots.profile_by_shots(user_rows()), "column shots"),
        (lambda: plots.user_map(weights(FOUR)), "needs three"),
        (
            lambda: plots.worst_group_frontier(worst_rows(), "x", "worst_community_accuracy"),
            "cells are unseen/testpair",
        ),
        (lambda: plots.worst_group_frontier(worst_rows(), "x", "ece"), "group='ece'"),
        (lambda: plots.training_curves(pl.DataFrame({"loss": [1.0]})), "no column epoch"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    plots.heat_map(over_seeds(twice))


def test_names_from_the_data_are_text_whatever_they_hold():
    strange = {"": (0, 0, 0, 0), "$x$ & <b>": (1, -1, 1, 0), "_hidden": (-1, 1, 0, 1), "long " * 30: (1, 1, 1, 1)}
    rows = weights(strange).with_columns(attribute=pl.col("attribute").replace("wit", r"$\frac{$ {"))
    axes_ = [plots.heat_map(rows), plots.profile_dots(rows), plots.radar(rows)]
    for ax in axes_:
        ax.figure.canvas.draw()
    names = [text.get_text() for text in axes_[1].get_legend().get_texts()]
    assert names[0] == r"\$x\$ & <b> (n = 101)"
    assert names[1] == " _hidden (n = 102)"
    assert len(names[2]) < 55
    frontier = worst_rows().with_columns(model=pl.lit("$") + pl.col("model"))
    plots.worst_group_frontier(frontier, "unseen/testpair", "worst_community_accuracy").figure.canvas.draw()
    plots.cells(metric_rows(["$a$_", "_b"])).figure.canvas.draw()
    plots.shot_curve(metric_rows(["$a_$", "_b"], shots=(0, 2))).figure.canvas.draw()
