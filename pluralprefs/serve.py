"""Serve a run over HTTP: rewards for a user, for loops that train a policy.

    POST /score        one prompt, its responses, a user -> rewards, P(first), its uncertainty, whose state it was
    POST /rewards      prompts, completions, as TRL's reward functions get them -> rewards
    POST /get_reward   query, prompts, as OpenRLHF posts them to a remote reward model -> rewards
    GET  /health, /info

Questions that arrive together are scored in one call (`answering`): they wait a few milliseconds for company, or until
the call before them ends. What waits is bounded, and who comes when it is full is told to come again. Names and texts
are in no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pluralprefs.answering import Answer, Question, Scorer, ServeError, Text

LOG = logging.getLogger(__name__)
STOPPING = 30  # seconds that questions have to be answered in once the server is told to stop


class Refused(Exception):
    """A request that is not answered: an HTTP status, and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """batch: rows of one call. queue: rows that may wait. wait: seconds for company. body: bytes of a request.

    text: characters that may wait, a prompt counted once a comparison, since each repeats it.
    """

    batch: int = 256
    queue: int = 4096
    wait: float = 0.005
    body: int = 8 * 2**20
    text: int = 64 * 2**20

    def __post_init__(self) -> None:
        if min(self.batch, self.queue - self.batch + 1, self.body) < 1 or not 0 <= self.wait <= 60:
            raise ServeError("limits: batch, queue and body are at least 1, the queue holds a batch, wait is 0 to 60 s")


