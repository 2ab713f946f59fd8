"""Which engines are compared, in which formats, and in which Python interpreters, as the command line says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesaic import registry
from moesaic.errors import InvalidParameter

PEERS = "bench/peers"
"""The registry folder of the engines."""
FILE_FORMAT = "gguf"
"""Format of a row whose engine loads a given GGUF file as it is."""


def choose(only: str | None) -> list[tuple[str, str]]:
    """Parse the engines to compare, such as "moesaic:q4,vllm", into (engine, format) pairs; None: all pairs.

    An engine (a peer) has the name of its file in ``bench/peers``. Without ":format", all its formats are taken.

    Raises:
        NotFound: there is no such engine.
        InvalidParameter: the format after a colon is missing.
    """
    pairs = []
    for part in only.split(",") if only is not None else registry.names(PEERS):
        name, colon, weight_format = part.strip().partition(":")
        peer = registry.load(PEERS, name)
        if colon and not weight_format:
            raise InvalidParameter(
                "only", f"{part!r} has no format after the colon; formats of {name}: {', '.join(peer.FORMATS)}"
            )
        pairs += [(name, chosen) for chosen in ([weight_format] if weight_format else peer.FORMATS)]
    return pairs


def choose_for_file(only: str | None) -> list[tuple[str, str]]:
    """Return the engines that can load a GGUF file, each with ``FILE_FORMAT``.

    ``only`` names some of them, separated by commas; None: all.

    Raises:
        NotFound: there is no such engine.
        InvalidParameter: an engine does not read GGUF files.
    """
    able = [name for name in registry.names(PEERS) if registry.load(PEERS, name).READS_GGUF]
    names = [part.strip() for part in only.split(",")] if only is not None else able
    for name in names:
        registry.load(PEERS, name)
        if name not in able:
            raise InvalidParameter("only", f"{name!r} reads no GGUF files; engines that do: {', '.join(able)}")
    return [(name, FILE_FORMAT) for name in names]


def interpreters(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse arguments of the form "peer=path" into {engine: path of the Python interpreter that has it installed}.

    Raises:
        NotFound: there is no such engine.
        InvalidParameter: an argument has no path, or there is no file.
    """
    paths = {}
    for part in arguments:
        name, _, path = part.partition("=")
        registry.load(PEERS, name)
        if not Path(path).is_file():
            raise InvalidParameter("python", f"{part!r} does not name an interpreter: write PEER=FILE")
        paths[name] = Path(path).absolute()
    return paths
