"""Predictions for people who are read from the prompt of a language model: the shots are the posterior.

A `Policy` is a trained model beside its reference (`fspo` makes one). It predicts in the schema of `evaluate`, writes
descriptions of users, and answers as a user would like best: the best of n by its own reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.baselines import prediction_rows
from pluralprefs.encoders.generate import LanguageModel, generate
from pluralprefs.encoders.in_context import LogProbability, Prompter, Shot, both, encode_pairs, padded
from pluralprefs.encoders.tokens import Content, Rendered
from pluralprefs.evaluate import UNSEEN
from pluralprefs.fitting import take
from pluralprefs.models.implicit import ImplicitReward
from pluralprefs.types import Comparisons, Item, Key, Tokens
from pluralprefs.windows import Asked, Corpus, tokens_of, unknown

Describe = Callable[[Sequence[Sequence[Shot]]], list[str]]  # the shots of users -> a description each


@dataclass(frozen=True)
class Policy:
    """A trained model with its reference.

    `temperatures` are inverse ones by number of shots, in order, linear between them: a model that is sure of what many
    shots say may be as sure, and wrong, of what it says without any.
    """

    log_probability: LogProbability
    params: Any
    reference: Any
    prompter: Prompter
    family: ImplicitReward
    temperatures: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def log_odds(self, asked: Sequence[Asked], *, batch_size: int = 16) -> Float[np.ndarray, " rows"]:
        """Log-odds that the user of each question prefers the first response."""
        found = []
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            rows = tokens_of(self.prompter, part, unknown(len(part)), batch_size)
            found.append(self.scores(rows)[: len(part)])
        counts, factors = (np.array(part, float) for part in zip(*self.temperatures, strict=True))
        factor = np.interp([len(each.shots) for each in asked], counts, factors)
        return np.concatenate([*found, np.zeros(0)]) * factor

    def scores(self, rows: Comparisons[Tokens]) -> Float[np.ndarray, " rows"]:
        """Scores of rows as tokens, beta h: log-odds but for the temperature."""
        encoded = encoded_pairs(self.log_probability, self.params, self.reference, rows)
        log_odds = jax.vmap(partial(self.family.log_odds, ()))(encoded.first, encoded.second)
        return np.asarray(log_odds, float)


def predictions(
    policy: Policy,
    corpus: Corpus,
    draws: pl.DataFrame,
    *,
    model: str,
    seed: int = 0,
    shots: Sequence[int] = (0, 2, 4, 8),
    controls: bool = True,
    describe: Describe | None = None,
    batch_size: int = 64,
) -> pl.DataFrame:
    """Predict the cells of unseen users: rows as of `evaluate.evaluate`, with its controls at the most shots.

    `draws` lists the shots (`data.support`); position 0 is the oldest. With `describe` every user is described first,
    from the same shots. There is no uncertainty but the probability's own: `log_odds_std` is null.
    """
    place = {name: at for at, name in enumerate(corpus.table["example_id"])}
    parts = [
        _cell(policy, corpus, draws.filter(pl.col("cell") == cell), place, cell, count, control, describe, batch_size)
        .with_columns(model=pl.lit(model), seed=pl.lit(seed, pl.Int64))
        for cell in UNSEEN
        for count, control in [*((count, None) for count in shots),
                               *((max(shots), name) for name in ("wrong_user", "label_flip") if controls)]
        if cell in corpus.table["cell"]
    ]  # fmt: skip
    return pl.concat(parts) if parts else prediction_rows(corpus.table.head(0), np.zeros(0), model, seed=seed)


def _cell(
    policy: Policy, corpus: Corpus, draws: pl.DataFrame, place: Mapping[str, int], cell: str, count: int,
    control: str | None, describe: Describe | None, batch_size: int,
) -> pl.DataFrame:  # fmt: skip
    index = np.flatnonzero((corpus.table["cell"] == cell).fill_null(False).to_numpy())
    names = corpus.table["user_id"].to_numpy()[index]
    users = sorted(set(names))
    shown_by = dict(zip(users, users[1:] + users[:1], strict=True)) if control == "wrong_user" else {}
    shown = draws.filter(pl.col("position") < count).sort("position")
    given = {key: part["example_id"].to_list() for key, part in shown.group_by("user_id", "draw", maintain_order=True)}
    asked, number = [], range(1 if not count else 1 + int(draws["draw"].max() or 0))  # type: ignore[arg-type]
    for draw in number:
        units = {}
        for user in users:
            rows = np.array([place[name] for name in given.get((shown_by.get(user, user), draw), [])], int)
            units[user] = corpus.shots(take(corpus.rows, rows), flipped=control == "label_flip")
        told = describe(list(units.values())) if describe else [None] * len(units)
        said = dict(zip(units, told, strict=True))
        asked += [corpus.asked(take(corpus.rows, row), units[user], said[user])
                  for row, user in zip(index, names, strict=True)]  # fmt: skip
    log_odds = policy.log_odds(asked, batch_size=batch_size).reshape(len(number), -1)
    table = corpus.table[index]
    return pl.concat([
        prediction_rows(table, values, "", shots=count, draw=draw, control=control)
        for draw, values in zip(number, log_odds, strict=True)
    ])  # fmt: skip


def writer(
    decoder: LanguageModel, prompter: Prompter, *, new: int = 64, temperature: float = 0.0, key: Key | None = None
) -> Describe:
    """Make a function from the shots of users to the descriptions that a decoder writes of them.

    `new` is the most tokens of a description; they must fit beside the shots.
    """
    room = replace(prompter, renderer=replace(prompter.renderer, max_length=prompter.renderer.max_length - new))

    def describe(shots: Sequence[Sequence[Shot]]) -> list[str]:
        return _written(decoder, room, [room.description(each) for each in shots], new, temperature, key)

    return describe


def best_answers(
    policy: Policy, decoder: LanguageModel, shots: Sequence[Shot], question: Content, *, count: int, new: int = 256,
    temperature: float = 1.0, key: Key,
) -> list[tuple[str, float]]:  # fmt: skip
    """Draw `count` answers of a decoder to one question and order them by the policy's reward, the best first.

    Rewards are log-odds against the mean of the answers drawn. `decoder` is the policy's own as a rule.
    """
    prompter = policy.prompter
    room = replace(prompter, renderer=replace(prompter.renderer, max_length=prompter.renderer.max_length - new))
    [prompt] = room.responses(shots, question, ())
    texts = _written(decoder, room, [prompt] * count, new, temperature, key)
    against = policy.log_odds([Asked(shots, question, text, texts[0]) for text in texts])
    order = np.argsort(-against, kind="stable")
    return [(texts[at], float(against[at] - against.mean())) for at in order]


def _written(
    decoder: LanguageModel, prompter: Prompter, prompts: list[Rendered], new: int, temperature: float, key: Key | None
) -> list[str]:
    tokenizer = prompter.renderer.tokenizer
    tokens = padded(prompts, max_length=prompter.renderer.max_length)
    found = generate(decoder, tokens, new=new, temperature=temperature, end=(tokenizer.eos_token_id,), key=key)
    ids, mask = np.asarray(found.ids), np.asarray(found.mask)
    return [tokenizer.decode(row[known], skip_special_tokens=True).strip()
            for row, known in zip(ids, mask, strict=True)]  # fmt: skip


@partial(jax.jit, static_argnums=0)
def encoded_pairs(
    log_probability: LogProbability, params: Any, reference: Any, rows: Comparisons[Tokens]
) -> Comparisons[Item]:
    """Items of both sides, with the reference computed beside the policy."""
    known = log_probability(reference, both(rows)).reshape(2, -1)
    return encode_pairs(log_probability, params, rows, known)
