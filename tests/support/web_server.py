"""A server for tests of the page: it delivers the page with its headers, and sends scripted answers.

It replaces Moesaic's server and implements only what the page needs.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEB = Path(__file__).parents[2] / "moesaic/serve/web"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
PROMPT_TOKENS = 10
MODELS = [
    {"id": "tiny", "object": "model", "max_model_len": 4096, "state": "loaded", "task": "chat"},
    {"id": "large", "object": "model", "max_model_len": None, "state": "unloaded", "task": "chat"},
    {"id": "judge", "object": "model", "max_model_len": 512, "state": "loaded", "task": "classify"},
]


@dataclass(frozen=True)
class Answer:
    """The scripted answer to one request."""

    pieces: tuple[str, ...] = ()
    hold: int | None = None
    """Number of pieces after which the answer waits for ``Server.release``."""
    finish: str = "stop"
    fails: str | None = None
    """Error message to send after the pieces."""
    status: int = 200
    """Another status than 200 refuses the request, with the message ``fails``."""
    retry_after: int | None = None


def says(*pieces: str, hold: int | None = None, finish: str = "stop") -> Answer:
    return Answer(pieces, hold, finish)


@dataclass
class Server:
    """A running server: its scripted answers and the requests it received."""

    url: str = ""
    key: str | None = None
    """The required API key; None if none is required."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    answers: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each answer that the page cancelled."""
    released: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def will_say(self, *answers: Answer) -> None:
        for answer in answers:
            self.answers.put(answer)

    def release(self) -> None:
        self.released.release()

    @property
    def last(self) -> dict[str, Any]:
        return self.requests[-1]


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    script: Server  # set by serving()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._allowed():
                self._json(200, {"object": "list", "data": MODELS})
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/web/")
        files = {path.relative_to(WEB).as_posix(): path for path in WEB.rglob("*.*")}
        if name in files:
            kind = TYPES[files[name].suffix]
            self._send(200, files[name].read_bytes(), kind + ("; charset=utf-8" if kind != "image/svg+xml" else ""))
        else:
            self._json(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.script.requests.append(body)
        try:
            answer = self.script.answers.get_nowait()
        except queue.Empty:
            answer = says("You said: ", body["messages"][-1]["content"])
        if answer.status != 200:
            retry = {} if answer.retry_after is None else {"Retry-After": str(answer.retry_after)}
            self._json(answer.status, {"error": {"message": answer.fails}}, retry)
            return
        try:
            self._stream(answer)
        except OSError:
            self.script.cancelled.release()

    def _allowed(self) -> bool:
        if self.script.key is None or self.headers["Authorization"] == f"Bearer {self.script.key}":
            return True
        self._json(401, {"error": {"message": "This server asks for an API key."}})
        return False

    def _stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for count, piece in enumerate(answer.pieces):
            if count == answer.hold:
                self._hold()
            self._event(self._chunk({"content": piece}, None) | {"usage": self._usage(count + 1)})
        if answer.hold == len(answer.pieces):
            self._hold()
        if answer.fails is not None:
            self._event({"error": {"message": answer.fails}})
            return
        self._event(self._chunk({}, answer.finish))
        self._event({"choices": [], "usage": self._usage(len(answer.pieces))})
        self.wfile.write(b"data: [DONE]\n\n")

    def _hold(self) -> None:
        """Wait for the test. The comments detect a page that has closed the connection."""
        while not self.script.released.acquire(timeout=0.02):
            self.wfile.write(b": still here\n\n")

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    @staticmethod
    def _chunk(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    @staticmethod
    def _usage(tokens: int) -> dict[str, int]:
        return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # browsers keep idle connections open

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # browsers may close connections at any time


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port."""
    script = Server()
    with Listener(("127.0.0.1", 0), type("ScriptedHandler", (Handler,), {"script": script})) as listener:
        script.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield script
        finally:
            listener.shutdown()
            thread.join()


if __name__ == "__main__":  # to look at the page: python -m tests.support.web_server
    with serving() as running:
        print(running.url, flush=True)
        threading.Event().wait()
