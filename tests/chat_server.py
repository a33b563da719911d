"""A chat-completions server on this machine, with faults on request: what the teacher's tests talk to."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCK = re.compile(r"<(text-[0-9a-f]{16})>\n(.*?)\n</\1>", re.DOTALL)


def blocks(body):
    """Return the texts in the blocks of a request, in order."""
    return [text for _, text in BLOCK.findall(body["messages"][-1]["content"])]


def sensible(body):
    """Reply as a good model would: the text in capitals, the longer of two texts, full marks."""
    asked, texts = body["messages"][-1]["content"], blocks(body)
    if '{"rewrite"' in asked:
        return json.dumps({"rewrite": texts[-1].upper()})
    if '{"answer"' in asked:
        return json.dumps({"answer": "first" if len(texts[-2]) > len(texts[-1]) else "second"})
    return json.dumps({"score": 5})


class ChatServer(ThreadingHTTPServer):
    """Answers with `reply(body)`; faults in `script` come first, one a request. Counts what it got and answered."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, reply=sensible):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.script, self.usage = reply, [], (10, 5)
        self.lock, self.release = threading.Lock(), threading.Event()
        self.bodies, self.headers, self.arrivals = [], [], []
        self.answered = self.busy = self.busiest = 0
        self.delay = 0.0
        self.hold_after = None  # answers, after which requests wait for `release` and then get none

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def completion(self, content, **choice):
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **choice}
        usage = self.usage and dict(zip(("prompt_tokens", "completion_tokens"), self.usage, strict=True))
        return json.dumps({"object": "chat.completion", "choices": [{"index": 0, **choice}], "usage": usage})

    def handle_error(self, request, client_address):
        """A client that timed out or was killed has gone: nothing to say."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply waits 40 ms for an acknowledgement

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault = server.script.pop(0) if server.script else None
            held = server.hold_after is not None and len(server.bodies) > server.hold_after
        try:
            self.respond(server, body, fault, held)
        finally:
            with server.lock:
                server.busy -= 1

    def respond(self, server, body, fault, held):
        if held or fault == "hang":
            server.release.wait(20)
            self.close_connection = True
            return
        if self.path != "/v1/chat/completions":
            fault = (404, {}, "no such page")
        server.release.wait(server.delay)
        if fault is None:
            fault = (200, {}, server.completion(server.reply(body)))
            with server.lock:
                server.answered += 1
        status, headers, text = fault
        self.send(status, headers, text.encode())

    def send(self, status, headers, content):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = "Content-Length" in headers  # a length that is wrong: end the connection

    def log_message(self, format, *args):
        """Say nothing on standard error."""


@contextmanager
def running(reply=sensible):
    """Run a server in a thread."""
    with ChatServer(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()
