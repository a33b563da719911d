"""Fit one seed of an experiment: which rows teach what, what is chosen on which, and how often it is fitted.

A fit without the validation rows makes the choices (epochs, exponents, a temperature, the residual variance); with
`Experiment.refit` a second one has all rows and those choices. Populations come from Newton (families that are linear
in the user) or from gradient training (the others); `pooling.fit_pooled` puts communities and users on top of them.
Families that infer their users go through `inferring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pluralprefs.experiment import FINAL, TRAINING, Experiment, Prepared, new_model
from pluralprefs.fitting import Fitted, Rows, take
from pluralprefs.inferring import fit_inferred
from pluralprefs.likelihoods import Logistic
from pluralprefs.models.residual import Residual
from pluralprefs.peers import check_peers, with_peers
from pluralprefs.pooling import fit_pooled, half_fits, prompt_parts, shared_variance, tempered, tempered_population
from pluralprefs.profiles import preference_variance
from pluralprefs.training import Report, Together, gradient_bases, temperature_scale
from pluralprefs.types import LinearInUser
from pluralprefs.users import Pooled, Users

STEPS = 256  # of an epoch, at most


def fit_seed(
    experiment: Experiment, prepared: Prepared, seed: int, *, checkpoints: Path | None = None,
    report: Report | None = None, together: Together | None = None,
) -> Fitted:  # fmt: skip
    """Fit one seed on training and (with `refit`) validation rows.

    What is chosen on validation rows (a temperature, a tempering exponent, the residual variance) is chosen by a fit
    without them first. Gradient training calls `report` after each epoch and continues from the folder `checkpoints`,
    which must hold nothing but this seed's. `together` has the seeds that are trained with it, in place of both.
    Raises ValueError where `users.temper_by` asks for prompts and training rows have one alone.
    """
    together = together or Together({seed: report}, checkpoints)
    cell = prepared.table["cell"].to_numpy()
    train = take(prepared.rows, np.flatnonzero(np.isin(cell, TRAINING)))
    validation = take(prepared.rows, np.flatnonzero(cell == "validation"))
    taught = np.flatnonzero(np.isin(cell, FINAL if experiment.refit else TRAINING))
    everything, pooled = take(prepared.rows, taught), experiment.users
    model = new_model(experiment, prepared, seed)
    if pooled.peers:
        check_peers(model, pooled)
    if isinstance(model, Residual):
        return _fit_inferred(experiment, prepared, model, train, validation, everything, seed, checkpoints,
                             report or together.reports[seed])  # fmt: skip
    fit = partial(_fit, experiment, prepared, seed=seed, together=together)
    by_gradient = not isinstance(model, LinearInUser) or bool(jax.tree.leaves(model))
    notes: dict[str, Any] = {}
    if pooled.temper_by == "prompt" and len(pooled.temper) > 1:
        asked = pooled
        if (by_gradient or len(pooled.population_temper) > 1) and len(validation.target):
            # The first stage says how many epochs the others take, and how the population is weighed.
            first = fit(train, validation, replace(pooled, levels=(), cross_fit=None))
            asked = replace(pooled, population_temper=(first.notes["population_temper"],))
        prompts = prepared.table["prompt_id"][taught].to_list()
        exponent, notes = _temper_by_prompt(fit, everything, prompts, asked)
        pooled = replace(pooled, temper=(exponent,))
    if not len(validation.target):
        return _noted(fit(train, None, pooled), notes)
    if not experiment.refit:
        return _noted(fit(train, validation, pooled), notes)
    offers = max(len(pooled.temper), len(pooled.population_temper))
    if not (offers > 1 or pooled.residual is True or by_gradient or not isinstance(experiment.likelihood, Logistic)):
        return _noted(fit(everything, None, pooled), notes)
    about_users = len(pooled.temper) > 1 or pooled.residual is True
    asked = pooled if about_users else replace(pooled, levels=(), cross_fit=None)  # no folds where none are needed
    chosen = fit(train, validation, asked)
    exponents = {
        name: (chosen.notes[name],) if name in chosen.notes else getattr(pooled, name)  # the only one on offer
        for name in ("temper", "population_temper")
    }
    settled = replace(
        pooled,
        **exponents,
        residual=chosen.notes["residual"] if pooled.residual is True else pooled.residual,
    )
    scale = chosen.notes.get("inverse_temperature")
    fitted = fit(everything, None, settled, scale=scale, stage="refit")
    kept = {k: v for k, v in chosen.notes.items() if k.endswith("validation_nll") or k == "residual"}
    return _noted(fitted, kept | notes)


def _noted(fitted: Fitted, notes: dict[str, Any]) -> Fitted:
    return replace(fitted, notes=fitted.notes | notes)


def _temper_by_prompt(
    fit: Callable[..., Fitted], rows: Rows, prompts: Sequence[str], pooled: Pooled
) -> tuple[float, dict[str, Any]]:
    """The exponent with which users who answered some prompts lose the fewest nats on the others, and what all lose.

    Each part of the prompts is predicted by a fit that has not seen a comparison of it: shared parameters, population,
    strengths and users alike.
    """
    nats, weight = dict.fromkeys(pooled.temper, 0.0), np.asarray(rows.weight, float)
    parts = [part for part in prompt_parts(prompts, pooled.folds) if weight[part].any()]
    if len(parts) < 2:
        raise ValueError("users.temper_by 'prompt': training rows have one prompt alone, so that none can be held out; "
                         "give 'validation', or one exponent in users.temper")  # fmt: skip
    for number, part in enumerate(parts):
        found = fit(take(rows, np.flatnonzero(~part)), None, pooled, asked=take(rows, np.flatnonzero(part)),
                    stage=f"prompts-{number}")  # fmt: skip
        for exponent in pooled.temper:
            nats[exponent] += found.notes["temper_validation_nll"][str(exponent)] * weight[part].sum() / weight.sum()
    tried = {str(exponent): value for exponent, value in nats.items()}
    return min(nats, key=nats.__getitem__), {"temper_prompts_nll": tried}


def _fit(
    experiment: Experiment, prepared: Prepared, rows: Rows, validation: Rows | None, pooled: Pooled, *,
    seed: int, together: Together, scale: float | None = None, stage: str = "fit", asked: Rows | None = None,
) -> Fitted:  # fmt: skip
    """Fit to `rows`. `validation` chooses epochs, exponents, the scale and the residual; `asked` what is of users."""
    new = partial(new_model, experiment, prepared)
    model = new(seed)
    users, communities = len(prepared.vocabulary.users), len(prepared.vocabulary.communities)
    linear, joint = isinstance(model, LinearInUser), 0
    trained = not linear or bool(jax.tree.leaves(model))
    if not trained:
        base, notes = tempered_population(model, prepared.features, rows, pooled, validation)
    else:
        if len(pooled.population_temper) != 1:
            raise ValueError(f"users.population_temper {pooled.population_temper}: {type(model).__name__} is trained "
                             "by gradient, with one exponent of the population's likelihood: give the one")  # fmt: skip
        [exponent] = pooled.population_temper
        joint = users if not linear and "user" in experiment.users.levels else 0  # trained beside the model
        train = partial(
            gradient_bases, [new(one) for one in together.seeds], prepared.features, tempered(rows, exponent), pooled,
            users=joint, likelihood=experiment.likelihood, reduction=experiment.reduction,
            optimizer=experiment.optimizer(), batch_size=_batch_size(experiment.batch_size, len(rows.target)),
            validation=validation, transform=experiment.transform,
        )  # fmt: skip
        base, notes = together.base(seed, stage, experiment.epochs, train)
        notes |= {"population_temper": exponent}
    # A population that was trained beside users is one user's, and communities are fitted to what all say together.
    sharp = joint > 0 and communities > 0 and "community" in experiment.users.levels
    if sharp or not isinstance(experiment.likelihood, Logistic):
        if scale is None:
            held = rows if validation is None else validation
            scale = float(temperature_scale(*base(None), prepared.features, held))
        base, notes = _scaled(base, scale), notes | {"inverse_temperature": scale}
    fitted = fit_pooled(
        base, prepared.features, rows, pooled, users=users, communities=communities,
        validation=validation if asked is None else asked, notes=notes,
    )  # fmt: skip
    final = asked is None and (validation is None or not experiment.refit)
    if trained and final and pooled.levels and experiment.users.residual is not True:
        halves = half_fits(base, fitted)
        variance = shared_variance(halves, prepared.features)
        if halves and hasattr(model, "attribute_weights"):
            fitted.notes["preference_variance"] = preference_variance(halves, prepared.features, communities)
        residual = fitted.users.residual + jnp.float32(variance)
        fitted = replace(fitted, users=fitted.users.replace(residual=residual))
        fitted.notes["shared_variance"] = variance
    return with_peers(fitted, prepared.features, pooled.peers) if final and pooled.peers else fitted


def _fit_inferred(
    experiment: Experiment, prepared: Prepared, model: Residual, train: Rows, validation: Rows, rows: Rows, seed: int,
    checkpoints: Path | None, report: Report | None,
) -> Fitted:  # fmt: skip
    """Fit a family that infers its users to `rows`: users held out make its choices.

    Validation rows only choose the exponent of the population's likelihood, where several are offered.
    """
    if experiment.transform is not None:
        raise ValueError(f"{type(model.family).__name__} is trained on episodes, which transform does not change: set "
                         "transform to None")  # fmt: skip
    pooled, items = experiment.users, prepared.features
    if len(pooled.population_temper) > 1 and len(validation.target):
        _, chosen = tempered_population(model.population, items, train, pooled, validation)
        pooled = replace(pooled, population_temper=(chosen["population_temper"],))
    population, notes = tempered_population(model.population, items, rows, pooled, None)
    return fit_inferred(
        model, items, rows, pooled, population=population, users=len(prepared.vocabulary.users),
        communities=len(prepared.vocabulary.communities), likelihood=experiment.likelihood,
        reduction=experiment.reduction, optimizer=experiment.optimizer(), epochs=experiment.epochs,
        batch_size=_batch_size(experiment.batch_size, len(rows.target)), seed=seed, notes=notes, report=report,
        checkpoints=checkpoints,
    )  # fmt: skip


def _batch_size(asked: int, rows: int) -> int:
    """The asked rows a step, or as many as keep an epoch to `STEPS`; at most all."""
    return min(max(asked, -(-rows // STEPS)), rows)


def _scaled(base: Callable[..., tuple[Any, Users]], scale: float) -> Callable[..., tuple[Any, Users]]:
    def scaled(mask: np.ndarray | None) -> tuple[Any, Users]:
        model, users = base(mask)
        return model, users.replace(scale=jnp.float32(scale))

    return scaled
