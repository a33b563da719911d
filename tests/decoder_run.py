"""A run on a tiny decoder that nothing was fitted for: drawn parameters, two communities, words as texts."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import polars as pl
from handmade import handmade
from record_decoders import FIXTURES, WORDS, save_tokenizer

from pluralprefs import encoders, registry
from pluralprefs.data import comparisons
from pluralprefs.models.low_rank import LowRank

TALK = WORDS[4:]


def copied(kind, folder, words=WORDS, **tokenizer):
    """A tiny decoder of a type, with a tokenizer, in `folder`."""
    shutil.copytree(FIXTURES / kind, folder)
    save_tokenizer(folder, words, **tokenizer)
    return folder


def word_pairs(count=64, seed=0, users=1, **columns):
    """Comparisons of responses of one to ten words; `columns` maps a name to f(row number)."""
    draw = np.random.default_rng(seed)
    say = lambda: " ".join(draw.choice(TALK, draw.integers(1, 11)))  # noqa: E731
    rows = [
        {"prompt": f"{say()} ?", "first": f"{say()} tea", "second": f"{say()} coffee", "target": int(draw.integers(2)),
         "user_id": f"user {row % users}", **{name: f(row) for name, f in columns.items()}}
        for row in range(count)
    ]  # fmt: skip
    return comparisons.from_trl(pl.DataFrame(rows))


def attribute_table():
    """What `handmade` needs to begin with."""
    rows = {f"attr:{name}:{side}": [0.0, 1.0] for name in "xy" for side in ("first", "second")}
    return comparisons.from_trl(pl.DataFrame({"first": ["a", "b"], "second": ["c", "d"], "target": [0, 1], **rows}))


def decoder_run(folder, root, model=None, **options):
    """A run whose encoder was loaded from `folder` with `options`, and whose own folder is in `root`."""
    load = partial(encoders.load, str(folder), **{"max_length": 16, **options})
    encoder = load()
    made = handmade(attribute_table(), (model or partial(LowRank.init, rank=3))(key=jax.random.key(1), dim=encoder.dim))
    place = registry.create(root, ("low_rank", "words"), {}, data_fingerprint="5ca1ab1e")
    experiment = replace(made.experiment, encoder=load, name="low_rank")
    return replace(made, encoder=encoder, folder=place, experiment=experiment, cache=False)
