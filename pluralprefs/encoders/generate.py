"""Continue token sequences with a decoder: greedy, or sampled at a temperature from the likeliest tokens.

The prompt passes through the decoder once; after that one token at a time, with keys and values of a fixed size in
memory, so that the whole loop is one compiled program. Prompts may be padded on either side. Rope scalings that look
at the length (dynamic, longrope) see the length so far, as they do in transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pluralprefs.encoders.attention import Places, locate
from pluralprefs.encoders.decoder import Memory
from pluralprefs.encoders.guiding import Guide
from pluralprefs.types import Key, Tokens


class LanguageModel(Protocol):
    """What generation needs: a decoder that was loaded with its head, split into static data and parameters."""

    @property
    def graphdef(self) -> Any: ...

    @property
    def params(self) -> Any: ...


class Continuation(NamedTuple):
    """New tokens a row, and which of them are real: those up to and with the first end token."""

    ids: Int[Array, "batch new"]
    mask: Bool[Array, "batch new"]


class _State(NamedTuple):
    step: Int[Array, ""]
    logits: Float[Array, "batch vocabulary"]
    memory: Memory
    position: Int[Array, batch]
    done: Bool[Array, batch]
    ids: Int[Array, "batch new"]
    mask: Bool[Array, "batch new"]


def generate(
    model: LanguageModel,
    tokens: Tokens,
    *,
    new: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    end: tuple[int, ...] = (),
    key: Key | None = None,
    guide: Guide | None = None,
) -> Continuation:
    """Continue every row by at most `new` tokens, until it has given a token of `end`. A row of padding gives nothing.

    At temperature 0 the likeliest token is taken. Above it tokens are drawn, with `key`, from the softmax of
    logits / temperature, kept to the fewest likeliest tokens whose probabilities reach `top_p`. With a `guide`
    (`guiding.reward_guide`) its scores stand in the place of the logits. Raises ValueError for settings that are out of
    range, and for more tokens than OPT has positions.
    """
    if new < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"new={new}, temperature={temperature}, top_p={top_p}: need new >= 1, temperature >= 0 and "
                         "0 < top_p <= 1")  # fmt: skip
    if temperature > 0 and key is None:
        raise ValueError("drawing at a temperature needs a key; give key=jax.random.key(0), or temperature=0")
    key = jax.random.key(0) if key is None else key
    sampling = (jnp.float32(temperature), jnp.float32(top_p)) if temperature > 0 else None
    return _generate(model.graphdef, new, model.params, tokens, jnp.asarray(end, jnp.int32), sampling, key, guide)


def nucleus(logits: Float[Array, "*batch vocabulary"], top_p: Float[Array, ""]) -> Float[Array, "*batch vocabulary"]:
    """Logits with -inf for all but the fewest likeliest tokens whose probabilities reach `top_p` (arXiv 1904.09751).

    >>> nucleus(jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.float32(0.6)).tolist()[2]
    -inf
    """
    order = jnp.argsort(-logits, axis=-1)
    likeliest = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    kept = jnp.cumsum(likeliest, axis=-1) - likeliest < top_p
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def choose(
    logits: Float[Array, "batch vocabulary"], sampling: tuple[Any, Any] | None, key: Key
) -> Int[Array, " batch"]:
    """The likeliest token, or one drawn at `sampling`: temperature and top_p."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p = sampling
    return jax.random.categorical(key, nucleus(logits / temperature, top_p)).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _generate(
    graphdef: Any, new: int, params: Any, tokens: Tokens, end: Int[Array, " ends"], sampling: Any, key: Key,
    guide: Guide | None,
) -> Continuation:  # fmt: skip
    model = nnx.merge(graphdef, params)
    ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
    batch, length = ids.shape
    if model.positions is not None and length + new > model.config.positions:
        known = f"the model's {model.config.positions} learned positions"
        raise ValueError(f"{length} columns of prompt and new={new} exceed {known}; shorten the prompts")
    places = locate(mask, jnp.asarray(tokens.segment))
    last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    run = places.run[:, -1]
    hidden, memory = model.extend(ids, places, mask, model.remember(batch, length + new))
    first = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    following = jnp.take_along_axis(places.position, last[:, None], axis=1)[:, 0] + 1
    nothing = jnp.zeros((batch, new), jnp.int32)
    state = _State(jnp.int32(0), model.logits(first), memory, following, ~mask.any(axis=1), nothing, nothing > 0)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.step < new) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        real = ~state.done
        place = Places(state.position[:, None], run[:, None], state.position[:, None] + 1)

        def extended(ids: Int[Array, " batch"]) -> tuple[Float[Array, "batch dim"], Memory]:
            hidden, memory = model.extend(ids[:, None], place, real[:, None], state.memory)
            return hidden[:, 0], memory

        scores = state.logits if guide is None else guide(state.logits, lambda ids: extended(ids)[0], first)
        chosen = jnp.where(real, choose(scores, sampling, jax.random.fold_in(key, state.step)), 0)
        hidden, memory = extended(chosen)
        done = state.done | jnp.isin(chosen, end)
        return _State(
            state.step + 1, model.logits(hidden), memory, state.position + 1, done,
            state.ids.at[:, state.step].set(chosen), state.mask.at[:, state.step].set(real),
        )  # fmt: skip

    state = jax.lax.while_loop(unfinished, step, state)
    return Continuation(state.ids, state.mask)
