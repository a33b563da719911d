"""A teacher behind a chat-completions server: hosted, vLLM, llama.cpp, or whatever else speaks that protocol.

Faults of a moment (408, 409, 429, 5xx, a time-out, a lost connection, a cut or empty body) are tried again after a
wait that doubles and jitters; where the server says how long to wait (Retry-After), all threads wait that long. A
reply cut at the token limit and a refusal are not tried again: they would be paid for twice and read the same.

The key comes from an environment variable and goes nowhere but into the request's header: it is cut out of errors,
replies and `repr`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pluralprefs.attributes.teacher import (
    Answer,
    ServerError,
    SetupError,
    Task,
    TeacherError,
    Usage,
    messages,
    parse,
)
from pluralprefs.registry.environment import HIDDEN, redact

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "PLURALPREFS_TEACHER_KEY"
PASSING = {408, 409, 429}  # and 5xx: tried again
OF_THIS_TASK = {400, 413, 422}  # too long, say; any other 4xx would meet every task
FIXED = {"messages", "model", "n", "stream", "tools", "functions"}  # no option may set these
SHORTEST_SECRET = 8  # local servers take "EMPTY" or "x" for a key; cutting that out of replies would spoil them


class Fault(Exception):
    """An attempt that failed and is worth another one, after `wait` seconds if the server named them."""

    def __init__(
        self, reason: str, usage: Usage, wait: float | None = None, final: type[TeacherError] = ServerError
    ) -> None:
        super().__init__(reason)
        self.usage, self.wait = usage, wait
        self.final = final  # the error if the last attempt ends so


class ChatTeacher:
    """Ask `model` at `base_url` (as http://localhost:8000/v1), from any number of threads. Close it when done.

    key_variable: the environment variable with the key; a server that wants none works without.
    attempts: calls per task at most. timeout: seconds without a byte. backoff: seconds before the second attempt,
    about doubled each time; a server that asks for more than `longest_wait` seconds is given up.
    options: further fields of the request, as {"seed": 1}; None takes a field out, as in {"max_tokens": None,
    "max_completion_tokens": 512}. name: what stands in the cache's keys; model, address and options unless given.
    Raises SetupError.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = KEY_VARIABLE,
        name: str | None = None,
        attempts: int = 5,
        timeout: float = 120.0,
        backoff: float = 1.0,
        longest_wait: float = 120.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._url = _endpoint(base_url)
        self.model, self.options = model, _checked(options or {})
        self.attempts, self.backoff, self.longest_wait = max(1, attempts), backoff, longest_wait
        self._key, self._key_variable = _key(key_variable), key_variable
        chosen = "".join(f" {field}={value!r}" for field, value in sorted(redact(self.options).items()))
        self.name = name or f"{model} at {self._url}{chosen}"
        self._usage, self._resume_at, self._lock = Usage(), 0.0, threading.Lock()
        self._http = _httpx().Client(
            timeout=timeout, headers={"Authorization": f"Bearer {self._key}"} if self._key else {}
        )

    @property
    def usage(self) -> Usage:
        """Calls and tokens of this teacher so far; a call that was cut off counts the most it can have used."""
        with self._lock:
            return self._usage

    def bound(self, task: Task) -> Usage:
        """Return the most that `task` can use over all attempts. A token has one byte at least."""
        once = self._most(task)
        return Usage(*(self.attempts * part for part in once))

    def ask(self, task: Task) -> Answer:
        """Ask `task`, and again while the fault may pass.

        Raises TeacherError (this task alone fails), ServerError (the server does) or SetupError (all tasks would).
        """
        spent, attempt = Usage(), 1
        while True:
            try:
                answer = self._attempt(task)
                return replace(answer, usage=spent.plus(answer.usage))
            except Fault as fault:
                spent, trouble = spent.plus(fault.usage), fault
            except TeacherError as error:
                raise type(error)(str(error), spent.plus(error.usage)) from None
            if (trouble.wait or 0.0) > self.longest_wait:
                raise ServerError(f"{task}: {trouble}; it asks to wait {trouble.wait:.0f} s: run again later", spent)
            if attempt == self.attempts:
                raise trouble.final(f"{task}: {trouble}, {attempt} attempts; run again to ask what is missing", spent)
            self._pause(attempt, trouble.wait)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> ChatTeacher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ChatTeacher({self.name!r}, key from {self._key_variable}: {'yes' if self._key else 'none'})"

    def _attempt(self, task: Task) -> Answer:
        """Make one call. Fault: try again; TeacherError: do not. Both carry what the call used, as usage counts it."""
        httpx = _httpx()
        most = self._most(task)
        self._wait_for_all()
        try:
            reply = self._http.post(self._url, json=self._body(task))
        except httpx.RequestError as error:
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            raise self._fault(f"{type(error).__name__} ({error})", Usage(1, 0, 0) if unsent else most) from None
        if reply.status_code != 200:
            self._count(Usage(1, 0, 0))
            raise self._refused(task, reply)
        choice, used = self._choice(reply, most)
        self._count(used)
        return self._read(task, choice, used)

    def _body(self, task: Task) -> dict[str, Any]:
        body = {"model": self.model, "messages": messages(task), "temperature": task.temperature}
        body |= {"max_tokens": task.max_tokens, **self.options}
        return {field: value for field, value in body.items() if value is not None}

    def _most(self, task: Task) -> Usage:
        """One call: as many prompt tokens as bytes, and what a chat template adds; as many new ones as are allowed."""
        body = self._body(task)
        prompt = sum(len(message["content"].encode()) + 32 for message in body["messages"])
        limits = [body[field] for field in ("max_tokens", "max_completion_tokens") if field in body]
        return Usage(1, prompt, max(limits, default=task.max_tokens))

    def _choice(self, reply: httpx.Response, most: Usage) -> tuple[dict[str, Any], Usage]:
        """The first choice and what the server says it used; where it says nothing, the most possible."""
        try:
            body = reply.json()
            choice = body["choices"][0]
            content = choice["message"].get("content") or choice["message"].get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._fault("reply without a whole JSON body", most) from None
        used = _stated(body.get("usage")) or most
        if not content and choice.get("finish_reason") not in ("length", "content_filter"):
            raise self._fault("empty answer", used)
        return choice, used

    def _read(self, task: Task, choice: dict[str, Any], used: Usage) -> Answer:
        message, ended = choice["message"], choice.get("finish_reason")
        if message.get("refusal") or ended == "content_filter":
            raise TeacherError(f"{task}: refused ({self._hide(message.get('refusal') or ended)}); left out", used)
        if ended == "length" and task.writes:
            most = f"{self._most(task).completion_tokens} tokens"
            raise TeacherError(f"{task}: cut off at {most}; shorten the text, or leave it out", used)
        answer = parse(task, self._hide(message.get("content") or "", longest=None))
        if task.writes and not answer.readable:
            raise Fault(
                f"reply is not the object asked for: {self._hide(message['content'])}", used, None, TeacherError
            )
        return replace(answer, usage=used)

    def _refused(self, task: Task, reply: httpx.Response) -> Exception:
        status = reply.status_code
        said = f"{status} {reply.reason_phrase} ({self._hide(reply.text)})"
        if status in PASSING or status >= 500:
            return Fault(said, Usage(1, 0, 0), _retry_after(reply.headers.get("Retry-After")))
        if status in OF_THIS_TASK:
            return TeacherError(f"{task}: {said}; shorten the text, or check the options", Usage(1, 0, 0))
        cure = f"check the key in {self._key_variable}" if status in (401, 403) else "check address and model"
        return SetupError(f"{task}: {self._url} says {said}; {cure}", Usage(1, 0, 0))

    def _fault(self, reason: str, used: Usage) -> Fault:
        self._count(used)
        return Fault(self._hide(reason), used)

    def _count(self, used: Usage) -> None:
        with self._lock:
            self._usage = self._usage.plus(used)

    def _pause(self, attempt: int, asked: float | None) -> None:
        """Wait before the next attempt: as long as the server asks, or longer each time."""
        wait = (asked or 0.0) + self.backoff * (1 if asked is not None else 2 ** (attempt - 1)) * random.random()
        if asked is not None:
            with self._lock:
                self._resume_at = max(self._resume_at, time.monotonic() + asked)
        time.sleep(wait)

    def _wait_for_all(self) -> None:
        """Wait while the server has asked for a pause, of whichever thread."""
        with self._lock:
            wait = self._resume_at - time.monotonic()
        time.sleep(max(0.0, wait))

    def _hide(self, text: Any, longest: int | None = 200) -> str:
        """Cut the key out of a text; a text for an error also becomes one short line without other secrets."""
        text = str(text)
        if self._key and len(self._key) >= SHORTEST_SECRET:
            text = text.replace(self._key, HIDDEN)
        if longest is None:
            return text
        return redact(" ".join(text.split()))[:longest] or "no reason given"


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise SetupError("a chat teacher needs httpx: pip install 'pluralprefs[annotate]'") from None
    return httpx


def _endpoint(base_url: str) -> str:
    """The address of chat completions below a base; a bare host gets the usual /v1."""
    cure = "give it as http://localhost:8000/v1, without @, ? and #; the key stands in an environment variable"
    try:
        parts = urlsplit(base_url.strip())
    except ValueError:
        raise SetupError(f"base URL of the teacher: not an address; {cure}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or {"@", "?", "#"} & set(base_url):
        raise SetupError(f"base URL of the teacher: {cure}")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse options that change what is asked, or that take the limit away by which the cost is bounded."""
    for name in sorted(FIXED & set(options)):
        raise SetupError(f"option {name!r}: the teacher sets it itself or does without; leave it out")
    if options.get("max_tokens", 1) is None and not isinstance(options.get("max_completion_tokens"), int):
        raise SetupError("options without a token limit: give max_tokens or max_completion_tokens a number")
    return dict(options)


def _key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in key):  # the header would be refused, with the key in the error
        raise SetupError(f"{variable}: holds blanks or characters that no key has; set it again")
    return key or None


def _stated(usage: Any) -> Usage | None:
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    whole = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
    return Usage(1, *whole) if len(whole) == 2 else None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None where there is none that can be read.

    >>> _retry_after("3"), _retry_after("soon"), _retry_after(None)
    (3.0, None, None)
    """
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
