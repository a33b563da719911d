"""The one place where a (prompt, response) becomes tokens: rendered, truncated, tokenised, padded.

Training, evaluation, export and serving all come through `Renderer`, so a text has one form everywhere.

Rendering. Where the tokenizer has a chat template, a conversation is rendered by it once, and at most one BOS token
remains. Elsewhere (the BERT family) prompt and response are the tokenizer's own pair of segments,
`[CLS] prompt [SEP] response [SEP]`; a prompt or a response by itself, or a response whose prompt is empty, is one
segment. A decoder without a template reads prompt, line break and response as one sequence. A message list becomes text
as follows: one message is its content; several are lines `role: content`. A template that prints today's date (Llama
3.x) prints `TODAY` instead, so that a text has the same features on any day.

Truncation. The prompt loses tokens from the LEFT, so that the response and the question just before it survive. Only
a response that alone exceeds the budget is cut, on the right.

Padding is marked by the mask. Nothing here or in an encoder looks for the id of the padding token, which may equal
another token's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pluralprefs.encoders.weights import EncoderError, digest
from pluralprefs.types import Tokens

Message = dict[str, str | None]  # a null content says nothing
Content = str | Sequence[Message]

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TODAY = date(2024, 7, 26)  # what Llama 3.1's own template prints unless it is told the date
# A template's clock is a function of Python's, which a caller cannot replace; a macro of its name goes before it,
# which knows these codes of strftime and leaves others as they are written.
SAID = {f"%{code}": TODAY.strftime(f"%{code}") for code in "aAbBdHIjmMpSyY"}
SAID |= {f"%-{code}": SAID[f"%{code}"].lstrip("0") or "0" for code in "dHIjmMSy"}
PUT = "".join(f".replace('{code}', '{said}')" for code, said in SAID.items())
CLOCK = "{% macro strftime_now(format) %}{{ format" + PUT + " }}{% endmacro %}\n"


class Text(NamedTuple):
    """What is encoded: a response alone, a prompt alone, or both together (joint)."""

    prompt: Content | None = None
    response: Content | None = None


class Rendered(NamedTuple):
    """One text as token ids with their segments. `prompt_end` is the last prompt token; 0 where there is no prompt."""

    ids: list[int]
    segment: list[int]
    prompt_end: int


class Frame(NamedTuple):
    """The special tokens that a tokenizer puts before, between and after one or two segments."""

    before: list[int]
    between: list[int]
    after: list[int]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True)
class Renderer:
    """Turn texts into token ids of at most `max_length`, special tokens included. Made by `Renderer.load`.

    Two that were read from the same files are equal, so that loading an encoder again does not compile it again.
    """

    tokenizer: Any = field(repr=False, compare=False)
    max_length: int
    digest: str
    single: Frame = field(compare=False)
    pair: Frame = field(compare=False)
    template: bool
    segments: int = 2
    vocabulary: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the tokens of a text."""
        known = {"tokenizer": self.digest, "template": self.template, "max_length": self.max_length}
        return known | ({"date": TODAY.isoformat()} if self.template else {})

    @property
    def whole(self) -> Renderer:
        """The same without a limit, for a caller who leaves something out rather than have a text cut."""
        return replace(self, max_length=sys.maxsize)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        max_length: int = 256,
        segments: int = 2,
        joined: bool = False,
        vocabulary: int | None = None,
    ) -> Renderer:
        """Read the tokenizer of a model's folder. No code from the folder is run.

        `segments` is 2 for models that tell prompt and response apart by segment. `joined` makes them one sequence
        without special tokens between them, as decoders read it. `vocabulary` is the number of tokens that the model
        knows: the tokenizer may know more (Gemma 3's has one for images), but a text with one of those is refused.
        """
        AutoTokenizer = _tokenizers()
        files = [folder / name for name in TOKENIZER_FILES + TOKENIZER_SETTINGS if (folder / name).is_file()]
        if not any(file.name in TOKENIZER_FILES for file in files):
            raise EncoderError(f"{folder}: no tokenizer (tokenizer.json or vocab.txt); copy it beside config.json")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        single = _frame(tokenizer, "a")
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        renderer = cls(
            tokenizer=tokenizer,
            max_length=max_length,
            digest=digest(files),
            single=single,
            pair=single._replace(between=line) if joined else _frame(tokenizer, "a", "a"),
            template=bool(getattr(tokenizer, "chat_template", None)),
            segments=segments,
            vocabulary=vocabulary,
        )
        if max_length < renderer.pair.size + 2:
            raise EncoderError(f"max_length {max_length}: the special tokens alone take {renderer.pair.size}")
        return renderer

    def __call__(self, texts: Sequence[Text]) -> list[Rendered]:
        """Render, truncate and tokenise texts, in their order; EncoderError for a token unknown to the model."""
        chats = [self.template and bool(text.prompt) for text in texts]
        prompts, responses = zip(*map(self._parts, texts, chats), strict=True) if texts else ((), ())
        rows = zip(chats, self._ids(prompts), self._ids(responses), strict=True)
        return [
            self._known(self._chat(prompt, response) if chat else self._join(prompt, response))
            for chat, prompt, response in rows
        ]

    def _known(self, rendered: Rendered) -> Rendered:
        """An id out of range would read another token's row, or give NaN, without a word."""
        largest = max(rendered.ids, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise EncoderError(
                f"a text holds the token {token!r} (id {largest}), but the model knows {self.vocabulary} tokens: "
                "take it out of the texts, or bring the model's own tokenizer"
            )
        return rendered

    def _parts(self, text: Text, chat: bool) -> tuple[str, str]:
        if text.prompt is None and text.response is None:
            raise EncoderError("a text needs a prompt or a response")
        if chat:
            return self._conversation(text)
        return plain(text.prompt or ""), plain(text.response or "")

    def _conversation(self, text: Text) -> tuple[str, str]:
        """Apply the chat template once; the part of the whole that the prompt alone renders to is the prompt."""
        prompt = messages(text.prompt or "", role="user")
        apply = partial(self.tokenizer.apply_chat_template, date_string=TODAY.strftime("%d %b %Y"))
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            apply = partial(apply, chat_template=CLOCK + template)
        rendered = apply(prompt, tokenize=False, add_generation_prompt=True)
        if text.response is None:
            return rendered, ""
        whole = apply(prompt + messages(text.response, role="assistant"), tokenize=False)
        if whole.startswith(rendered):
            return rendered, whole[len(rendered) :]
        rendered = apply(prompt, tokenize=False)
        if not whole.startswith(rendered):
            raise EncoderError(
                "the chat template rewrites the prompt once a response follows; give plain texts instead"
            )
        return rendered, whole[len(rendered) :]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise without special tokens; most texts repeat (a prompt has many responses), so each is done once."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        ids = dict(zip(unique, self.tokenizer(unique, **options)["input_ids"], strict=True))
        return [ids[text] for text in texts]

    def _join(self, prompt: list[int], response: list[int]) -> Rendered:
        """Special tokens around one segment, or two where something of the prompt fits beside the response."""
        room = self.max_length - self.pair.size - len(response)
        if not response:
            prompt = prompt[-(self.max_length - self.single.size) :]
            rendered = self._single(prompt)
            return rendered._replace(prompt_end=max(len(self.single.before) + len(prompt) - 1, 0))
        if not prompt or room <= 0:
            return self._single(response[: self.max_length - self.single.size])
        prompt, (before, between, after) = prompt[-room:], self.pair
        first, second = len(before) + len(prompt) + len(between), len(response) + len(after)
        ids = [*before, *prompt, *between, *response, *after]
        return Rendered(ids, [0] * first + [self.segments - 1] * second, len(before) + len(prompt) - 1)

    def _single(self, ids: list[int]) -> Rendered:
        ids = [*self.single.before, *ids, *self.single.after]
        return Rendered(ids, [0] * len(ids), 0)

    def _chat(self, prompt: list[int], response: list[int]) -> Rendered:
        """A rendered conversation: its own special tokens, one BOS in front whether the template wrote it or not."""
        bos = self.tokenizer.bos_token_id
        before = [bos] if bos is not None and (prompt[:1] == [bos] or self.single.before == [bos]) else []
        while prompt[:1] == [bos]:
            prompt = prompt[1:]
        budget = self.max_length - len(before)
        response = response[:budget]
        room = budget - len(response)
        prompt = prompt[-room:] if room else []
        ids = [*before, *prompt, *response]
        return Rendered(ids, [0] * len(ids), max(len(before) + len(prompt) - 1, 0))


def plain(content: Content) -> str:
    """A message list as text: one message is its content, several are lines `role: content`; a null content is empty.

    >>> plain([{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}])
    'user: Tea?\\nassistant: Yes.'
    """
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0]["content"] or ""
    return "\n".join(f"{message['role']}: {message['content'] or ''}" for message in content)


