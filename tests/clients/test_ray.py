"""Ray as what starts workers: two nodes, workers with the model tales, and both kinds of process killed at work."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.client import environment
from tests.support.managed_cluster import ManagedCluster, running_cluster
from tests.support.wait import eventually

pytestmark = pytest.mark.clients
ROOT = Path(__file__).parents[2]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
JOBS = 24
TOKENS = 400
PATIENCE = 180.0


@pytest.fixture(scope="module")
def python() -> Path:
    """A Python with Ray, that finds Moesaic and what it needs where the tests find it."""
    try:
        made = environment("ray", "ray==2.60.0")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Ray cannot be installed here: {error}")
    [packages] = (made.parent.parent / "lib").glob("python*/site-packages")
    (packages / "moesaic.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return made


@dataclass
class Ray:
    """A cluster on this machine."""

    python: Path
    folder: Path
    port: int
    environment: dict[str, str]
    nodes: list[subprocess.Popen[bytes]]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *flags: str) -> int:
        """Start a node that has two CPUs to give; return its process number when it is there."""
        command = [str(self.python.with_name("ray")), "start", "--block", "--num-cpus", "2", "--disable-usage-stats"]
        command += ["--node-ip-address", "127.0.0.1", "--object-store-memory", "80000000", *flags]
        with (self.folder / f"node-{len(self.nodes)}").open("wb+") as log:
            node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        text = Path(log.name)
        eventually(lambda: node.poll() is not None or "Ray runtime started" in text.read_text(), PATIENCE)
        assert node.poll() is None, text.read_text()[-3000:]
        return node.pid

    def close(self) -> None:
        for node in reversed(self.nodes):
            for process in [node.pid, *children(node.pid)]:
                kill(process)
            node.wait(30)
        for each in Path("/proc").glob("[0-9]*"):  # what the nodes' deaths have left without parents
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (each / "cmdline").read_bytes():
                    kill(int(each.name))


@contextlib.contextmanager
def ray_cluster(python: Path, **more: str) -> Iterator[Ray]:
    folder = Path(tempfile.mkdtemp(prefix="r"))  # a socket's path must be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    ray = Ray(python, folder, port, kept | more, [])
    try:
        ray.start("--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", str(folder))
        yield ray
    finally:
        ray.close()
        shutil.rmtree(folder, ignore_errors=True)


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def children(process: int) -> list[int]:
    """Return all that a process has started, and what that has, and so on."""
    found = []
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                found += [child, *children(child)]
    return found


def workers(node: int) -> list[int]:
    """Return the worker processes of a node."""
    found = []
    for process in children(node):
        with contextlib.suppress(OSError):
            if b"moesaic.cli\0worker" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


@contextlib.contextmanager
def launched(ray: Ray, cluster: ManagedCluster, log: Path, replicas: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``moesaic launch ray`` for workers of a gateway."""
    key = cluster.key_file.with_name("worker.key")
    key.write_text(cluster.key_texts["rack"])
    command = [str(ray.python), "-m", "moesaic.cli", "launch", "ray", "--replicas", str(replicas), "--cpus", "1"]
    command += ["--address", ray.address, "--worker", "tales", "--gateway", cluster.url]
    command += ["--key-file", str(key), "--slots", "4"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=ray.environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def ask(cluster: ManagedCluster, number: int, model: str) -> int:
    """Ask and return how long the answer is."""
    body = {
        "model": model,
        "prompt": f"Once upon a time {number}",
        "max_tokens": TOKENS,
        "seed": number,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer {cluster.key_texts['anna']}"}
    answer = httpx.post(cluster.url + "/v1/completions", json=body, headers=headers, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def test_lost_workers_and_lost_nodes_are_made_up_for(python: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    log = tmp_path / "launch.log"
    with (
        running_cluster(tmp_path, lease=5.0, crashes=9) as cluster,
        ray_cluster(python, **TOKEN) as ray,
        ThreadPoolExecutor(JOBS) as pool,
    ):
        head = ray.nodes[0].pid
        second = ray.start("--address", ray.address)
        with launched(ray, cluster, log, 3) as launcher:
            eventually(lambda: len(cluster.gateway.workers.sessions) == 3 or launcher.poll() is not None, PATIENCE)
            assert launcher.poll() is None, log.read_text()[-4000:]
            assert len(workers(head) + workers(second)) == 3 and len(workers(second)) in (1, 2)

            [model] = {name for each in cluster.gateway.workers.sessions.values() for name in each.models}
            first = pool.map(lambda number: ask(cluster, number, model), range(JOBS))
            eventually(lambda: any(each.leases for each in cluster.gateway.workers.sessions.values()))
            before = set(cluster.gateway.workers.sessions)
            kill(workers(second)[0])  # one worker, at work
            assert list(first) == [TOKENS] * JOBS
            eventually(
                lambda: len(cluster.gateway.workers.sessions) == 3 and set(cluster.gateway.workers.sessions) != before,
                PATIENCE,
            )

            again = pool.map(lambda number: ask(cluster, number, model), range(JOBS))
            eventually(lambda: sum(bool(each.leases) for each in cluster.gateway.workers.sessions.values()) == 3)
            held = cluster.gateway.leases.expired
            lost = [second, *children(second)]
            for process in lost:
                kill(process)
            assert list(again) == [TOKENS] * JOBS  # also those that were half done
            assert cluster.gateway.leases.expired > held
            # Two replicas have room on what is left: the third waits for a node, which comes.
            eventually(lambda: len(cluster.gateway.workers.sessions) == 2 and len(workers(head)) == 2, PATIENCE)
            third = ray.start("--address", ray.address)
            eventually(lambda: len(cluster.gateway.workers.sessions) == 3 and len(workers(third)) == 1, PATIENCE)

            launcher.terminate()
            assert launcher.wait(60) == 0, log.read_text()[-4000:]
            eventually(lambda: not workers(head) and not workers(third))
            assert cluster.gateway.workers.sessions == {} and cluster.gateway.leases.dead == 0


def test_workers_end_with_whoever_started_them(python: Path, tmp_path: Path) -> None:
    with running_cluster(tmp_path, lease=5.0) as cluster, ray_cluster(python, **TOKEN) as ray:
        with launched(ray, cluster, tmp_path / "log", 1) as launcher:
            eventually(lambda: cluster.gateway.workers.sessions or launcher.poll() is not None, PATIENCE)
            assert launcher.poll() is None, (tmp_path / "log").read_text()[-4000:]
        eventually(
            lambda: not cluster.gateway.workers.sessions and not workers(ray.nodes[0].pid), PATIENCE
        )  # it was killed


def test_a_refused_worker_is_not_tried_again(python: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_cluster(tmp_path, lease=5.0) as cluster, ray_cluster(python, **TOKEN) as ray:
        cluster.key_texts["rack"] = "msc-wrong"
        with launched(ray, cluster, log, 1) as launcher:
            assert launcher.wait(PATIENCE) == 2
        assert "was refused" in log.read_text()


def refused(python: Path, *flags: str, **environment: Any) -> str:
    command = [str(python), "-m", "moesaic.cli", "launch", "ray", *flags, "--worker", "--gateway", "http://127.0.0.1:1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_others_reach_no_cluster_without_a_token(python: Path, tmp_path: Path) -> None:
    with (
        running_cluster(tmp_path) as cluster,
        ray_cluster(python) as ray,
        launched(ray, cluster, tmp_path / "log", 1) as launcher,
    ):
        # Ray's nodes listen on the machine's own address, whatever they are told of 127.0.0.1.
        assert launcher.wait(PATIENCE) == 2
        assert "can reach Ray at" in (tmp_path / "log").read_text() and not cluster.gateway.workers.sessions
    path = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    assert "RAY_AUTH_MODE=token" in refused(python, "--address", "192.0.2.1:6379", **path)
    assert "host:port" in refused(python, "--address", "ray://127.0.0.1:10001", **path)
    assert "no Ray cluster is reachable" in refused(python, "--address", "127.0.0.1:9", **path)
