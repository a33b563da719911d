"""Small corpora with known truth: communities whose members weigh the same attributes differently.

w = w_0 + d_community(row) + d_user over the attributes' levels, centred to [-1, 1]; an attribute that a text does not
express counts 0. Answers to a prompt are compared in pairs, with Bradley-Terry labels. The worlds also carry the truth,
so that the Bayes reference of `data.simulate` applies to text. `corpus` has six communities with a character, which are
easy to tell; `palette_world` has any number of them with weights drawn at random over all attributes, to measure how
well a profile finds them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.data.lexicon.express import attributes, base_answers, express
from pluralprefs.data.simulate.rows import Layout, draw_communities, in_order, random_rows, stream
from pluralprefs.data.simulate.states import Gaussian, Linear
from pluralprefs.data.simulate.worlds import World, assemble

NAMES = attributes("norm")  # the Schwartz values stay out, so that a seed goes on giving the corpus it always gave
# What everybody likes a little, and what marks a community: weights in log-odds from the middle level to a pole.
POPULATION = {"politeness": 0.6, "supportiveness": 0.6, "directness": 0.3, "verbosity": 0.2, "sarcasm": -0.3}
COMMUNITIES: dict[str, dict[str, float]] = {
    "comedy_corner": {"humor": 2.5, "sarcasm": 1.8, "formality": -1.2},
    "debate_hall": {"assertiveness": 2.4, "directness": 1.5, "sarcasm": 1.0, "empathy": -0.8},
    "engineers": {"directness": 2.0, "verbosity": -2.0, "humor": -0.8},
    "etiquette_circle": {"politeness": 2.2, "formality": 2.2, "assertiveness": -1.0},
    "listening_room": {"empathy": 2.6, "supportiveness": 1.6, "sarcasm": -1.6},
    "story_tellers": {"verbosity": 2.4, "humor": 1.0, "directness": -1.6},
}
STRENGTH = 1.5  # multiplies the weights above
USER_STD = 0.8
EXPRESSED = (2, 5)  # how many attributes a text expresses, at least and fewer than


def corpus(users: int = 60, communities: int = 6, comparisons_per_user: int = 60, seed: int = 0) -> pl.DataFrame:
    """Return the comparisons of `corpus_world`."""
    return corpus_world(users, communities, comparisons_per_user, seed).table


def corpus_world(
    users: int = 60,
    communities: int = 6,
    comparisons_per_user: int = 60,
    seed: int = 0,
    *,
    texts_per_prompt: int = 10,
    phrases: str = "corpus",
) -> World:
    """Return the corpus with its truth: `items` holds the centred levels of every text, columns as in `NAMES`.

    phrases: as in `express`; "corpus" are those that were there first, so that a seed goes on giving the same texts.
    truth: `population` [attributes], `community` [communities, attributes] and `user` [users, attributes] weights.
    """
    if not 1 <= communities <= len(COMMUNITIES):
        raise ValueError(f"communities={communities}: the corpus has 1 to {len(COMMUNITIES)}")
    texts, levels = _texts(NAMES, texts_per_prompt, phrases, seed)
    names = tuple(COMMUNITIES)[:communities]
    prompts = len(base_answers())
    layout = Layout(np.arange(len(texts)) // texts_per_prompt, np.zeros(prompts, bool), np.ones(users, bool))
    rows = random_rows(layout, comparisons_per_user, seed)
    population, community = _weights(POPULATION), np.stack([_weights(COMMUNITIES[name]) for name in names])
    size = levels.shape[1]
    world = assemble(
        "lexicon",
        layout,
        rows,
        levels,
        truth={
            "population": population,
            "community": community,
            "user": USER_STD * stream(seed, "users").standard_normal((users, size)),
        },
        log_odds=Linear(levels, population + community),
        prior=Gaussian(np.zeros(size), np.full(size, USER_STD)),
        community_ids=names,
        community=draw_communities(rows.user, users, communities, min(2, communities), seed),
        seed=seed,
    )
    return replace(world, table=_written(world, texts, NAMES))


def palette_world(
    communities: int = 20,
    users_per_community: int = 25,
    comparisons_per_user: int = 40,
    seed: int = 0,
    *,
    texts_per_prompt: int = 25,
    phrases: str = "heldout",
    spread: float = 1.5,
    users_spread: float = 0.2,
) -> World:
    """Return communities with weights drawn from N(0, spread^2) for each of all attributes; a user has one community.

    phrases: as in `express`; by default those that predictors are never trained on.
    truth: `community` [communities, attributes] and `user` [users, attributes] weights; there is no population.
    """
    known = attributes()
    texts, levels = _texts(known, texts_per_prompt, phrases, seed)
    users, names = communities * users_per_community, tuple(f"community-{number:02d}" for number in range(communities))
    prompts, size = len(base_answers()), len(known)
    layout = Layout(np.arange(len(texts)) // texts_per_prompt, np.zeros(prompts, bool), np.ones(users, bool))
    rows = random_rows(layout, comparisons_per_user, seed)
    community = spread * stream(seed, "shared").standard_normal((communities, size))
    user = users_spread * stream(seed, "users").standard_normal((users, size))
    world = assemble(
        "palette",
        layout,
        rows,
        levels,
        truth={"community": community, "user": user},
        log_odds=Linear(levels, community),
        prior=Gaussian(np.zeros(size), np.full(size, users_spread)),
        community_ids=names,
        community=rows.user % communities,
        seed=seed,
    )
    return replace(world, table=_written(world, texts, known))


def palette(**sizes: Any) -> pl.DataFrame:
    """Return the comparisons of `palette_world` without the true levels: texts are all that a model is given."""
    table = palette_world(**sizes).table
    return table.select(pl.exclude("^attr:.*$"))


def _weights(named: dict[str, float]) -> Float[np.ndarray, " attributes"]:
    return STRENGTH * np.array([named.get(name, 0.0) for name in NAMES])


def _texts(
    known: tuple[str, ...], texts_per_prompt: int, phrases: str, seed: int
) -> tuple[list[str], Float[np.ndarray, "texts attributes"]]:
    """Express every base answer in several ways; a text that exists already is drawn again."""
    rng, names = stream(seed, "items"), np.array(known)
    texts: dict[str, Float[np.ndarray, " attributes"]] = {}
    for index, base in enumerate(base_answers()):
        while len(texts) < (index + 1) * texts_per_prompt:
            chosen = rng.choice(len(names), rng.integers(*EXPRESSED), replace=False)
            levels = rng.integers(5, size=len(chosen))
            named = dict(zip(names[chosen].tolist(), levels.tolist(), strict=True))
            vector = np.zeros(len(names))
            vector[chosen] = (levels - 2) / 2
            texts.setdefault(express(base.answer, named, seed=int(rng.integers(1000)), phrases=phrases), vector)
    return list(texts), np.stack(list(texts.values()))


def _written(world: World, texts: list[str], known: tuple[str, ...]) -> pl.DataFrame:
    """Put the words where the simulated table has ids, and the levels in attribute columns."""
    table, prompts = world.table, [base.prompt for base in base_answers()]
    prompt_ids = [f"prompt-{index:0{len(str(len(prompts) - 1))}d}" for index in range(len(prompts))]
    columns = [pl.col("prompt_id").replace_strict(prompt_ids, prompts).alias("prompt")]
    for side in ("first", "second"):
        columns.append(pl.col(f"{side}_id").replace_strict(list(world.item_ids), texts).alias(side))
        levels = world.features(table[f"{side}_id"])
        columns += [pl.lit(pl.Series(f"attr:{name}:{side}", levels[:, i])) for i, name in enumerate(known)]
    table = table.with_columns(columns).drop("cell")
    return in_order(table.with_columns(fold=pl.lit(None, pl.Utf8))).select(pl.exclude("true_log_odds"), "true_log_odds")
