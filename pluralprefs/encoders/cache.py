"""Run an encoder once over unique texts and keep the features on disk.

The folder of an encoder is named by a hash of all that decides its output: weights, tokenizer files, chat template,
truncation, pooling, normalisation and dtype. A row in it is named by a hash of the text, so one folder serves every
data set, and a text is encoded once however many comparisons, prompts or runs it occurs in.

Rows are kept in shards, each written to a temporary name and then renamed: a process that is killed loses at most
the shard it was filling, and two processes at once at worst do the same work twice. A shard carries a checksum; a
damaged one is removed with a warning and its texts are encoded again.

Texts are sorted into few padded lengths (`tokens.BUCKETS`), each with one batch size, so that an encoder is compiled
at most once a bucket.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache as memoise
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.tokens import Rendered, Renderer, Text, bucket, pad
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.hosts import all_or_none, exchanged, gathered, own_rows, spread, whole
from pluralprefs.types import Item, Tokens

if TYPE_CHECKING:
    from rich.progress import Progress

Cache = str | Path | Literal[False] | None
Show = bool | Literal["always"]
SHARD_ROWS = 1024  # a shard is written when it has this many rows,
SHARD_SECONDS = 10.0  # or when the last one is this old: what a kill can cost
SLAB = 8192  # texts tokenised at a time
FEW = 200  # below this many texts a progress bar is noise


class TextEncoder(Protocol):
    """What the cache needs of an encoder: a pytree that turns Tokens into Item, and its identity."""

    dim: int
    joint: bool
    prompt: bool
    renderer: Renderer

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(self, tokens: Tokens) -> Item: ...


def encode_items(items: pl.DataFrame, encoder: Any, *, cache: Cache = None, progress: Show = True) -> Item:
    """Encode an item table (columns item_id, prompt, text, attr:*) as an Item of numpy arrays, one row an item.

    The embedding is of `text`, or of prompt and text together where the encoder is joint; `Item.prompt` is filled
    where the encoder was loaded with `prompt=True`.
    """
    if isinstance(encoder, AttributeEncoder):
        return encoder(items)
    if hasattr(encoder, "fit"):  # it splits texts before they become tokens
        return encoder(items, cache=cache, progress=progress)
    texts, prompts = item_texts(items, encoder)
    embedding = encode_texts(encoder, texts, cache=cache, progress=progress)
    prompt = encode_texts(encoder, prompts, cache=cache, progress=progress) if encoder.prompt else None
    return Item(embedding=embedding, prompt=prompt)  # pyright: ignore[reportArgumentType]


def encode_together(items: pl.DataFrame, encoder: Any, *, cache: Cache = None, progress: Show = True) -> Item:
    """The same by all processes of a run: each encodes a share of the texts that it has, and all get all features.

    With an encoder that is spread over their devices they encode all texts together.
    """
    import jax

    if isinstance(encoder, AttributeEncoder) or hasattr(encoder, "fit"):
        return encode_items(items, encoder, cache=cache, progress=progress)
    if spread(encoder):  # no process can encode alone
        items = fetch_texts(items, np.arange(items.height))
        return encode_items(items, encoder, cache=cache, progress=progress)
    own = own_rows(known_texts(items))
    with all_or_none(EncoderError):
        found = encode_items(items[own], encoder, cache=cache, progress=progress)
    return jax.tree.map(lambda part: gathered(part, own, items.height), found)


def known_texts(items: pl.DataFrame) -> Bool[np.ndarray, " items"]:
    """Which responses of an item table this process has in words (`data.parts`)."""
    return items["text"].is_not_null().to_numpy()


def require_texts(items: pl.DataFrame, what: str) -> None:
    """Raise EncoderError, on every process, where one lacks texts that another has."""
    known = known_texts(items)
    if len(set(exchanged(_hash(known.tobytes()).digest()))) > 1:
        raise EncoderError(f"{what} have to be known to each process: read them with data.comparisons.read, not in "
                           "parts, or use one process")  # fmt: skip


def fetch_texts(items: pl.DataFrame, rows: Int[np.ndarray, " rows"]) -> pl.DataFrame:
    """The item table with the prompts and responses at `rows` in words on every process."""
    asked = np.zeros(items.height, bool)
    asked[rows] = True
    own = own_rows(known_texts(items))
    sent, out = items.select("prompt", "text").with_row_index("row")[own[asked[own]]], BytesIO()
    sent.write_ipc(out)
    found = pl.concat([pl.read_ipc(BytesIO(part)) for part in exchanged(out.getvalue())])
    return items.with_row_index("row").update(found, on="row").drop("row")


def item_texts(items: pl.DataFrame, encoder: TextEncoder) -> tuple[list[Text], list[Text]]:
    """What is encoded of an item table, one a row: responses (with their prompts where the encoder is joint) and,
    where it wants them, prompts alone."""
    prompts, responses = items["prompt"].to_list(), items["text"].to_list()
    texts = [Text(prompt if encoder.joint else None, text) for prompt, text in zip(prompts, responses, strict=True)]
    return texts, [Text(prompt or "", None) for prompt in prompts] if encoder.prompt else []


def encode_texts(
    encoder: TextEncoder,
    texts: Sequence[str | Text],
    *,
    cache: Cache = None,
    batch_tokens: int | None = None,
    progress: Show = True,
) -> Float[np.ndarray, "texts dim"]:
    """Features of texts, in their order: a read-only memory map, float32 [texts, dim].

    A string is a response alone. `cache` is a folder (None: `default_cache()`, False: keep nothing). `batch_tokens`
    is the size of a batch (None: 2,048 on CPU, 32,768 elsewhere). The progress bar goes to standard error where that
    is a terminal and there is much to do; `progress="always"` shows it anyway.
    """
    whole = [Text(None, text) if isinstance(text, str) else text for text in texts]
    places: dict[bytes, list[int]] = {}
    for row, text in enumerate(whole):
        places.setdefault(text_key(text), []).append(row)
    shards = Shards.open(cache, encoder)
    features = _scratch(len(whole), encoder.dim, shards)
    missing = dict(places)
    for keys, rows in shards.read(places) if shards else ():
        _put(features, places, keys, rows)
        for key in keys:
            missing.pop(key, None)
    if spread(encoder):  # what one cache lacks all compute
        lacking = {sent[at : at + 16] for sent in exchanged(b"".join(missing)) for at in range(0, len(sent), 16)}
        missing = {key: rows for key, rows in places.items() if key in lacking}
    todo = {key: whole[rows[0]] for key, rows in missing.items()}
    for keys, rows in encode_new(encoder, todo, batch_tokens, progress):
        if shards:
            shards.write(keys, rows)
        _put(features, places, keys, rows)
    features.flags.writeable = False
    return features


def default_cache() -> Path:
    """The folder for features: $PLURALPREFS_CACHE, else ~/.cache/pluralprefs/features."""
    return Path(os.environ.get("PLURALPREFS_CACHE") or "~/.cache/pluralprefs/features").expanduser()


def text_key(text: Text) -> bytes:
    """Sixteen bytes that name a text: a hash of its prompt and response, not of its place in a table."""
    return _hash(json.dumps(text, ensure_ascii=False, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Shards:
    """The shard files of one encoder. Each holds `keys` [rows, 16], `features` [rows, dim] and a checksum of both."""

    folder: Path
    dim: int

    @classmethod
    def open(cls, cache: Cache, encoder: TextEncoder) -> Shards | None:
        """Make the encoder's folder, with its identity in encoder.json for a reader; None where cache is False."""
        if cache is False:
            return None
        identity = json.dumps(encoder.identity, sort_keys=True)
        folder = (default_cache() if cache is None else Path(cache)) / hashlib.sha256(identity.encode()).hexdigest()[
            :32
        ]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "encoder.json").exists():
            write_whole(folder / "encoder.json", identity.encode())
        return cls(folder, encoder.dim)

    def read(
        self, wanted: Collection[bytes] | None = None
    ) -> Iterator[tuple[list[bytes], Float[np.ndarray, "rows dim"]]]:
        """Yield keys and rows of every sound shard that holds a wanted text (None: of all); remove the damaged."""
        from safetensors import SafetensorError

        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard = self._read(path, wanted)
            except FileNotFoundError:
                continue  # another process found it damaged and removed it
            except (SafetensorError, EncoderError, ValueError) as error:
                warnings.warn(f"{path}: damaged ({error}), removed; its texts are encoded again", stacklevel=3)
                path.unlink(missing_ok=True)
                continue
            if shard:
                yield shard

    def _read(self, path: Path, wanted: Collection[bytes] | None) -> tuple[list[bytes], np.ndarray] | None:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            names = file.get_tensor("keys")
            keys = [row.tobytes() for row in names]
            if wanted is not None and not any(key in wanted for key in keys):
                return None
            features, checksum = file.get_tensor("features"), (file.metadata() or {}).get("checksum")
        if features.shape != (len(keys), self.dim) or _checksum(names, features) != checksum:
            raise EncoderError("checksum differs")
        return keys, features

    def verified(self, path: Path) -> tuple[list[bytes], str]:
        """The keys of a shard and its checksum. Raises EncoderError where the file is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                names, features = file.get_tensor("keys"), file.get_tensor("features")
                checksum = (file.metadata() or {}).get("checksum")
        except SafetensorError as error:
            raise EncoderError(f"{path}: damaged ({error})") from error
        if features.shape != (len(names), self.dim) or _checksum(names, features) != checksum:
            raise EncoderError(f"{path}: damaged (checksum differs)")
        return [row.tobytes() for row in names], str(checksum)

    def write(self, keys: list[bytes], features: Float[np.ndarray, "rows dim"], name: str = "") -> None:
        """Keep these rows in a new shard, named by its texts where no other name is given."""
        from safetensors.numpy import save

        names = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        content = save({"keys": names, "features": features}, {"checksum": _checksum(names, features)})
        write_whole(self.folder / f"{name or _hash(names.tobytes()).hexdigest()}.safetensors", content)


def encode_new(
    encoder: TextEncoder, texts: dict[bytes, Text], batch_tokens: int | None, progress: Show
) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Yield keys and features of a shard's worth of texts at a time, without a look at any cache.

    Features follow from the texts, their order and `batch_tokens` (None: 2,048 on CPU, 32,768 elsewhere) to the bit.
    """
    batch_tokens = batch_tokens or _batch_tokens()
    keys, begun = list(texts), time.monotonic()
    done: list[tuple[bytes, np.ndarray]] = []
    with progress_bar(len(keys), progress) as bar:
        task = bar.add_task("encoding texts", total=len(keys))
        for start in range(0, len(keys), SLAB):
            slab = keys[start : start + SLAB]
            rendered = encoder.renderer([texts[key] for key in slab])
            for rows, length, size in batches(rendered, batch_tokens, encoder.renderer.max_length):
                tokens = pad([rendered[row] for row in rows], length=length, batch=size)
                features = _features(encoder, tokens)[: len(rows)]
                done += [(slab[row], feature) for row, feature in zip(rows, features, strict=True)]
                bar.advance(task, len(rows))
                if len(done) >= SHARD_ROWS or time.monotonic() - begun > SHARD_SECONDS:
                    yield _stack(done)
                    done, begun = [], time.monotonic()
    if done:
        yield _stack(done)


