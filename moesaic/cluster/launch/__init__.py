"""Ways to start workers on many machines: the folder is the registry, one file = one launcher.

A launcher's file has

* ``files(plan: Plan) -> Mapping[str, str]``: what it has written, by name; none if it starts the workers itself;
* ``run(plan: Plan) -> int``: start the workers and look after them until told to stop; only if it writes nothing.

A launcher is not on the way of requests: workers dial their gateway, whoever has started them. Knows plans. Does not
know what the flags of a worker mean, but those that it sets itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from moesaic import registry
from moesaic.errors import InvalidRequest

FOLDER = "cluster/launch"
REFUSED = 2
"""The exit code of a worker whose flags or key are wrong, or that was dismissed: starting it again changes nothing."""
LOST_ENGINE = 70
"""The exit code of a worker that cannot compute any more and wants to be started again (EX_SOFTWARE)."""


@dataclass(frozen=True)
class Plan:
    """What is to run.

    Raises:
        InvalidRequest: it cannot be.
    """

    worker: tuple[str, ...]
    """Flags of ``moesaic worker``."""
    replicas: int = 1
    cpus: float | None = None
    """Of each replica; None: as the launcher sees fit."""
    gpus: int = 0
    """Of each replica."""
    program: str = "moesaic"
    """The command, where files name it."""
    address: str | None = None
    """Of what is asked to run them, where that has one."""
    drain_seconds: float = 30.0
    """What a worker is given to end its jobs."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.gpus < 0 or (self.cpus is not None and not self.cpus > 0):
            raise InvalidRequest("--replicas and --cpus must be more than 0, --gpus not less")
        if value(self.worker, "--gateway") is None:
            raise InvalidRequest("which gateway? `moesaic launch ... --worker --gateway URL`")
        if value(self.worker, "--key") is not None:
            raise InvalidRequest("a key would stand in the open: put it into a file and give --key-file")
        if value(self.worker, "--name") is not None:
            raise InvalidRequest("leave out --name: replicas have names of their own")
        if any(not word.isprintable() for word in self.worker):
            raise InvalidRequest("flags of workers with line breaks or control characters cannot be written down")


def names() -> list[str]:
    """Return the launchers."""
    return registry.names(FOLDER)


def load(name: str) -> ModuleType:
    """Return a launcher.

    Raises:
        NotFound: there is none of that name.
    """
    return registry.load(FOLDER, name)


def value(flags: Sequence[str], name: str) -> str | None:
    """Return what a flag says the last time it is given, as ``--name VALUE`` or ``--name=VALUE``; None: it is not."""
    found = None
    for place, word in enumerate(flags):
        if word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word == name:
            found = flags[place + 1] if place + 1 < len(flags) else ""
    return found


def without(flags: Sequence[str], name: str) -> list[str]:
    """Return the flags but those of one name."""
    out: list[str] = []
    skip = False
    for word in flags:
        if not skip and word != name and not word.startswith(f"{name}="):
            out.append(word)
        skip = not skip and word == name
    return out
