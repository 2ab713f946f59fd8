"""Two gateways on one database, three workers, each a machine of its own; and every line between them cut in turn."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.kill_workers import check_store, count_results
from tests.support.backend import answer
from tests.support.network import Network, network
from tests.support.postgres import Database, Server
from tests.support.sizes import sizes

SECONDS = 2.0
"""How long each line is cut: two leases. A database that was left in a transaction makes the others wait for 5 s."""


@pytest.fixture
def database() -> Iterator[Database]:
    server = Server()
    database = Database(server)
    yield database
    database.close()
    server.remove()


def reachable(server: Server, net: Network) -> None:
    """Have the database listen on the network as well."""
    with (server.folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {net.subnet} trust\n")
    with (server.folder / "data" / "postgresql.conf").open("a") as settings:
        settings.write(f"listen_addresses = '{net.store}'\n")
    server.stop("fast")
    server.start()


class Asker:
    """A client that knows both gateways, and asks the other when one does not answer."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str]) -> None:
        self.session, self.urls = session, urls
        self.numbers = itertools.count()
        self.right: collections.Counter[str] = collections.Counter()
        """Right answers, by gateway."""
        self.retries = 0
        self.wrong: list[str] = []
        self.stopped = False

    async def answered_by_all(self) -> None:
        """Wait until every gateway has answered once more."""
        before = self.right.copy()
        async with asyncio.timeout(60):
            while any(self.right[url] == before[url] for url in self.urls):
                await asyncio.sleep(0.05)

    async def work(self) -> None:
        while not self.stopped:
            await self._ask(next(self.numbers))

    async def _ask(self, number: int) -> None:
        count = 5 + number % 20
        body = {"model": "fake", "prompt": f"job {number}", "max_tokens": count, "seed": number}
        headers = {"idempotency-key": f"job-{number}"}
        timeouts = itertools.chain([1.0], itertools.repeat(10.0))  # a client that changes early finds its job running
        for url, seconds in zip(itertools.islice(itertools.cycle(self.urls), number % 2, None), timeouts, strict=False):
            timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=1)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self.session.post(
                    f"{url}/v1/completions", json=body, headers=headers, timeout=timeout
                ) as reply:
                    if reply.status == 200:
                        text = (await reply.json())["choices"][0]["text"]
                        if text == answer(f"job {number}", number, count):
                            self.right[url] += 1
                        else:
                            self.wrong.append(f"{number}: {text}")
                        return
                    if reply.status != 503:
                        self.wrong.append(f"{number}: {await reply.text()}")
                        return
            self.retries += 1
            await asyncio.sleep(0.1)


async def ask_during_cuts(net: Network, urls: list[str], step: int) -> Asker:
    addresses = net.addresses
    workers = [addresses[name] for name in ("w0", "w2", "w4")]
    gateways = [addresses["g1"], addresses["g2"]]
    cuts = [
        ("g1", [net.store]),
        ("g2", [net.store]),
        *((name, gateways) for name in ("w0", "w2", "w4")),
        ("g1", workers),
    ]
    async with aiohttp.ClientSession() as session:
        asker = Asker(session, urls)
        tasks = [asyncio.ensure_future(asker.work()) for _ in range(12)]
        await asker.answered_by_all()
        for name, others in cuts[::step]:
            with net.cut(name, others):
                await asyncio.sleep(SECONDS)
            await asker.answered_by_all()
        asker.stopped = True
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
    return asker


@pytest.mark.parametrize("step", sizes(3, 1))
def test_network_partitions_lose_and_repeat_nothing(database, tmp_path, step):
    with network("g1", "g2", "w0", "w2", "w4") as net, contextlib.ExitStack() as stack:
        reachable(database.server, net)
        store_address = f"postgresql://tests@{net.store}:{database.server.port}/{database.database}"
        urls = [f"http://{net.addresses[name]}:8000" for name in ("g1", "g2")]
        log = stack.enter_context((tmp_path / "gateways.log").open("ab"))

        def start(name: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
            process = subprocess.Popen([*net.on(name), sys.executable, "-m", *command], stderr=log, **options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        for name in ("g1", "g2"):
            flags = [
                "--jobs",
                store_address,
                "--host",
                net.addresses[name],
                "--port",
                "8000",
                "--lease",
                "1",
                "--model",
                "fake",
            ]
            start(name, "moesaic.cli", "gateway", *flags, "--insecure-no-auth", "--crashes", "50")
        for index, name in enumerate(("w0", "w2", "w4")):
            gateway_urls = ",".join(urls if index % 2 else urls[::-1])
            arguments = [gateway_urls, "4", "0.02", str(tmp_path / "log")]
            pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            fork_server = start(name, "benchmarks.worker_forkserver", *arguments, **pipe)
            assert fork_server.stdin and fork_server.stdout
            stack.callback(fork_server.stdout.close)
            stack.callback(fork_server.stdin.close)
            fork_server.stdin.write(name + "\n")
            fork_server.stdin.flush()
            fork_server.stdout.readline()
        asker = asyncio.run(ask_during_cuts(net, urls, step))
        job_count, duplicate_count, _ = count_results(Path(tmp_path / "log"))
        log_text = (tmp_path / "gateways.log").read_text()
        integrity, open_jobs = asyncio.run(check_store(database.server.address(database.database)))
    assert not asker.wrong and asker.right.total() > 20 and asker.retries > 0, asker.wrong[:3]
    assert (duplicate_count, integrity, open_jobs) == (0, "ok", {}), job_count
    assert "periodic task failed" not in log_text and '"trace"' not in log_text
