"""Several hosts on one machine: network namespaces on a bridge, whose links can be cut. Needs Linux and root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.support.require import require_program


def _ip(*command: str) -> bool:
    return subprocess.run(["ip", *command], capture_output=True, check=False).returncode == 0


class Network:
    """Network of hosts, each with a name and an address."""

    def __init__(self, names: Sequence[str]) -> None:
        self._prefix = f"m{os.getpid() % 100000}"
        self._bridge = f"{self._prefix}b"
        high, low = divmod(os.getpid(), 256)
        part = f"198.{18 + high % 2}.{low}"  # of RFC 2544; runs at the same time have different ones
        self.subnet = f"{part}.0/24"
        self.here = f"{part}.1"
        """Address of this process."""
        self.store = f"{part}.2"
        """Address of the database. Hosts can lose it while clients still reach them."""
        self.addresses = {name: f"{part}.{10 + index}" for index, name in enumerate(names)}

    def make(self) -> bool:
        """Create the network; return whether that was possible."""
        if os.geteuid() != 0 or not shutil.which("ip"):
            return False
        bridge = self._bridge
        done = _ip("link", "add", bridge, "type", "bridge") and _ip("link", "set", bridge, "up")
        done = done and all(_ip("addr", "add", f"{address}/24", "dev", bridge) for address in (self.here, self.store))
        return done and all(self._join(index, name) for index, name in enumerate(self.addresses))

    def _join(self, index: int, name: str) -> bool:
        space, near, far = self._space(name), f"{self._prefix}n{index}", f"{self._prefix}f{index}"
        return (
            _ip("netns", "add", space)
            and _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
            and _ip("link", "set", near, "master", self._bridge, "up")
            and _ip("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", far)
            and _ip("-n", space, "link", "set", far, "up")
            and _ip("-n", space, "link", "set", "lo", "up")
        )

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def on(self, name: str) -> list[str]:
        """Return the command prefix that runs a program on a host."""
        return ["ip", "netns", "exec", self._space(name)]

    @contextmanager
    def cut(self, name: str, others: Sequence[str]) -> Iterator[None]:
        """Drop all packets from a host to these addresses, without an error."""
        for address in others:
            assert _ip("-n", self._space(name), "route", "add", "blackhole", f"{address}/32")
        yield
        for address in others:
            assert _ip("-n", self._space(name), "route", "del", "blackhole", f"{address}/32")

    def remove(self) -> None:
        for name in self.addresses:
            _ip("netns", "del", self._space(name))
        _ip("link", "del", self._bridge)


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Create hosts with these names; skip the test if that is not possible."""
    hosts = Network(names)
    if sys.platform == "linux":
        require_program("ip")
    try:
        if not hosts.make():
            pytest.skip("network namespaces need Linux and root")
        yield hosts
    finally:
        hosts.remove()
