"""`pluralprefs encode`: features of many files, a shard a file, by any number of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pluralprefs.terminal import plainly, say


@plainly
def encode(
    files: Annotated[list[Path], typer.Argument(help="Comparisons: .jsonl, .parquet or .csv.")],
    out: Annotated[Path, typer.Option(help="Folder of the features; the same for all tasks.")],
    encoder: Annotated[str, typer.Option(help='"minilm", a folder or a Hugging Face id.')] = "minilm",
    shards: Annotated[int | None, typer.Option(min=1, help="Output files; one a 32,768 responses by default.")] = None,
    task: Annotated[str, typer.Option(help="I/N: encode the shards of the I-th of N tasks, counted from 0.")] = "0/1",
    joint: Annotated[bool, typer.Option("--joint", help="Embed prompt and response together.")] = False,
    prompt: Annotated[bool, typer.Option("--prompt", help="Embed prompts alone too.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text, at most.")] = None,
    dtype: Annotated[str, typer.Option(help='"float32" or "bfloat16".')] = "float32",
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Encode the texts of files once, for runs to read with PLURALPREFS_CACHE=OUT.

    The same command again goes on where it was stopped. _SUCCESS in the folder says that all tasks are done.
    """
    from pluralprefs.encoders import load
    from pluralprefs.extraction import SUCCESS, Task, encode_files

    which = Task.read(task)
    if encoder == "attributes":
        raise ValueError("--encoder attributes: attribute columns need no features; name an encoder of texts")
    loaded = load(encoder, joint=joint, prompt=prompt, max_length=max_length, dtype=dtype)
    done = encode_files(loaded, files, out, shards=shards, task=which, tell=say)  # type: ignore[arg-type]
    say(f"{out / SUCCESS}: all shards are there" if done else f"{out}: shards of other tasks are missing yet")
