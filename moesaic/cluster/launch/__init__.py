"""Launchers, which start workers on many machines. Each file in this folder is one launcher.

A launcher's file defines

* ``files(plan: Plan) -> Mapping[str, str]``: returns the contents of the files to write, by name; empty if the launcher
  starts the workers itself;
* ``run(plan: Plan) -> int``: starts and supervises the workers until it is stopped, and returns the exit code of the
  command; required if ``files`` returns nothing.

Requests do not pass through a launcher: workers connect to their gateway. A launcher does not depend on the meaning of
a worker's flags, except for those that it sets itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from moesaic import registry
from moesaic.errors import InvalidRequest

FOLDER = "cluster/launch"
REFUSED = 2
"""Exit code of a worker that must not be restarted: its flags or its key are wrong, or it was banned."""
LOST_ENGINE = 70
"""Exit code of a worker whose engine has failed and that must be restarted (EX_SOFTWARE)."""


@dataclass(frozen=True)
class Plan:
    """What a launcher must start: the workers' number, resources and flags.

    Raises:
        InvalidRequest: the plan is invalid.
    """

    worker: tuple[str, ...]
    """The flags of ``moesaic worker`` for each worker."""
    replicas: int = 1
    """Number of workers."""
    cpus: float | None = None
    """Number of CPUs of each replica; None selects the launcher's default."""
    gpus: int = 0
    """Number of GPUs of each replica."""
    program: str = "moesaic"
    """Path or name of the ``moesaic`` command, for the files that the launcher writes."""
    address: str | None = None
    """Address of the cluster manager, such as Ray, if the launcher needs one."""
    drain_seconds: float = 30.0
    """Seconds in which a stopped worker can finish its jobs."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.gpus < 0 or (self.cpus is not None and not self.cpus > 0):
            raise InvalidRequest("--replicas and --cpus must be greater than 0, and --gpus must not be negative")
        if value(self.worker, "--gateway") is None:
            raise InvalidRequest("--gateway is missing: `moesaic launch ... --worker --gateway URL`")
        if value(self.worker, "--key") is not None:
            raise InvalidRequest("--key would be publicly readable: write the key to a file and pass --key-file")
        if value(self.worker, "--name") is not None:
            raise InvalidRequest("leave out --name: each replica gets its own name")
        if any(not word.isprintable() for word in self.worker):
            raise InvalidRequest("a worker's flags must not contain line breaks or control characters")


def names() -> list[str]:
    """Return the names of all launchers."""
    return registry.names(FOLDER)


def load(name: str) -> ModuleType:
    """Return the module of the launcher with this name.

    Raises:
        NotFound: there is no launcher of that name.
    """
    return registry.load(FOLDER, name)


def value(flags: Sequence[str], name: str) -> str | None:
    """Return the last value of the flag ``name``, as ``NAME VALUE`` or ``NAME=VALUE``; None if the flag is missing."""
    last = None
    for index, word in enumerate(flags):
        if word.startswith(f"{name}="):
            last = word.partition("=")[2]
        elif word == name:
            last = flags[index + 1] if index + 1 < len(flags) else ""
    return last


def without(flags: Sequence[str], name: str) -> list[str]:
    """Return the flags without the flag ``name`` and its values."""
    out: list[str] = []
    skip = False
    for word in flags:
        if not skip and word != name and not word.startswith(f"{name}="):
            out.append(word)
        skip = not skip and word == name
    return out
