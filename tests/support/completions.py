"""Client of /v1/completions: request bodies, and replies that are read whole or as a stream."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.support.backend import SEED


def body(prompt: str = "Hi", count: int = 16, seed: int = SEED, **more: Any) -> dict[str, Any]:
    """Return the body of a request to /v1/completions."""
    return {"model": "fake", "prompt": prompt, "max_tokens": count, "seed": seed, **more}


def ask(
    client: httpx.Client, prompt: str = "Hi", count: int = 16, idempotency_key: str = "", **more: Any
) -> httpx.Response:
    headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
    return client.post("/v1/completions", json=body(prompt, count, **more), headers=headers)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def frames(lines: Iterator[str]) -> Iterator[Any]:
    """Yield the JSON value of each event of a stream, and None for ``[DONE]``."""
    for line in lines:
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line[6:])


class Stream(threading.Thread):
    """Thread that reads a streamed reply."""

    def __init__(
        self, client: httpx.Client, prompt: str = "Hi", count: int = 16, idempotency_key: str = "", **more: Any
    ) -> None:
        super().__init__(daemon=True)
        self._client, self._body = client, body(prompt, count, stream=True, **more)
        self._headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        self.pieces: list[str] = []
        self.status = 0
        self.headers: httpx.Headers = httpx.Headers()
        self.error: dict[str, Any] | None = None
        self.done = False
        """Whether the stream ended with ``[DONE]``."""
        self.broken: Exception | None = None
        self._disconnecting = False
        self.start()

    def run(self) -> None:
        try:
            with self._client.stream("POST", "/v1/completions", json=self._body, headers=self._headers) as reply:
                self.headers, self.status = reply.headers, reply.status_code
                if self.status != 200:
                    self.error = json.loads(reply.read())["error"]
                    return
                for frame in frames(reply.iter_lines()):
                    if self._disconnecting:
                        return
                    self._read_frame(frame)
        except httpx.HTTPError as error:
            self.broken = error

    def _read_frame(self, frame: Any) -> None:
        if frame is None:
            self.done = True
        elif "error" in frame:
            self.error = frame["error"]
        else:
            self.pieces += [choice["text"] for choice in frame["choices"] if choice["text"]]

    @property
    def job(self) -> str:
        return str(self.headers["x-moesaic-job"])

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def disconnect(self) -> None:
        """Disconnect at the next piece."""
        self._disconnecting = True

    def end(self, seconds: float = 60) -> Stream:
        self.join(seconds)
        assert not self.is_alive(), f"the stream has not ended after {len(self.pieces)} pieces"
        return self


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call ``work`` with 0 to ``count`` - 1 in threads of their own; return the results or the exceptions."""
    results: list[Any] = [None] * count

    def call(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
