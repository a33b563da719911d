"""Which of several responses to give this user.

    mean          the response with the largest expected reward: best of n
    lower_bound   the largest mean - z std: a response that is surely good comes before one that may be better
    consensus     the response that most directions near the user's own call best (RPS, arXiv 2510.20498)

Rewards are stated against the average of the responses, A_i = mean_j l(i, j): of a family with a reward that is its
distance from the mean reward, and other families have it too. What no level explains of a row (`Users.residual`) is
taken as a variance of each response.

Consensus draws directions of the user's state at angles up to `angle` (30 degrees), each as long as the state itself.
RPS lets a model write one response a direction and keeps the one that the user's own direction likes best. Where
responses are given, that is best of n again, so here the directions vote and the user's own reward breaks ties;
`neighbours` gives the states for those who have a model that writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from pluralprefs.adapting import joint_log_odds
from pluralprefs.data.files import DataError
from pluralprefs.data.ids import MESSAGES, content_ids
from pluralprefs.fitting import Rows
from pluralprefs.types import Comparisons, InfersUser, Item, ScalarReward
from pluralprefs.users import gather

if TYPE_CHECKING:
    from pluralprefs.adapted import AdaptedUser, Adapts

RULES = ("mean", "lower_bound", "consensus")


class Standing(NamedTuple):
    """Log-odds of each response against the average of all of them, and their covariance."""

    mean: Float[np.ndarray, " n"]
    covariance: Float[np.ndarray, "n n"]


def choose(
    user: AdaptedUser, prompt: str | list[dict[str, str]], responses: Sequence[Any] | pl.DataFrame, *,
    rule: str = "lower_bound", z: float = 1.0, angle: float = 30.0, directions: int = 256, seed: int = 0,
) -> pl.DataFrame:  # fmt: skip
    """Rank responses to one prompt for one user, the choice first: response, place, score, log_odds, log_odds_std.

    `score` is what the rule goes by: the mean, its lower bound (`z` standard deviations below), or the share of the
    `directions` that vote for the response. `place` is where it stood. Raises DataError.
    """
    if rule not in RULES:
        raise DataError(f"rule {rule!r}: write {', '.join(RULES)}")
    table = responses_table(prompt, responses)
    items = user.run.encode(table)
    found = against_average(user.run, items, table.height, user)
    std = np.sqrt(np.diag(found.covariance))
    score = found.mean
    if rule == "lower_bound":
        score = found.mean - z * std
    if rule == "consensus":
        states = neighbours(user, directions, angle=angle, seed=seed)
        score = votes(user, jax.tree.map(lambda x: x[: table.height], items), states)
    order = np.lexsort((-found.mean, -score))
    ranked = {"place": order, "score": score[order], "log_odds": found.mean[order], "log_odds_std": std[order]}
    return pl.DataFrame({"response": table["text"][order.tolist()], **ranked})


def responses_table(prompt: Any, responses: Any) -> pl.DataFrame:
    """Responses as an item table (`data.batches.item_table`), in their own order.

    They are texts, message lists, or a table with `response` and attribute columns `attr:<name>`.
    """
    if not isinstance(responses, pl.DataFrame):
        first = responses[0] if responses is not None and len(responses) else None
        dtype = pl.Utf8 if isinstance(first, str) else MESSAGES
        try:
            responses = pl.DataFrame({"response": pl.Series(responses or [], dtype=dtype)})
        except (TypeError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"responses: give texts, message lists or a table with a column response ({error})"
            ) from None
    if "response" not in responses.columns or not responses.height:
        raise DataError("responses: give one response at least, as texts or in a column response")
    if responses["response"].dtype.base_type() not in (pl.Utf8, pl.List):
        raise DataError(f"responses: are {responses['response'].dtype}, not texts or message lists: write them as text")
    if responses["response"].null_count():
        raise DataError("responses: one of them is null; leave it out")
    dtype = pl.Utf8 if isinstance(prompt, str) else MESSAGES
    prompts = pl.Series("prompt", [prompt] * responses.height, dtype=dtype)
    asked, given = content_ids(prompts), content_ids(responses["response"])
    numbers = [name for name in responses.columns if name.startswith("attr:")]
    keys = [f"{p}/{r}" for p, r in zip(asked, given, strict=True)]
    return pl.DataFrame(
        {"item_key": keys, "item_id": given, "prompt_id": asked, "prompt": prompts, "text": responses["response"]}
    ).with_columns(responses.select(numbers))


def against_average(run: Adapts, items: Item, count: int, user: AdaptedUser) -> Standing:
    """How the first `count` items stand against their average; see the module."""
    if isinstance(run.model, ScalarReward):  # differences from one response say all
        first, second = np.arange(count), np.zeros(count, int)
        turn = np.eye(count) - 1 / count
    else:
        first, second = np.triu_indices(count, 1)
        turn = (np.eye(count)[:, first] - np.eye(count)[:, second]) / count
    none: Any = np.full(len(first), -1, np.int32)
    zero: Any = np.zeros(len(first), np.float32)
    rows: Rows = Comparisons(
        first=first, second=second, target=zero, tie=zero > 0, user=none, community=none * 0 + user.community,
        rater=none, source=none, offset=zero, weight=zero + 1,
    )  # fmt: skip
    joint = joint_log_odds(run.model, run.users, items, user.posterior, rows)
    plus, minus = turn @ joint.plus, turn @ joint.minus
    alone = float(run.users.residual) / 2 * (np.eye(count) - 1 / count)
    covariance = plus @ plus.T - minus @ minus.T + alone
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), 0.0))
    return Standing(turn @ joint.mean, covariance)


def neighbours(user: AdaptedUser, count: int, *, angle: float = 30.0, seed: int = 0) -> Any:
    """Draw user states, stacked [count, ...], in directions at most `angle` degrees from the user's own.

    Angles are uniform and lengths the state's own. Raises DataError for a user without a direction: a state of
    zeros, or one that is inferred from shots (latents beside how far they are trusted).
    """
    if isinstance(user.run.model, InfersUser):
        raise DataError("consensus turns a user's weights, and the state of an inferred user is no such direction: "
                        "choose by lower_bound")  # fmt: skip
    base, _ = gather(user.run.users, jnp.asarray(user.community), jnp.asarray(-1))
    state, unravel = ravel_pytree(jax.tree.map(jnp.add, base, user.posterior.mean.state))
    length = float(jnp.linalg.norm(state))
    if length == 0:
        raise DataError("consensus needs a direction, and nothing is known of this user yet: choose by lower_bound")
    if not 0 < angle <= 90 or count < 1:
        raise DataError(f"angle {angle}, directions {count}: the angle is in (0, 90] degrees, directions at least 1")
    draw = np.random.default_rng(seed)
    own = np.asarray(state, np.float64) / length
    aside = draw.normal(size=(count, len(own)))
    aside -= np.outer(aside @ own, own)
    norm = np.linalg.norm(aside, axis=1, keepdims=True)
    aside /= np.where(norm > 1e-12, norm, 1.0)  # a state of one coordinate has no direction beside its own
    turn = np.deg2rad(draw.uniform(0, angle, size=(count, 1)))
    states = length * (np.cos(turn) * own + np.sin(turn) * aside)
    return jax.vmap(unravel)(jnp.asarray(states, jnp.float32))


def votes(user: AdaptedUser, items: Item, states: Any) -> Float[np.ndarray, " n"]:
    """The share of user states under which each item has the largest reward."""
    model = user.run.model
    if not isinstance(model, ScalarReward):
        raise DataError("consensus needs a family with a reward; choose by lower_bound")
    base, _ = gather(user.run.users, jnp.asarray(user.community), jnp.asarray(-1))
    rewards = np.asarray(_rewards(model, base, user.posterior.mean.gain, states, items))
    return np.bincount(rewards.argmax(1), minlength=rewards.shape[1]) / len(rewards)


@jax.jit
def _rewards(model: Any, base: Any, gain: Any, states: Any, items: Item) -> Array:
    def one(state: Any, item: Item) -> Array:
        return gain * model.reward(base, item) + model.reward(state, item)

    return jax.vmap(lambda state: jax.vmap(lambda item: one(state, item))(items))(states)
