"""Train a language model to read a user from the shots in its prompt, and predict people whom it has never met.

Few-shot preference optimisation (FSPO, arXiv 2502.19312). An example is a window: some judgements of one user in the
prompt, a question, and two responses to it of which that user preferred one. Two stages:

    supervised   raise log pi(preferred | shots, question); the other response is not read at all
    preference   the likelihood (`IPO`, or `Logistic` for DPO) of beta h, against the model of the first stage, whose
                 log-probabilities of every window are computed once, before

The number of shots of a window is drawn anew, from none to `Drawn.shots`, and no pair is both shown and asked
(`data.episodes`). With descriptions of the users there is a further term, -log pi(description | shots) per token, and
the responses are read behind the description too: shots -> description -> response. Nothing is fitted for a new user:
the shots are the posterior. Updates of a learning rate of 1e-6 vanish in bfloat16: parameters must be float32.

What trains is a function log_probability(params, tokens) and its parameters, whatever those are (all weights of a
decoder, or what a caller makes of adapters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pluralprefs.data.episodes import episode_indices
from pluralprefs.encoders.in_context import LogProbability, completions, encode_pairs, reference_log_probabilities
from pluralprefs.fitting import Rows, take
from pluralprefs.judging import held_out
from pluralprefs.likelihoods import IPO, Logistic, pooled_mean
from pluralprefs.models.implicit import ImplicitReward
from pluralprefs.prompted import Policy
from pluralprefs.train import LossFn, Metrics, comparison_loss, init_state, make_train_step, train
from pluralprefs.training import inverse_temperature
from pluralprefs.types import Key, Params, Reduction, Tokens
from pluralprefs.windows import Corpus, Drawn, Windows

Report = Callable[[str, int, Mapping[str, float]], None]  # stage, steps done, metrics
CALIBRATION = 4  # passes over the users held out for the temperatures
PRIOR = 20  # judgements that the temperature of all numbers of shots is worth for each
KNOTS = (0, 1, 2, 4, 8, 16)  # numbers of shots that have a temperature of their own, beside the most


@dataclass(frozen=True)
class Stage:
    """An optimiser and the windows that it is given."""

    optimizer: optax.GradientTransformation
    drawn: Drawn


def supervised_loss(log_probability: LogProbability, *, description: float = 1.0) -> LossFn:
    """Make the loss of the first stage: mean -log pi per token of the preferred responses, shots given.

    Rows without a preferred response (ties) do not count. `description` weighs the same of descriptions.
    """

    def loss_fn(params: Params, batch: Windows, key: Key) -> tuple[Float[Array, ""], Metrics]:
        rows, backbone = batch.rows, params.model["backbone"]
        first = jnp.asarray(rows.target) > 0.5

        def chosen(one: Array, other: Array) -> Array:
            return jnp.where(first.reshape(-1, *[1] * (jnp.ndim(one) - 1)), one, other)

        tokens = jax.tree.map(chosen, rows.first, rows.second)
        decided = rows.weight * (rows.target != 0.5) * ~jnp.asarray(rows.tie)
        metrics = {"nats": _token_nats(log_probability(backbone, tokens), tokens, decided)}
        return _with_description(metrics, log_probability, backbone, batch, description)

    return loss_fn


def preference_loss(
    log_probability: LogProbability, *, reduction: Reduction = pooled_mean, description: float = 1.0
) -> LossFn:
    """Make the loss of the second stage: the likelihood of beta h, h from `Windows.reference`; see `supervised_loss`.

    Raises ValueError for windows without a reference.
    """
    head = comparison_loss(lambda users, community, user: (), reduction=reduction)

    def loss_fn(params: Params, batch: Windows, key: Key) -> tuple[Float[Array, ""], Metrics]:
        if batch.reference is None:
            raise ValueError("these windows have no reference log-probabilities: compute them before the stage")
        backbone, family = params.model["backbone"], params.model["family"]
        encoded = encode_pairs(log_probability, backbone, batch.rows, batch.reference)
        _, metrics = head(params.replace(model=family), encoded, key)
        return _with_description(metrics, log_probability, backbone, batch, description)

    return loss_fn


def _token_nats(log_probability: Array, tokens: Tokens, weight: Array) -> Float[Array, ""]:
    """Mean nats of a completion token, rows weighted."""
    count = jnp.sum(weight * jnp.sum(completions(tokens), axis=1))
    return -jnp.sum(weight * log_probability) / jnp.maximum(count, 1.0)


def _with_description(
    metrics: Metrics, log_probability: LogProbability, backbone: Any, batch: Windows, weight: float
) -> tuple[Float[Array, ""], Metrics]:
    told = batch.description
    if told is not None:
        rows = jnp.ones(len(told.ids))  # rows of padding have no token
        metrics = metrics | {"description": weight * _token_nats(log_probability(backbone, told), told, rows)}
    return sum(metrics.values(), start=jnp.zeros(())), metrics


def fit_fspo(
    log_probability: LogProbability,
    params: Any,
    corpus: Corpus,
    *,
    supervised: Stage,
    preference: Stage,
    family: ImplicitReward,
    likelihood: Any,
    reduction: Reduction = pooled_mean,
    description: float = 1.0,
    seed: int = 0,
    report: Report | None = None,
    references: Path | None = None,
) -> Policy:
    """Train both stages on the corpus's training users, and learn temperatures where the likelihood needs them.

    IPO's scores are not log-odds: a fifth of the training users is held out of both stages, and the temperature at each
    number of shots is what serves their judgements best. `references` is a folder in which the log-probabilities of the
    first stage are kept: trained again from the start it is the same model, and they are read. Raises ValueError for
    parameters that are not float32, for a likelihood of another beta, and where there are too few users to hold any
    out.
    """
    require_masters(params)
    if isinstance(likelihood, IPO) and likelihood.beta != family.beta:
        raise ValueError(f"IPO has beta {likelihood.beta}, the family {family.beta}: give both the same")
    rows = corpus.training()
    held = rows_of(rows, np.zeros(0, int))
    if not isinstance(likelihood, Logistic):
        aside = held_out(np.unique(rows.user))
        if not len(aside):
            raise ValueError("too few training users to learn a temperature from: use likelihoods.Logistic, or more")
        held, rows = rows_of(rows, aside), rows_of(rows, np.setdiff1d(rows.user, aside))
    learned = partial(_train, report=report, seed=seed)
    start = Params({"backbone": params, "family": family}, (), likelihood)
    first = learned("supervised", supervised_loss(log_probability, description=description), start, supervised,
                    corpus.stream(rows, seed, supervised.drawn))  # fmt: skip
    known = corpus.stream(rows, seed + 1, preference.drawn)  # drawn twice: only the references are kept
    reference = reference_log_probabilities(
        log_probability, first.model["backbone"], (each.rows for each in known), folder=references
    )
    second = learned(
        "preference", preference_loss(log_probability, reduction=reduction, description=description), first, preference,
        (batch.replace(reference=found)
         for batch, found in zip(corpus.stream(rows, seed + 1, preference.drawn), reference, strict=True)),
    )  # fmt: skip
    policy = Policy(log_probability, second.model["backbone"], first.model["backbone"], corpus.prompter, family)
    return policy if isinstance(likelihood, Logistic) else _tempered(policy, corpus, held, preference.drawn, seed + 2)


def rows_of(rows: Rows, users: np.ndarray) -> Rows:
    """The rows of some users."""
    return take(rows, np.flatnonzero(np.isin(np.asarray(rows.user), users)))


def require_masters(params: Any) -> None:
    """Raise ValueError, naming the first, for parameters that are narrower than float32."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} is {leaf.dtype}: small updates would round to zero; keep "
                "float32 parameters and give the decoder dtype=bfloat16 for its products"
            )


