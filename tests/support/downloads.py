"""A local server for downloads, which counts the bytes, can misbehave, and can have the routes of a hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

COMMIT = "c" * 40
"""The only commit of each repository."""


class Server(ThreadingHTTPServer):
    """HTTP server with ``body`` at /m.tar; ``ranges``, ``etag``, ``cut`` and ``headers`` control its behaviour."""

    daemon_threads = True

    def __init__(self, body: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/m.tar"
        self.body = body
        self.etag: str | None = '"one"'
        self.ranges, self.cut, self.sent = True, None, 0
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.routes: dict[str, tuple[int, Mapping[str, str], bytes]] = {}

    def add_repository(self, name: str, files: Mapping[str, bytes]) -> None:
        """Serve a repository of the hub with these files."""
        siblings = [{"rfilename": file} for file in files]
        repository = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        oids = {file: hashlib.sha1(data).hexdigest() for file, data in files.items()}
        tree = [{"type": "file", "path": f, "size": len(data), "oid": oids[f]} for f, data in files.items()]
        self.routes[f"/api/models/{name}"] = (200, {}, repository)
        for revision in ("main", COMMIT):
            self.routes[f"/api/models/{name}/revision/{revision}"] = (200, {}, repository)
            self.routes[f"/api/models/{name}/tree/{revision}"] = (200, {}, json.dumps(tree).encode())
            for file, data in files.items():
                headers = {"ETag": f'"{oids[file]}"', "X-Repo-Commit": COMMIT}
                self.routes[f"/{name}/resolve/{revision}/{file}"] = (200, headers, data)
                self.routes[f"/{name}/resolve/{revision}/{quote(file, safe='')}"] = (200, headers, data)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        server.requests.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path in server.routes:
            self.answer(*server.routes[path])
        elif path != "/m.tar":
            self.answer(404, {}, b"")
        else:
            self.archive(server)

    def archive(self, server):
        span, body, headers, code = self.headers.get("Range"), server.body, dict(server.headers), 200
        if server.etag:
            headers["ETag"] = server.etag
        start = 0
        if span and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start = int(span.removeprefix("bytes=").partition("-")[0])
            if start >= len(body):
                self.answer(416, {"Content-Range": f"bytes */{len(body)}", **headers}, b"")
                return
            code, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(code, headers, body[start:], server.cut)

    def answer(self, code, headers, body, cut=None):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.server.sent += len(body[:cut])


@contextmanager
def downloads(body: bytes = b"") -> Iterator[Server]:
    """Run a server with ``body`` at /m.tar."""
    with Server(body) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def use_as_hub(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's library ask ``server``, and keep what it downloads in ``cache``."""
    from huggingface_hub import constants

    url = server.url.removesuffix("/m.tar")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
