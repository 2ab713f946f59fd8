"""The chat page with a real gateway that restarts, in a real browser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backend import FakeBackend, answer
from tests.support.browser import Chat, Open
from tests.support.cluster import SLOW, Cluster, WorkerHandle, running_cluster
from tests.support.wait import eventually


class Here:
    """A gateway with a worker; a restart keeps the address."""

    def __init__(self, where: Path) -> None:
        self._where, self._stack = where, contextlib.ExitStack()
        self.port = 0
        self.start()

    def start(self) -> None:
        self.cluster: Cluster = self._stack.enter_context(
            running_cluster(self._where, models=["fake"], lease=1.0, port=self.port)
        )
        self.port, self.url = self.cluster.port, self.cluster.url
        self.handle: WorkerHandle = self.cluster.start_worker(FakeBackend(seconds=SLOW / 5))

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Here]:
    found = Here(tmp_path / "jobs.sqlite")
    yield found
    found.stop()


def begun(chat: Chat, characters: int) -> None:
    """Wait until the answer is longer than this number of characters."""
    eventually(lambda: len(chat.said) == 2 and len(chat.said[1]) > characters)


def test_answer_resumes_after_a_gateway_restart(open_chat: Open, server: Here) -> None:
    chat = open_chat()
    chat.send("Tell a long story.")
    begun(chat, 40)
    server.stop()
    server.start()
    chat.finished()
    (asked,) = server.handle.backend.requests
    assert len(asked.resume[0]) > 0, "it was begun anew"
    whole = answer("Tell a long story.", asked.sampling["seed"], asked.sampling["max_tokens"])
    assert chat.said[1] == whole.strip()


def test_stop_cancels_the_job(open_chat: Open, server: Here) -> None:
    chat = open_chat()
    chat.send("Tell a long story.")
    begun(chat, 9)
    chat.button("Stop").click()
    chat.wait_for("Stopped before the end.")
    eventually(lambda: server.cluster.depths() == (0, 0))
