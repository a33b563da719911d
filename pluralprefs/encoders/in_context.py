"""A user in the prompt: shots, then a question, as a language model reads them, and what it says of two responses.

A prompt is one message: every shot with the preferred response before the dispreferred one, whichever was called
first; if there is one, a description of the user; the task; the question. It goes through the model's chat template
(`tokens.Renderer`). Where it does not fit, the oldest shots are left out, never the question, and the two responses of
a pair see the same shots. The answer of a policy pi and of its reference about a response is

    Item.log_ratio = log pi(y | C, x) - log pi_ref(y | C, x)

summed over the tokens of the completion: what the template writes behind a response (its end token) belongs to it, the
prompt does not. The reference reads the same context C (FSPO, arXiv 2502.19312). `models.implicit` makes log-odds
of it.

The order of the shots is the caller's, oldest first. It can change a prediction: a language model reads a sequence.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from pluralprefs.encoders.cache import SHARD_ROWS, SHARD_SECONDS, Shards
from pluralprefs.encoders.tokens import Content, Rendered, Renderer, Text, pad, plain
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.types import Comparisons, Item, Tokens

LogProbability = Callable[[Any, Tokens], Array]  # (parameters, tokens [batch, length]) -> [batch]
COLUMNS = 64  # whose logits are in memory at once
SHORTEST = 32  # columns


class Shot(NamedTuple):
    """One judgement of the user; where it was a tie, the order of the two says nothing."""

    question: Content
    preferred: Content
    dispreferred: Content
    tie: bool = False

    @property
    def reversed(self) -> Shot:
        """The judgement that the user did not make."""
        return self._replace(preferred=self.dispreferred, dispreferred=self.preferred)


@dataclass(frozen=True)
class Wording:
    """What a prompt says around the texts. `shot`, `tie` and `question` name the parts that they hold."""

    opening: str = "These are judgements of one user.\n\n"
    shot: str = "Question: {question}\nPreferred: {preferred}\nDispreferred: {dispreferred}\n\n"
    tie: str = "Question: {question}\nLiked equally: {preferred}\nLiked equally: {dispreferred}\n\n"
    description: str = "What this user likes: {description}\n\n"
    task: str = "Answer the following question as this user would like best.\n\n"
    question: str = "Question: {question}"
    describe: str = "Describe in one or two sentences what this user likes in a response."


@dataclass(frozen=True)
class Prompter:
    """Writes prompts and renders them within `renderer.max_length` tokens."""

    renderer: Renderer
    wording: Wording = field(default_factory=Wording)

    def answer(self, shots: Sequence[Shot], question: Content, description: str | None = None) -> str:
        """The prompt that asks for an answer."""
        words = self.wording
        known = "" if description is None else words.description.format(description=description)
        return self._shown(shots) + known + words.task + words.question.format(question=plain(question))

    def describe(self, shots: Sequence[Shot]) -> str:
        """The prompt that asks for a description of the user."""
        return self._shown(shots) + self.wording.describe

    def _shown(self, shots: Sequence[Shot]) -> str:
        if not shots:
            return ""
        said = [
            (self.wording.tie if shot.tie else self.wording.shot).format(
                question=plain(shot.question), preferred=plain(shot.preferred), dispreferred=plain(shot.dispreferred)
            )
            for shot in shots
        ]
        return self.wording.opening + "".join(said)

    def responses(
        self,
        shots: Sequence[Shot],
        question: Content,
        responses: Sequence[Content],
        description: str | None = None,
    ) -> list[Rendered]:
        """Render responses (none: the prompt alone) to one question behind the newest shots that fit them all.

        Raises EncoderError where the question and a response do not fit even without shots.
        """
        answers: Sequence[Content | None] = responses or [None]
        return self._newest(
            shots, lambda kept: [Text(self.answer(kept, question, description), answer) for answer in answers]
        )

    def description(self, shots: Sequence[Shot], description: str | None = None) -> Rendered:
        """Render a description (None: the prompt alone) behind the newest shots that fit."""
        return self._newest(shots, lambda kept: [Text(self.describe(kept), description)])[0]

    def _newest(self, shots: Sequence[Shot], write: Callable[[Sequence[Shot]], list[Text]]) -> list[Rendered]:
        def rendered(count: int) -> list[Rendered] | None:
            found = self.renderer.whole(write(shots[len(shots) - count :]))
            return found if max(len(each.ids) for each in found) <= self.renderer.max_length else None

        found, least, most = rendered(len(shots)), 0, len(shots)
        if found is None:
            found = rendered(0)
            if found is None:
                longest = max(len(each.ids) for each in self.renderer.whole(write([])))
                raise EncoderError(
                    f"a question with its response takes {longest} tokens, max_length is {self.renderer.max_length}: "
                    "raise it, or leave the row out"
                )
            while most - least > 1:  # more shots are more tokens
                middle = (least + most) // 2
                tried = rendered(middle)
                least, most = (least, middle) if tried is None else (middle, most)
                found = found if tried is None else tried
        return [self._completed(each) for each in found]

    def _completed(self, rendered: Rendered) -> Rendered:
        """Without a template a line break stands between prompt and response: it is of the prompt."""
        between = 0 if self.renderer.template else len(self.renderer.pair.between)
        return rendered._replace(prompt_end=min(rendered.prompt_end + between, len(rendered.ids) - 1))


def padded(rows: Sequence[Rendered], *, max_length: int, length: int | None = None, batch: int | None = None) -> Tokens:
    """Pad on the left, so that completions end in the last column, and up to `batch` rows: Tokens [rows, length].

    By default the length is 32, 64, 128, ... or `max_length`: few lengths, so that few programs are compiled.
    """
    longest = max((len(row.ids) for row in rows), default=1)
    size = max(SHORTEST, 1 << (longest - 1).bit_length())
    return pad(rows, length=length or min(size, max_length), batch=batch, side="left")


def completions(tokens: Tokens) -> Bool[Array, "batch length"]:
    """Mark the tokens of the completions: the real ones behind the prompt."""
    ids = jnp.asarray(tokens.ids)
    return jnp.asarray(tokens.mask) & (jnp.arange(ids.shape[1])[None] > jnp.asarray(tokens.prompt_end)[:, None])


def decoder_log_probability(graphdef: Any, *, columns: int = COLUMNS) -> LogProbability:
    """Make log_probability(params, tokens) of a decoder that was loaded with its head: float32 nats, [batch].

    A sum over completion tokens; 0 for a row without any. Logits of `columns` columns are in memory at once, are
    computed again for the gradient, and not at all where no row has a completion.
    """

    def log_probability(params: Any, tokens: Tokens) -> Float[Array, " batch"]:
        model = nnx.merge(graphdef, params)
        hidden = model(tokens)[:, :-1]
        ids, counted = jnp.asarray(tokens.ids)[:, 1:], completions(tokens)[:, 1:]
        extra = -ids.shape[1] % columns

        def cut(x: Array) -> Array:
            wide = jnp.pad(x, [(0, 0), (extra, 0), *[(0, 0)] * (x.ndim - 2)])
            return jnp.moveaxis(wide.reshape(len(x), -1, columns, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def nats(hidden: Array, ids: Array, counted: Array) -> Array:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), ids[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(counted, chosen, 0.0), axis=1)

        def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
            return total + jax.lax.cond(part[2].any(), nats, lambda *_: jnp.zeros(len(total)), *part), None

        return jax.lax.scan(add, jnp.zeros(len(ids)), (cut(hidden), cut(ids), cut(counted)))[0]

    return log_probability


def both(rows: Comparisons[Tokens]) -> Tokens:
    """First and second responses as one batch: Tokens [2 rows, length]."""
    return jax.tree.map(lambda first, second: jnp.concatenate([first, second]), rows.first, rows.second)


def encode_pairs(
    log_probability: LogProbability, params: Any, rows: Comparisons[Tokens], reference: Float[Array, "2 rows"]
) -> Comparisons[Item]:
    """Comparisons[Tokens] -> Comparisons[Item]: `log_ratio` against the reference's log-probabilities of both sides.

    The items carry nothing else: an embedding of no dimensions.
    """
    ratio = log_probability(params, both(rows)).reshape(reference.shape) - reference
    nothing = jnp.zeros((reference.shape[1], 0))
    first, second = (Item(embedding=nothing, log_ratio=side) for side in ratio)
    return rows.replace(first=first, second=second)  # type: ignore[return-value]


def reference_log_probabilities(
    log_probability: LogProbability, params: Any, batches: Iterable[Comparisons[Tokens]], *, folder: Path | None = None
) -> list[Float[np.ndarray, "2 rows"]]:
    """What the reference says of every batch, computed once: float32, of first and second responses.

    With a `folder` it is kept there, by model and window: what was computed before a kill, or for another training with
    the same reference, is read. The model is known by its parameters and by the program that they go through.
    """
    compiled = jax.jit(log_probability)
    shards = None if folder is None else _kept(folder, log_probability, params)
    known = {} if shards is None else {key: row for keys, rows in shards.read() for key, row in zip(keys, rows)}  # noqa: B905
    found, new, saved = [], dict[bytes, np.ndarray](), time.monotonic()
    for rows in batches:
        keys = [] if shards is None else _window_keys(rows)
        if not keys or not all(key in known for key in keys):
            said = np.asarray(compiled(params, both(rows)), np.float32).reshape(2, -1)
            fresh = {key: row for key, row in zip(keys, said.T, strict=True) if key not in known} if keys else {}
            known |= fresh
            new |= fresh
        else:
            said = np.stack([known[key] for key in keys], axis=1)
        found.append(said)
        if shards and new and (len(new) >= SHARD_ROWS or time.monotonic() - saved > SHARD_SECONDS):
            shards.write(list(new), np.stack(list(new.values())))
            new, saved = {}, time.monotonic()
    if shards and new:
        shards.write(list(new), np.stack(list(new.values())))
    return found


def _kept(folder: Path, log_probability: LogProbability, params: Any) -> Shards:
    """Where the log-probabilities of a model are kept."""
    like: Any = jax.ShapeDtypeStruct((1, SHORTEST), np.int32)
    tokens = Tokens(like, jax.ShapeDtypeStruct((1, SHORTEST), bool), like, jax.ShapeDtypeStruct((1,), np.int32))  # pyright: ignore[reportArgumentType]
    digest = hashlib.sha256(jax.jit(log_probability).lower(params, tokens).as_text().encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    own = folder / f"reference-{digest.hexdigest()[:32]}"
    own.mkdir(parents=True, exist_ok=True)
    return Shards(own, 2)


def _window_keys(rows: Comparisons[Tokens]) -> list[bytes]:
    """Sixteen bytes a row that name what is read: both responses with their prompts, whatever the padding."""
    keys = []
    for at in range(len(rows.first.ids)):
        digest = hashlib.blake2b(digest_size=16)
        for side in (rows.first, rows.second):
            real = np.asarray(side.mask[at])
            read = [np.asarray(side.ids[at])[real], np.asarray(side.segment[at])[real]]
            end = int(side.prompt_end[at]) - int(np.argmax(real))  # from the first token that is read
            digest.update(np.array([real.sum(), end], np.int64).tobytes() + np.stack(read).astype(np.int64).tobytes())
        keys.append(digest.digest())
    return keys
