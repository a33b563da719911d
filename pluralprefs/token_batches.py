"""Batches of token ids for an encoder that is trained: pairs packed into shared rows, or pairs of similar length.

Packed (`PackedBatches`): all texts of a pair stand one after the other in a row of one fixed length, with other pairs
behind them. All batches of a training have one shape, so that one program is compiled. Rows are filled best fit first,
the longest pairs before the shorter; which row takes how long a pair follows from the lengths alone, and in every epoch
the pairs of one length are shuffled over its places, and rows over batches.

By length (`TokenBatches`), for encoders that read one text a row: a pair belongs to the padded length
(`tokens.BUCKETS`) of its longer response, and a batch holds pairs of one length, so that few programs are compiled. In
every epoch the pairs of a length are shuffled and cut into batches, and batches of all lengths are shuffled.

Either way what a batch lacks is filled up with weight 0, every pair occurs once an epoch, and the batch of a step is a
function of (seed, step) alone. Of several processes each makes tokens of a share of the texts, and of a batch they send
each other those that it holds: batches are those of one process, and no process needs all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np
import polars as pl
from jaxtyping import Int

from pluralprefs.data.batches import take_rows
from pluralprefs.encoders.cache import known_texts
from pluralprefs.encoders.text import Packed, Span
from pluralprefs.encoders.tokens import Rendered, Renderer, Text, bucket, pad
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.hosts import all_or_none, exchanged, gathered, own_rows
from pluralprefs.types import Comparisons, Item, Tokens

MULTIPLE = 16  # of which the length of a packed row is one
PADDING = 0.15  # with no more of it a packed row is long enough


@dataclass(frozen=True)
class Texts:
    """Rendered texts by item: those that this process holds, and the number of tokens of all."""

    held: Mapping[int, Rendered]
    sizes: Int[np.ndarray, " items"]

    @classmethod
    def render(cls, renderer: Renderer, texts: Callable[[int], Text], table: pl.DataFrame, used: np.ndarray) -> Texts:
        """Render the text of every item of `used`, rows of an item table; of the others nothing."""
        places = own_rows(known_texts(table[used]))
        own = used[places]
        with all_or_none(EncoderError):
            held = dict(zip(own.tolist(), renderer([texts(item) for item in own.tolist()]), strict=True))
        lengths = np.array([len(held[item].ids) for item in own.tolist()], np.int64)
        sizes = np.zeros(table.height, np.int64)
        sizes[used] = gathered(lengths, places, len(used))
        return cls(held, sizes)

    def fetch(self, items: Int[np.ndarray, " asked"]) -> dict[int, Rendered]:
        """The texts of items, which all processes have to ask for; items without one have an empty text."""
        asked = np.unique(items).tolist()
        blank = Rendered([], [], 0)
        own = {item: self.held[item] for item in asked if item in self.held}
        found = {item: text for part in exchanged(_packed(own)) for item, text in _unpacked(part)}
        return {item: found.get(item, blank) for item in asked}


@dataclass(frozen=True)
class TokenBatches:
    """Index rows with the rendered texts that they speak of, batched by length. Made by `TokenBatches.render`.

    items    what goes with every item beside its text (attributes, index), as numpy arrays
    prompts  the rendered prompts of the items, None where the encoder embeds none; all are padded to one length
    budget   tokens of a batch, padding included; a batch holds `multiple` pairs at least, and a multiple of it
    """

    rows: Comparisons[Any]
    items: Item
    responses: Texts
    prompts: Texts | None
    budget: int
    max_length: int
    seed: int
    multiple: int = 1

    @classmethod
    def render(
        cls, encoder: Any, table: pl.DataFrame, items: Item, rows: Comparisons[Any], *, budget: int, seed: int,
        multiple: int = 1,
    ) -> TokenBatches:  # fmt: skip
        """Render the texts of an item table as `cache.encode_items` does; of items that no row names, nothing."""
        used = np.unique(np.concatenate([rows.first, rows.second]))
        prompt, text = table["prompt"].to_list(), table["text"].to_list()
        rendered = partial(Texts.render, encoder.renderer, table=table, used=used)
        responses = rendered(texts=lambda item: Text(prompt[item] if encoder.joint else None, text[item]))
        prompts = rendered(texts=lambda item: Text(prompt[item] or "", None)) if encoder.prompt else None
        return cls(rows, items, responses, prompts, budget, encoder.renderer.max_length, seed, multiple)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(rows) // self.size(length)) for length, rows in self.groups().items())

    @property
    def padding(self) -> float:
        """The share of an epoch's tokens that are padding."""
        prompt = self.prompt_length()
        places = sum(
            -(-len(rows) // self.size(length)) * self.size(length) * (2 * length + prompt)
            for length, rows in self.groups().items()
        )
        return 1 - self.sizes.sum() / places

    @cached_property
    def sizes(self) -> Int[np.ndarray, "pairs texts"]:
        """Tokens of the texts of every pair: first and second response, and the prompt where it is embedded."""
        responses = self.responses.sizes
        found = [responses[self.rows.first], responses[self.rows.second]]
        if self.prompts is not None:
            found.append(self.prompts.sizes[self.rows.first])
        return np.stack(found, axis=1)

    def size(self, length: int) -> int:
        """Pairs of a batch whose responses are padded to `length`."""
        pairs = self.budget // (2 * length + self.prompt_length())
        return max(pairs // self.multiple, 1) * self.multiple

    def prompt_length(self) -> int:
        """The padded length of every prompt; 0 where there are none."""
        if self.prompts is None:
            return 0
        return bucket(int(self.prompts.sizes.max()), max_length=self.max_length)

    def groups(self) -> dict[int, Int[np.ndarray, " rows"]]:
        """Row numbers by the padded length of their longer response."""
        longer = self.sizes[:, :2].max(axis=1)
        padded = np.array([bucket(int(size), max_length=self.max_length) for size in longer])
        return {int(length): np.flatnonzero(padded == length) for length in np.unique(padded)}

    def epoch(self, number: int) -> list[tuple[int, Int[np.ndarray, " ..."]]]:
        """(padded length, row numbers) of each batch of an epoch; -1 is padding."""
        draw, found = np.random.default_rng([self.seed, number]), []
        for length, rows in self.groups().items():
            size = self.size(length)
            order = np.pad(draw.permutation(rows), (0, -len(rows) % size), constant_values=-1)
            found += [(length, batch) for batch in order.reshape(-1, size)]
        return [found[at] for at in draw.permutation(len(found))]

    def batch(self, length: int, index: Int[np.ndarray, " ..."]) -> Any:
        """The pairs at `index`, as numpy arrays; of padding both responses are empty."""
        rows, blank = take_rows(self.rows, index), Rendered([], [], 0)
        responses, prompts = self.fetched(rows, index)

        def side(items: np.ndarray) -> Item:
            def tokens(texts: Mapping[int, Rendered], size: int) -> Any:
                chosen = [blank if at < 0 else texts[item] for at, item in zip(index, items.tolist(), strict=True)]
                return pad(chosen, length=size)

            prompt = None if prompts is None else tokens(prompts, self.prompt_length())
            return self.beside(items).replace(embedding=tokens(responses, length), prompt=prompt)

        return rows.replace(first=side(rows.first), second=side(rows.second))

    def fetched(
        self, rows: Comparisons[Any], index: Int[np.ndarray, " pairs"]
    ) -> tuple[dict[int, Rendered], dict[int, Rendered] | None]:
        """The responses and the prompts of pairs by item."""
        real = index >= 0
        first, second = rows.first[real], rows.second[real]
        prompts = None if self.prompts is None else self.prompts.fetch(np.concatenate([first, second]))
        return self.responses.fetch(np.concatenate([first, second])), prompts

    def beside(self, items: Int[np.ndarray, " pairs"]) -> Item:
        """What goes with items beside their texts."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[items], self.items.replace(embedding=None, prompt=None))

    def stream(self, start: int = 0) -> Iterator[Any]:
        """Yield the batches of steps `start`, `start + 1`, ... without end."""
        steps = self.steps
        for number in count(start // steps):
            skipped = start % steps if number == start // steps else 0
            for length, index in self.epoch(number)[skipped:]:
                yield self.batch(length, index)


@dataclass(frozen=True)
class PackedBatches(TokenBatches):
    """The same, packed: a batch is `Packed`. `multiple` is of rows, of which a batch has at least so many."""

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return -(-self.layout.rows // self.size(self.layout.length))

    @property
    def padding(self) -> float:
        """The share of an epoch's tokens that are padding."""
        length = self.layout.length
        return 1 - self.sizes.sum() / (self.steps * self.size(length) * length)

    def size(self, length: int) -> int:
        """Rows of a batch."""
        return max(self.budget // length // self.multiple, 1) * self.multiple

    @cached_property
    def layout(self) -> Layout:
        """Where pairs stand, in rows no longer than it takes to fill them well: attention costs their length."""
        totals = -np.sort(-self.taken.sum(axis=1))
        shortest, found = -(-int(totals[0]) // MULTIPLE) * MULTIPLE, []
        for times in (1, 2, 4):
            if found and shortest * times * self.multiple > self.budget:
                break
            layout = lay_out(totals, length=shortest * times)
            found.append((1 - totals.sum() / (layout.rows * layout.length), layout))
            if found[-1][0] <= PADDING:
                return layout
        return min(found, key=itemgetter(0))[1]

    @cached_property
    def taken(self) -> Int[np.ndarray, "pairs texts"]:
        """Places of the texts of every pair in its row."""
        return np.maximum(self.sizes, 1)

    def epoch(self, number: int) -> list[tuple[int, Int[np.ndarray, " ..."]]]:
        """(length of a row, numbers of pairs [rows, pairs a row]) of each batch of an epoch; -1 is padding."""
        draw, layout = np.random.default_rng([self.seed, number]), self.layout
        totals, size = self.taken.sum(axis=1), self.size(layout.length)
        order = draw.permutation(len(totals))
        order = order[np.argsort(-totals[order], kind="stable")]
        found = np.full((self.steps * size, layout.slot.max() + 1), -1)
        found[draw.permutation(len(found))[layout.row], layout.slot] = order
        return [(layout.length, batch) for batch in found.reshape(self.steps, size, -1)]

    def batch(self, length: int, index: Int[np.ndarray, " ..."]) -> Packed:
        """The pairs at `index` in their rows, as numpy arrays.

        An empty text takes the place of one token, of id 0: that is what an encoder reads where all is padding.
        """
        rows, width = index.shape
        found = take_rows(self.rows, index.ravel())
        responses, prompts = self.fetched(found, index.ravel())
        parts = [(responses, found.first), (responses, found.second)]
        parts += [] if prompts is None else [(prompts, found.first)]
        real = index.ravel()[:, None] >= 0
        size = np.where(real, self.sizes[index.ravel()], 0)
        taken = np.where(real, self.taken[index.ravel()], 0)
        ends = np.cumsum(taken.reshape(rows, -1), axis=1).reshape(taken.shape)
        start = np.where(real, ends - taken, 0)  # of padding some token that is there
        ids, segment = np.zeros((2, rows, length), np.int32)
        for pair in np.flatnonzero(real):
            for number, (texts, items) in enumerate(parts):
                row, first = pair // width, start[pair, number]
                ids[row, first : first + size[pair, number]] = texts[int(items[pair])].ids
                segment[row, first : ends[pair, number]] = pair % width * len(parts) + number + 1
        tokens = Tokens(ids, segment > 0, segment, np.zeros(rows, np.int32))  # pyright: ignore[reportArgumentType]
        spans = [Span(a.astype(np.int32), b.astype(np.int32)) for a, b in zip(start.T, size.T, strict=True)]
        prompt = spans[2] if len(spans) > 2 else None
        first = self.beside(found.first).replace(embedding=spans[0], prompt=prompt)
        second = self.beside(found.second).replace(embedding=spans[1], prompt=prompt)
        return Packed(tokens, found.replace(first=first, second=second))


def _packed(texts: Mapping[int, Rendered]) -> bytes:
    """Rendered texts as 32-bit integers: how many, then of each its item, length and prompt end, then all tokens."""
    heads = [(item, len(text.ids), text.prompt_end) for item, text in texts.items()]
    tokens = [token for text in texts.values() for part in (text.ids, text.segment) for token in part]
    return np.array([len(heads), *chain.from_iterable(heads), *tokens], np.int32).tobytes()


def _unpacked(sent: bytes) -> Iterator[tuple[int, Rendered]]:
    """What `_packed` packed."""
    count, *_ = numbers = np.frombuffer(sent, np.int32)
    at = 1 + 3 * count
    for item, size, prompt_end in numbers[1:at].reshape(-1, 3).tolist():
        yield item, Rendered(numbers[at : at + size].tolist(), numbers[at + size : at + 2 * size].tolist(), prompt_end)
        at += 2 * size


class Layout(NamedTuple):
    """Rows of `length` tokens, and of every pair, by decreasing length, its row and its place among the row's pairs."""

    length: int
    rows: int
    row: Int[np.ndarray, " pairs"]
    slot: Int[np.ndarray, " pairs"]


def lay_out(sizes: Int[np.ndarray, " pairs"], *, length: int) -> Layout:
    """Lay pairs of decreasing `sizes` into rows of `length` tokens: each into the fullest row that has room for it.

    >>> lay_out(np.array([6, 5, 4, 3, 2]), length=10)
    Layout(length=10, rows=2, row=array([0, 1, 0, 1, 1]), slot=array([0, 0, 1, 1, 2]))
    """
    row, slot = np.zeros((2, len(sizes)), int)
    held: list[int] = []  # pairs of each row
    roomy: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room that they have
    has = np.zeros(length + 1, bool)
    for pair, size in enumerate(sizes.tolist()):
        room = size + int(np.argmax(has[size:]))
        if not has[room]:
            room = length
            roomy[room].append(len(held))
            held.append(0)
        at = roomy[room].pop()
        has[room] = bool(roomy[room])
        row[pair], slot[pair] = at, held[at]
        held[at] += 1
        roomy[room - size].append(at)
        has[room - size] = True
    return Layout(length, len(held), row, slot)
