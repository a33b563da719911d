"""What attribute predictors read of a text: its sentences, each on its own, through a kernel, averaged.

A phrase that expresses an attribute is a small part of a text, and an embedding of the whole text mixes it with all
else that is said. Here each sentence is embedded alone and widened by Nystrom features of a radial basis function, so
that a head that is linear in them tells phrases apart that lie close together; the text is the mean over its sentences,
the kernel mean embedding of a bag (Gartner et al. 2002; Muandet et al. 2012), and the logarithm of its length, which
the mean loses. A head's score of a text is then the mean of its scores of the sentences, and a share of the length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from pluralprefs.encoders.features import Features

Embed = Callable[[Sequence[str]], np.ndarray]
ANCHORS = 1024
LENGTH = 0.3  # of log(1 + characters) beside features of norm 1
BLOCK = 8192  # texts at a time
END = re.compile(r"(?<=[.!?])\s+|\n+")


def sentences(text: str) -> list[str]:
    """Split a text into sentences; a text without any is one sentence.

    >>> sentences("Rest a day. Then run!")
    ['Rest a day.', 'Then run!']
    """
    return [part for part in END.split(text.strip()) if part] or [text]


def kernel(texts: Sequence[str], embed: Embed, width: float, anchors: int = ANCHORS) -> Features:
    """Fit the kernel's features to the sentences of texts; `width` is in units of their median distance."""
    found = sorted({sentence for text in texts for sentence in sentences(text)})
    embedding = np.asarray(embed(found), np.float32)
    return Features.fit(embedding, np.zeros(len(found)), log_length=False, anchors=anchors, width=width)


def read(texts: Sequence[str], embed: Embed, maps: Features) -> Float[np.ndarray, "texts features"]:
    """Mean over each text's sentences of embedding and kernel features, then its length; in blocks of texts."""
    parts = [_read(block, embed, maps) for block in _blocks(texts)]
    return np.concatenate(parts) if parts else _read([""], embed, maps)[:0]


def _read(texts: Sequence[str], embed: Embed, maps: Features) -> np.ndarray:
    split = [sentences(text) for text in texts]
    place = {sentence: row for row, sentence in enumerate(sorted({one for parts in split for one in parts}))}
    embedding = np.asarray(embed(list(place)), np.float32)
    features = maps(embedding, np.zeros(len(place)))
    means = np.stack([features[[place[one] for one in parts]].mean(0) for parts in split])
    length = LENGTH * np.log1p(np.array([len(text) for text in texts], np.float32))
    return np.concatenate([means, length[:, None]], axis=1)


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), BLOCK):
        yield texts[start : start + BLOCK]
