"""Reward-guided decoding: every token is chosen by the model and by a user's reward (ARGS, arXiv 2402.01694).

    score(v) = log pi(v | x, y) + weight r_u(x, y v)        v among the likeliest tokens behind prompt x and answer y

The largest score is taken, or a token is drawn from the softmax of score / temperature. The decoder that writes is the
one that the reward reads: r_u is that of the hidden state of v. As in the paper, a reward that was fitted on whole
responses is asked about beginnings, and nothing is looked at beyond v: no closing tokens of a chat template, no maps of
features, no attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pluralprefs.encoders.pooling import l2_normalise
from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Item, Replaceable, ScalarReward, User


@pytree
class Guide(Replaceable):
    """See `reward_guide`. Another user or weight costs no new compilation; the weight is of nats per unit of reward."""

    family: ScalarReward
    user: User
    weight: Float[Array, ""]
    candidates: int = static()
    prompt: bool = static()
    normalise: bool = static()

    def __call__(
        self,
        logits: Float[Array, "batch vocabulary"],
        extended: Callable[[Int[Array, " batch"]], Float[Array, "batch dim"]],
        prompt: Float[Array, "batch dim"],
    ) -> Float[Array, "batch vocabulary"]:
        """Scores, up to a constant a row, of each row's candidates; -inf for all other tokens.

        `extended` gives the hidden state of one more token a row, `prompt` is that at the end of the prompt.
        """
        likeliest, ids = jax.lax.top_k(logits, min(self.candidates, logits.shape[1]))
        # Only hidden states come out: what memory holds is repeated for the candidates a layer at a time, and not kept.
        hidden = jax.vmap(extended, in_axes=1, out_axes=1)(ids)

        def embedding(hidden: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
            wide = hidden.astype(jnp.float32)
            return l2_normalise(wide) if self.normalise else wide

        def reward(hidden: Float[Array, " dim"], prompt: Float[Array, " dim"]) -> Float[Array, ""]:
            item = Item(embedding=embedding(hidden), prompt=embedding(prompt) if self.prompt else None)
            return self.family.reward(self.user, item)

        rewards = jax.vmap(jax.vmap(reward, (0, None)))(hidden, prompt)
        rows = jnp.arange(len(ids))[:, None]
        return jnp.full_like(logits, -jnp.inf).at[rows, ids].set(likeliest + self.weight * rewards)


def reward_guide(
    encoder: TextEncoder, family: ScalarReward, user: User, *, weight: float, candidates: int = 10
) -> Guide:
    """Make what `generate` takes as its `guide`: the reward of one user, for all rows.

    `encoder` is the decoder that generates and whose embeddings of prompt and response together `family` was fitted
    on. `candidates` tokens a row are tried at every step, in one call that takes as much more memory. Raises
    ValueError for settings out of range and a family without a reward, EncoderError for an encoder that does not read
    the last token of prompt and response.
    """
    if candidates < 1 or not math.isfinite(weight):
        raise ValueError(f"candidates={candidates}, weight={weight}: need candidates >= 1 and a finite weight")
    if not isinstance(family, ScalarReward):
        raise ValueError(f"{type(family).__name__} has log-odds of pairs and no reward of a text: draw several answers "
                         "and take the best with choosing.choose")  # fmt: skip
    if encoder.pooling != "last" or not encoder.joint:
        raise EncoderError(
            f"a guide reads the last token of prompt and response, this encoder has pooling={encoder.pooling!r} and "
            f"joint={encoder.joint}: load it with pooling='last', joint=True"
        )
    return Guide(family, user, jnp.float32(weight), candidates, encoder.prompt, encoder.normalise)
