"""Batches of token ids for an encoder that is trained: pairs of similar length, as many as fit a budget of tokens.

A pair belongs to the padded length (`tokens.BUCKETS`) of its longer response; a batch holds pairs of one length, so
that few programs are compiled and little of a batch is padding. In every epoch the pairs of a length are shuffled and
cut into batches, the last of which is filled up with weight 0, and batches of all lengths are shuffled: every pair
occurs once an epoch, and the batch of a step is a function of (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import jax
import numpy as np
import polars as pl
from jaxtyping import Int

from pluralprefs.data.batches import take_rows
from pluralprefs.encoders.tokens import Rendered, Text, bucket, pad
from pluralprefs.types import Comparisons, Item


@dataclass(frozen=True)
class TokenBatches:
    """Index rows with the rendered texts that they speak of. Made by `TokenBatches.render`.

    items    what goes with every item beside its text (attributes, index), as numpy arrays
    prompts  the rendered prompts of the items, None where the encoder embeds none; all are padded to one length
    budget   tokens of a batch, padding included; a batch holds `multiple` pairs at least, and a multiple of it
    """

    rows: Comparisons[Any]
    items: Item
    responses: Sequence[Rendered]
    prompts: Sequence[Rendered] | None
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
        blank = Rendered([], [], 0)

        def rendered(texts: list[Text]) -> list[Rendered]:
            found = dict(zip(used.tolist(), encoder.renderer(texts), strict=True))
            return [found.get(row, blank) for row in range(table.height)]

        responses = rendered([Text(prompt[row] if encoder.joint else None, text[row]) for row in used])
        prompts = rendered([Text(prompt[row] or "", None) for row in used]) if encoder.prompt else None
        return cls(rows, items, responses, prompts, budget, encoder.renderer.max_length, seed, multiple)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(rows) // self.size(length)) for length, rows in self.groups().items())

    def size(self, length: int) -> int:
        """Pairs of a batch whose responses are padded to `length`."""
        pairs = self.budget // (2 * length + self.prompt_length())
        return max(pairs // self.multiple, 1) * self.multiple

    def prompt_length(self) -> int:
        """The padded length of every prompt; 0 where there are none."""
        if self.prompts is None:
            return 0
        return bucket(max(len(prompt.ids) for prompt in self.prompts), max_length=self.max_length)

    def groups(self) -> dict[int, Int[np.ndarray, " rows"]]:
        """Row numbers by the padded length of their longer response."""
        sizes = np.array([len(response.ids) for response in self.responses])
        longer = np.maximum(sizes[self.rows.first], sizes[self.rows.second])
        padded = np.array([bucket(int(size), max_length=self.max_length) for size in longer])
        return {int(length): np.flatnonzero(padded == length) for length in np.unique(padded)}

    def epoch(self, number: int) -> list[tuple[int, Int[np.ndarray, " pairs"]]]:
        """(padded length, row numbers) of each batch of an epoch; -1 is padding."""
        draw, found = np.random.default_rng([self.seed, number]), []
        for length, rows in self.groups().items():
            size = self.size(length)
            order = np.pad(draw.permutation(rows), (0, -len(rows) % size), constant_values=-1)
            found += [(length, batch) for batch in order.reshape(-1, size)]
        return [found[at] for at in draw.permutation(len(found))]

    def batch(self, length: int, index: Int[np.ndarray, " pairs"]) -> Comparisons[Any]:
        """The pairs at `index`, as numpy arrays; of padding both responses are empty."""
        rows = take_rows(self.rows, index)

        def side(items: np.ndarray) -> Item:
            def tokens(texts: Sequence[Rendered], size: int) -> Any:
                blank = Rendered([], [], 0)
                chosen = [blank if at < 0 else texts[item] for at, item in zip(index, items, strict=True)]
                return pad(chosen, length=size)

            prompt = None if self.prompts is None else tokens(self.prompts, self.prompt_length())
            rest = jax.tree.map(lambda leaf: np.asarray(leaf)[items], self.items.replace(embedding=None, prompt=None))
            return rest.replace(embedding=tokens(self.responses, length), prompt=prompt)

        return rows.replace(first=side(rows.first), second=side(rows.second))

    def stream(self, start: int = 0) -> Iterator[Comparisons[Any]]:
        """Yield the batches of steps `start`, `start + 1`, ... without end."""
        steps = self.steps
        for number in count(start // steps):
            skipped = start % steps if number == start // steps else 0
            for length, index in self.epoch(number)[skipped:]:
                yield self.batch(length, index)