def batches(rendered: Sequence[Rendered], batch_tokens: int, max_length: int) -> Iterator[tuple[list[int], int, int]]:
    """Yield (rows, padded length, batch size), short texts first; the batch size depends on the length alone."""
    by_length: dict[int, list[int]] = {}
    for row, text in enumerate(rendered):
        by_length.setdefault(bucket(len(text.ids), max_length=max_length), []).append(row)
    for length, rows in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        for start in range(0, len(rows), size):
            yield rows[start : start + size], length, size


def _features(encoder: TextEncoder, tokens: Tokens) -> Float[np.ndarray, "batch dim"]:
    features = np.asarray(whole(_compiled()(encoder, tokens)), np.float32)
    if not np.isfinite(features).all():
        raise EncoderError("the encoder returned values that are not finite; check its weights and dtype")
    return features


@memoise
def _compiled() -> Any:
    """One jitted call for all encoders: their weights are arguments, so a second load does not compile again."""
    import jax

    return jax.jit(lambda encoder, tokens: encoder(tokens).embedding)


def _batch_tokens() -> int:
    import jax

    return 2048 if jax.default_backend() == "cpu" else 32768


def _stack(done: list[tuple[bytes, np.ndarray]]) -> tuple[list[bytes], np.ndarray]:
    return [key for key, _ in done], np.stack([features for _, features in done])


def _put(out: np.ndarray, places: dict[bytes, list[int]], keys: list[bytes], features: np.ndarray) -> None:
    """Copy each key's features to every row that has its text."""
    pairs = [(place, row) for row, key in enumerate(keys) for place in places.get(key, ())]
    targets, sources = np.array(pairs).T
    out[targets] = features[sources]


def _scratch(rows: int, dim: int, shards: Shards | None) -> np.ndarray:
    """A memory map on a file without a name: it can exceed memory, and goes with the last array that uses it."""
    if rows == 0:
        return np.zeros((0, dim), np.float32)
    with tempfile.TemporaryFile(dir=shards.folder if shards else None) as file:
        return np.memmap(file, np.float32, mode="w+", shape=(rows, dim))


def progress_bar(count: int, progress: Show) -> AbstractContextManager[Progress]:
    """A bar on standard error where that is a terminal and `count` is large; "always" shows it anyway."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    shown = progress == "always" or (bool(progress) and count > FEW and sys.stderr.isatty())
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _hash(content: bytes) -> Any:
    return hashlib.blake2b(content, digest_size=16)


def _checksum(names: np.ndarray, features: np.ndarray) -> str:
    return _hash(names.tobytes() + features.tobytes()).hexdigest()