def _train(
    name: str, loss: LossFn, start: Params, stage: Stage, batches: Iterable[Windows], *, report: Report | None,
    seed: int,
) -> Params:  # fmt: skip
    # A copy: what a step is given is overwritten, and the stage before it is the reference.
    state = init_state(jax.tree.map(jnp.copy, start), stage.optimizer, jax.random.key(seed))
    step = jax.jit(make_train_step(loss, stage.optimizer), donate_argnums=0)
    last = state
    for done, last, metrics in train(state, batches, step):  # noqa: B007
        if report is not None:
            report(name, done, {key: float(value) for key, value in metrics.items()})
    return last.params


def _tempered(policy: Policy, corpus: Corpus, held: Rows, drawn: Drawn, seed: int) -> Policy:
    """The policy with the inverse temperatures that serve users held out best, learned apart by number of shots."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by the shots that are really shown
    for count in [*(n for n in KNOTS if n < drawn.shots), drawn.shots]:
        asked, targets = [], []
        for draw in range(CALIBRATION):
            order = np.random.default_rng([seed, count, draw])
            for shown, wanted in zip(*episode_indices(order, held, count, drawn.queries, exactly=True), strict=True):
                shots, rows = corpus.shots(take(held, shown[shown >= 0])), wanted[wanted >= 0]
                # Without descriptions, as strangers have none: with them the model would seem surer than it is.
                asked += [corpus.asked(take(held, row), shots) for row in rows]
                targets += [float(held.target[row]) for row in rows]
        if asked:
            shown = round(float(np.mean([len(each.shots) for each in asked])))
            found[shown] = policy.log_odds(asked, batch_size=drawn.batch_size), np.array(targets)
    every = [np.concatenate(part) for part in zip(*found.values(), strict=True)]
    pooled = np.log(inverse_temperature(*every))
    shares = {count: len(targets) / (len(targets) + PRIOR) for count, (_, targets) in found.items()}
    factors = {count: np.exp(shares[count] * np.log(inverse_temperature(*found[count])) + (1 - shares[count]) * pooled)
               for count in sorted(found)}  # fmt: skip
    return replace(policy, temperatures=tuple((count, float(factor)) for count, factor in factors.items()))