def messages(content: Content, *, role: str) -> list[Message]:
    """A string as the single message of `role`; a message list as it is.

    >>> messages("Tea?", role="user")
    [{'role': 'user', 'content': 'Tea?'}]
    """
    return [{"role": role, "content": content}] if isinstance(content, str) else [dict(message) for message in content]


def bucket(length: int, *, max_length: int = 256) -> int:
    """The padded length of a text of `length` tokens: few lengths, so that few programs are compiled.

    >>> bucket(17), bucket(200), bucket(300, max_length=512)
    (32, 256, 512)
    """
    size = next((size for size in BUCKETS if size >= length), max_length)
    return min(size, max_length)


def pad(
    rows: Sequence[Rendered], *, length: int, batch: int | None = None, side: Literal["right", "left"] = "right"
) -> Tokens:
    """Pad texts to `length` tokens and, by rows whose mask is empty, to `batch` rows: Tokens [batch, length]."""
    batch = len(rows) if batch is None else batch
    ids, segment = np.zeros((2, batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    prompt_end = np.zeros(batch, np.int32)
    for row, rendered in enumerate(rows):
        start = 0 if side == "right" else length - len(rendered.ids)
        span = slice(start, start + len(rendered.ids))
        ids[row, span], segment[row, span], mask[row, span] = rendered.ids, rendered.segment, True
        prompt_end[row] = start + rendered.prompt_end
    return Tokens(ids=ids, mask=mask, segment=segment, prompt_end=prompt_end)  # pyright: ignore[reportArgumentType]


def _tokenizers() -> Any:
    """Transformers' AutoTokenizer, imported without its advice that PyTorch is missing: nothing here wants it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[name]
    return AutoTokenizer


def _frame(tokenizer: Any, *segments: str) -> Frame:
    """Ask the tokenizer where it puts special tokens, with a known text in each segment."""
    inner = tokenizer(segments[0], add_special_tokens=False)["input_ids"]
    ids = tokenizer(*segments)["input_ids"]
    starts = [at for at in range(len(ids)) if ids[at : at + len(inner)] == inner]
    if not inner or len(starts) != len(segments):
        raise EncoderError(
            f"{type(tokenizer).__name__}: its special tokens around {segments} are not understood: {ids}"
        )
    ends = [start + len(inner) for start in starts]
    between = ids[ends[0] : starts[1]] if len(segments) == 2 else []
    return Frame(ids[: starts[0]], between, ids[ends[-1] :])
