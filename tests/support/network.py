"""Machines on one machine: network namespaces on a bridge, and what is cut between them. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.support.require import require_program


def _do(*command: str) -> bool:
    return subprocess.run(["ip", *command], capture_output=True, check=False).returncode == 0


class Network:
    """Some machines, each with a name and an address."""

    def __init__(self, names: Sequence[str]) -> None:
        self._prefix = f"m{os.getpid() % 100000}"
        self._bridge = f"{self._prefix}b"
        high, low = divmod(os.getpid(), 256)
        part = f"198.{18 + high % 2}.{low}"  # RFC 2544; another run at the same time, or a killed one, has another
        self.subnet = f"{part}.0/24"
        self.here = f"{part}.1"
        """This process's address."""
        self.store = f"{part}.2"
        """The database's, so that it can be cut off from whoever may still talk to clients."""
        self.addresses = {name: f"{part}.{10 + place}" for place, name in enumerate(names)}

    def make(self) -> bool:
        """Make it; return whether that was possible."""
        if os.geteuid() != 0 or not shutil.which("ip"):
            return False
        bridge = self._bridge
        done = _do("link", "add", bridge, "type", "bridge") and _do("link", "set", bridge, "up")
        done = done and all(_do("addr", "add", f"{each}/24", "dev", bridge) for each in (self.here, self.store))
        return done and all(self._join(place, name) for place, name in enumerate(self.addresses))

    def _join(self, place: int, name: str) -> bool:
        space, near, far = self._space(name), f"{self._prefix}n{place}", f"{self._prefix}f{place}"
        return (
            _do("netns", "add", space)
            and _do("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
            and _do("link", "set", near, "master", self._bridge, "up")
            and _do("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", far)
            and _do("-n", space, "link", "set", far, "up")
            and _do("-n", space, "link", "set", "lo", "up")
        )

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def on(self, name: str) -> list[str]:
        """Return what stands before a command that is run on a machine."""
        return ["ip", "netns", "exec", self._space(name)]

    @contextmanager
    def cut(self, name: str, others: Sequence[str]) -> Iterator[None]:
        """Let nothing that a machine sends reach these addresses, silently."""
        for each in others:
            assert _do("-n", self._space(name), "route", "add", "blackhole", f"{each}/32")
        yield
        for each in others:
            assert _do("-n", self._space(name), "route", "del", "blackhole", f"{each}/32")

    def remove(self) -> None:
        for name in self.addresses:
            _do("netns", "del", self._space(name))
        _do("link", "del", self._bridge)


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Make machines; skip the test where that cannot be done."""
    made = Network(names)
    if sys.platform == "linux":
        require_program("ip")
    try:
        if not made.make():
            pytest.skip("network namespaces cannot be made here: this needs Linux, and root")
        yield made
    finally:
        made.remove()