class Batcher:
    """Put questions that arrive together into one call of `answer`, in a thread of its own, in order of arrival."""

    def __init__(self, answer: Callable[[Sequence[Question]], list[Answer]], limits: Limits) -> None:
        self.answer, self.limits = answer, limits
        self.calls = self.answered = 0
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._rows = self._text = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "scoring")

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Wait for the answers. Raises Refused where a question is too long, or the queue is full."""
        rows = sum(question.rows for question in questions)
        longest = max(question.rows for question in questions)
        if longest > self.limits.batch or rows > self.limits.queue:
            raise Refused(413, f"{rows} comparisons in one request: the server takes {self.limits.batch} of one prompt "
                               f"and {self.limits.queue} in all; send fewer")  # fmt: skip
        text = sum(question.characters for question in questions)
        if text > self.limits.text:
            raise Refused(413, f"{text} characters in one request, its prompt once a comparison: the server takes "
                               f"{self.limits.text}; send fewer responses or less text")  # fmt: skip
        if self._rows + rows > self.limits.queue or self._text + text > self.limits.text:
            raise Refused(503, "the queue is full; come again in a second")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in questions]
        self._waiting.extend(zip(questions, futures, strict=True))
        self._rows += rows
        self._text += text
        self._arrived.set()
        return await asyncio.gather(*futures)

    async def work(self) -> None:
        """Answer for ever; a cancellation waits for the call that is under way."""
        while True:
            await self._arrived.wait()
            if self._rows < self.limits.batch:
                await asyncio.sleep(self.limits.wait)
            taken = self._take()
            if not self._waiting:
                self._arrived.clear()
            if taken:
                await self._settle(taken)

    def close(self) -> None:
        """End the thread once its call is done."""
        self._thread.shutdown(wait=True)

    def _take(self) -> list[tuple[Question, asyncio.Future[Answer]]]:
        """Those who waited longest, as many as fit into a call; without those whose caller has gone."""
        taken, rows = [], 0
        while self._waiting and rows + self._waiting[0][0].rows <= self.limits.batch:
            question, future = self._waiting.popleft()
            self._rows -= question.rows
            self._text -= question.characters
            if not future.done():
                taken.append((question, future))
                rows += question.rows
        return taken

    async def _settle(self, taken: Sequence[tuple[Question, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self.answer, [question for question, _ in taken])
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of libraries are no Exception, and must not end the loop
            if len(taken) > 1:  # one of them is at fault: the others are answered
                for each in taken:
                    await self._settle([each])
                return
            [(_, future)] = taken
            if not future.done():
                future.set_exception(_refusal(error))
            return
        self.calls += 1
        self.answered += len(taken)
        for (_, future), answer in zip(taken, answers, strict=True):
            if not future.done():
                future.set_result(answer)


def _refusal(error: BaseException) -> Refused:
    """What a caller is told: a mistake of theirs in our words, anything else without particulars, which may be of
    somebody else. The log gets the place and the kind of the error, and no text."""
    if isinstance(error, ValueError):
        return Refused(422, " ".join(str(error).split()))
    place = traceback.extract_tb(error.__traceback__)[-1]
    LOG.error("scoring failed: %s in %s, line %s", type(error).__name__, Path(place.filename).name, place.lineno)
    return Refused(500, "scoring failed; the server's log has the kind of the error")


# --- requests


def read_score(body: Mapping[str, Any], ends: Sequence[str]) -> list[Question]:
    """The question of `/score`. Raises Refused."""
    _fields(body, ("prompt", "responses", "user", "community"))
    responses = _list(body, "responses")
    texts = tuple(_text(response, f"responses[{at}]") for at, response in enumerate(responses))
    _alike(texts, "responses")
    prompt = _text(body.get("prompt", ""), "prompt")
    return [Question(prompt, texts, _name(body.get("user"), "user"), _name(body.get("community"), "community"))]


def read_rewards(body: Mapping[str, Any], ends: Sequence[str]) -> list[Question]:
    """The questions of `/rewards`: prompts and completions of TRL, and one user or one a prompt. Raises Refused."""
    completions = [_cut(_text(each, f"completions[{at}]"), ends) for at, each in enumerate(_list(body, "completions"))]
    return _paired(body, completions)


def read_get_reward(body: Mapping[str, Any], ends: Sequence[str]) -> list[Question]:
    """The questions of `/get_reward`: a query of OpenRLHF is its prompt and the response behind it. Raises Refused."""
    queries, prompts = _list(body, "query"), _list(body, "prompts", len(_list(body, "query")))
    responses: list[Text] = []
    for at, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        behind = _behind(prompt, query) if isinstance(query, str) and isinstance(prompt, str) else None
        if behind is None:
            raise Refused(
                422, f"query[{at}]: is no text that begins with prompts[{at}]; send both as the policy read them"
            )
        responses.append(_cut(behind, ends))
    return _paired(body, responses)


def _behind(prompt: str, query: str) -> str | None:
    """What follows the prompt in a query; None where the query does not begin with it.

    A query is decoded from tokens, which may have changed the spaces of its prompt.

    >>> _behind("Which tea?", " Which tea ? Assam"), _behind("Which tea?", "Why? Assam")
    (' Assam', None)
    """
    if query.startswith(prompt):
        return query[len(prompt) :]
    at = 0
    for sign in "".join(prompt.split()):
        while at < len(query) and query[at].isspace():
            at += 1
        if query[at : at + 1] != sign:
            return None
        at += 1
    space = len(prompt) - len(prompt.rstrip())
    while space and query[at : at + 1].isspace():
        at, space = at + 1, space - 1
    return query[at:]


READERS = {"/score": read_score, "/rewards": read_rewards, "/get_reward": read_get_reward}


def _paired(body: Mapping[str, Any], responses: Sequence[Text]) -> list[Question]:
    count = len(responses)
    prompts = [_text(prompt, f"prompts[{at}]") for at, prompt in enumerate(_list(body, "prompts", count))]
    users, communities = (_each(body.get(name), name, count) for name in ("user", "community"))
    rows = zip(prompts, responses, users, communities, strict=True)
    return [Question(prompt, (response,), user, community) for prompt, response, user, community in rows]


def _fields(body: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise Refused(422, f"{unknown[0]!r}: no such field; there are {', '.join(known)}")


def _list(body: Mapping[str, Any], name: str, count: int | None = None) -> list[Any]:
    found = body.get(name)
    if not isinstance(found, list) or not found:
        raise Refused(422, f"{name}: is missing or no list; send at least one")
    if count is not None and len(found) != count:
        raise Refused(422, f"{name}: holds {len(found)}, but there are {count} responses; send one each")
    return found


def _text(value: Any, where: str) -> Text:
    """A text, or messages of role and content."""
    if isinstance(value, str):
        return value
    messages = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )
    if not messages or not value:
        raise Refused(422, f"{where}: is no text and no list of messages; send texts, or lists of {{role, content}}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _alike(texts: Sequence[Text], name: str) -> None:
    if len({type(text) for text in texts}) > 1:
        raise Refused(422, f"{name}: are texts and messages; send one or the other")


def _cut(text: Text, ends: Sequence[str]) -> Text:
    """A text up to where the policy ended it."""
    for end in ends:
        text = text.partition(end)[0] if isinstance(text, str) else text
    return text


def _name(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise Refused(422, f"{where}: is no text; send a name, or null")
    return value or None


def _each(value: Any, name: str, count: int) -> list[str | None]:
    """One name for all, or a list of them."""
    if not isinstance(value, list):
        return [_name(value, name)] * count
    if len(value) != count:
        raise Refused(
            422, f"{name}: holds {len(value)}, but there are {count} responses; send one each, or one for all"
        )
    return [_name(each, f"{name}[{at}]") for at, each in enumerate(value)]


# --- the server


def application(scorer: Scorer, limits: Limits, ends: Sequence[str] = ()) -> Any:
    """The ASGI application. `ends` are marks that end the policy's responses: they and what follows are cut off."""
    starlette = _libraries()[0]
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    batcher: Batcher | None = None

    @contextlib.asynccontextmanager
    async def living(_: Any) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(scorer, limits)
        work = asyncio.create_task(batcher.work())
        yield
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        batcher.close()

    async def answer(request: Request) -> JSONResponse:
        assert batcher is not None
        try:
            body = await _body(request, limits.body)
            named = {name: request.query_params[name] for name in ("user", "community") if name in request.query_params}
            questions = READERS[request.url.path](named | body, ends)
            answers = await batcher.ask(questions)
            if request.url.path == "/score":
                return JSONResponse(answers[0]._asdict())
            if any(each.rewards is None for each in answers):
                raise Refused(422, "this family compares responses and gives no rewards; ask /score")
            rewards = [each.rewards[0] for each in answers if each.rewards]
            return JSONResponse({"rewards": rewards, "user_source": [each.user_source for each in answers]})
        except asyncio.CancelledError:  # the time to stop in is over
            return JSONResponse({"error": "the server has stopped"}, 503)
        except Refused as refused:
            headers = {"Retry-After": "1"} if refused.status == 503 else None
            return JSONResponse({"error": str(refused)}, refused.status, headers)

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def info(_: Request) -> JSONResponse:
        assert batcher is not None
        counts = {"calls": batcher.calls, "answered": batcher.answered}
        return JSONResponse(scorer.info() | {"limits": asdict(limits)} | counts)

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        there = ", ".join((*READERS, "/health", "/info"))
        return JSONResponse({"error": f"{error.detail}; there are {there}"}, error.status_code, error.headers)

    routes = [Route(path, answer, methods=["POST"]) for path in READERS]
    routes += [Route("/health", health), Route("/info", info)]
    return starlette.applications.Starlette(routes=routes, lifespan=living, exception_handlers={HTTPException: unknown})


