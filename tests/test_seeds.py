"""Exponents of users' likelihoods that are chosen by held-out prompts."""

from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest

from pluralprefs import encoders
from pluralprefs.data.sources.layout import complete
from pluralprefs.experiment import Experiment, prepare
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.low_rank import LowRank
from pluralprefs.pooling import prompt_parts
from pluralprefs.seeds import fit_seed
from pluralprefs.users import Pooled

OFFERS = (1.0, 0.03)


def orderings(*, moods: bool, prompts: int = 3, users: int = 16, pairs: int = 12) -> pl.DataFrame:
    """Users who answer by a taste for two columns: one of their own or (`moods`) another one for each prompt."""
    draw = np.random.default_rng(0)
    taste = 4 * draw.normal(size=(users, 1, 2)) * np.ones((1, prompts, 1))
    taste = 4 * draw.normal(size=(users, prompts, 2)) if moods else taste
    lines = []
    for user in range(users):
        for prompt in range(prompts):
            x = draw.normal(size=(pairs, 2, 2))
            told = (taste[user, prompt] * (x[:, 0] - x[:, 1])).sum(1) > 0
            lines += [
                {"user_id": f"u{user}", "prompt_id": f"p{prompt}", "target": float(t), "cell": cell,
                 "first_id": f"{user}.{prompt}.{i}.a", "second_id": f"{user}.{prompt}.{i}.b",
                 **{f"attr:{name}:{side}": x[i, k, j] for j, name in enumerate("ab")
                    for k, side in enumerate(("first", "second"))}}
                for i, (t, cell) in enumerate(zip(told, ["validation"] * 3 + ["train"] * (pairs - 3), strict=True))
            ]  # fmt: skip
    table = pl.DataFrame(lines)
    text = {side: pl.col(f"{side}_id") for side in ("first", "second")}
    table = table.with_columns(**text, prompt=pl.col("prompt_id"), fold=pl.col("cell"))
    return complete(table, "orderings")


def fitted(table, model=BradleyTerry.init, **pooled):
    asked = Experiment(
        data=lambda: table, model=model, encoder=partial(encoders.load, "attributes"), epochs=3, controls=False,
        users=Pooled(gain=False, cross_fit=None, rounds=2, temper=OFFERS, **pooled),
    )  # fmt: skip
    return fit_seed(asked, prepare(asked, progress=False), 0)


@pytest.mark.parametrize("model", [BradleyTerry.init, partial(LowRank.init, rank=2)], ids=["newton", "gradient"])
def test_tastes_that_do_not_outlast_a_prompt_are_not_trusted_for_another(model):
    """Validation rows are of prompts that the user has answered, and say the opposite."""
    moods = orderings(moods=True)
    by_prompts = fitted(moods, model, temper_by="prompt")
    assert by_prompts.notes["temper"] == 0.03
    np.testing.assert_allclose(by_prompts.rows.weight, 0.03, rtol=1e-6)
    tried = by_prompts.notes["temper_prompts_nll"]
    assert tried["0.03"] < tried["1.0"]
    if model is BradleyTerry.init:
        by_rows = fitted(moods, model)
        assert by_rows.notes["temper"] == 1.0
        assert "temper_prompts_nll" not in by_rows.notes


def test_tastes_that_last_are_trusted_for_new_prompts():
    assert fitted(orderings(moods=False), temper_by="prompt").notes["temper"] == 1.0


def test_what_is_asked_about_was_not_fitted(monkeypatch):
    """Each part of the prompts is predicted by users and shared parameters of the others."""
    from pluralprefs import seeds

    table, seen = orderings(moods=False), []
    original = seeds.fit_pooled

    def watched(base, items, rows, pooled, **options):
        seen.append((set(rows.first), options["validation"]))
        return original(base, items, rows, pooled, **options)

    monkeypatch.setattr(seeds, "fit_pooled", watched)
    fitted(table, temper_by="prompt")
    asked = [set(rows.first) for _, rows in seen[:3]]
    assert not set.intersection(*asked)
    assert set.union(*asked) == set.union(*(own for own, _ in seen[:3]))
    assert all(not own & other for (own, _), other in zip(seen, asked, strict=False))


def test_one_prompt_cannot_be_held_out_and_says_so():
    with pytest.raises(ValueError, match=r"temper_by 'prompt': training rows have one prompt alone"):
        fitted(orderings(moods=False, prompts=1), temper_by="prompt")
    with pytest.raises(ValueError, match=r"temper_by is 'validation' or 'prompt', not 'user'"):
        Pooled(temper_by="user")


def test_the_population_of_the_held_out_prompts_is_weighed_as_the_one_that_serves():
    """The first exponent on offer was taken, whatever validation rows chose."""
    table = orderings(moods=False)
    tried = [
        fitted(table, temper_by="prompt", population_temper=order).notes["temper_prompts_nll"]
        for order in ((1.0, 0.05), (0.05, 1.0))
    ]
    assert tried[0] == pytest.approx(tried[1], rel=1e-6)


def test_prompts_of_no_weight_are_not_held_out():
    table = orderings(moods=True)
    silent = table.with_columns(weight=pl.when(pl.col("prompt_id") == "p2").then(0.0).otherwise(1.0))
    found = fitted(silent, temper_by="prompt").notes
    assert found["temper"] == 0.03
    assert np.isfinite(list(found["temper_prompts_nll"].values())).all()
    one = table.with_columns(weight=pl.when(pl.col("prompt_id") == "p0").then(1.0).otherwise(0.0))
    with pytest.raises(ValueError, match="one prompt alone"):
        fitted(one, temper_by="prompt")


def test_without_validation_rows_or_a_second_fit_prompts_choose_too():
    moods = orderings(moods=True)
    bare = moods.with_columns(cell=pl.lit("train"), fold=pl.lit("train"))
    assert fitted(bare, temper_by="prompt").notes["temper"] == 0.03
    asked = Experiment(
        data=lambda: moods, model=BradleyTerry.init, encoder=partial(encoders.load, "attributes"), refit=False,
        users=Pooled(gain=False, cross_fit=None, rounds=2, temper=OFFERS, temper_by="prompt"),
    )  # fmt: skip
    once = fit_seed(asked, prepare(asked, progress=False), 0)
    assert once.notes["temper"] == 0.03
    assert len(once.rows.target) == (moods["cell"] == "train").sum()
    alone = fit_seed(replace(asked, users=replace(asked.users, temper=(1.0,))), prepare(asked, progress=False), 0)
    assert "temper_prompts_nll" not in alone.notes


def test_parts_hold_whole_prompts_and_none_is_empty():
    prompts = [f"p{i % 7}" for i in range(70)]
    parts = prompt_parts(prompts, 5)
    np.testing.assert_array_equal(np.sum(parts, axis=0), 1)
    assert all(part.any() for part in parts)
    for name in set(prompts):
        assert sum(part[np.array(prompts) == name].any() for part in parts) == 1
    assert len(prompt_parts(["a", "b"], 5)) == 2