async def _body(request: Any, most: int) -> dict[str, Any]:
    """The JSON object of a request of at most `most` bytes. Raises Refused."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            raise Refused(413, f"the request is larger than {most} bytes; send fewer responses at a time")
    try:
        found = json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "the request is no JSON object")
    return found


class Listening(NamedTuple):
    """A server with its socket, before it runs: `run()` answers until `stop()` or a signal."""

    server: Any
    socket: socket.socket

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        with contextlib.suppress(KeyboardInterrupt), self.socket:
            self.server.run(sockets=[self.socket])

    def stop(self) -> None:
        self.server.should_exit = True


def listen(
    scorer: Scorer, *, host: str = "127.0.0.1", port: int = 8000, limits: Limits | None = None, ends: Sequence[str] = ()
) -> Listening:
    """Bind a port (0: a free one) for a server of `scorer`, which has answered once by then. Raises ServeError."""
    _, uvicorn = _libraries()
    app = application(scorer, limits or Limits(), ends)
    scorer([Question("", ("a", "b"))])  # compiles, and fails here rather than for the first who asks
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ServeError(f"{host}:{port}: cannot listen there ({error}); choose another --host or --port") from error
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", timeout_graceful_shutdown=STOPPING, server_header=False
    )  # an access log would hold the names of users
    return Listening(uvicorn.Server(config), bound)


def _libraries() -> tuple[Any, Any]:
    try:
        import starlette.applications
        import uvicorn
    except ImportError as error:
        raise ServeError(f'serving needs starlette and uvicorn ({error}): pip install "pluralprefs[serve]"') from error
    return starlette, uvicorn
