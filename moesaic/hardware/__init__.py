"""What a model runs on: graphics cards or processors, their memory, and how fast they read and multiply.

A machine is described in words, such as ``2xH100-80GB``, ``4xA6000``, ``1xRTX4090+64GB`` or ``cpu:64GB@200GB/s``, and
its figures are then those of data sheets. ``here`` measures this machine. The module does not know models.

GB are 10^9 bytes. GiB, in which cards are sold, are 2^30 bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesaic.errors import InvalidParameter
from moesaic.hardware.cards import CARDS, Card

__all__ = ["CARDS", "Card", "Host", "Machine", "parse"]

EXAMPLES = "2xH100-80GB, 4xA6000, 1xRTX4090+64GB, cpu:64GB@200GB/s"

DEFAULT_HOST_GB_S = 50.0
"""Memory bandwidth of a computer that nothing is said about: two channels of DDR5-4800 reach about two thirds of 77."""
HOST_GOP_PER_GB = 17.0
"""10^9 byte operations per second for each GB/s, if nothing is said about a processor; the machine that
docs/results/kernels.json was measured on has 17."""

_NUMBER = r"\d+(?:\.\d+)?"
_CARDS = re.compile(r"(?:(\d+)\s*x\s*)?([a-z0-9][a-z0-9 .-]*)", re.IGNORECASE)
_HOST = re.compile(rf"({_NUMBER})\s*(?:GB|G)(?:@({_NUMBER})\s*GB/s)?(?:@({_NUMBER})\s*(TOPS|GOPS))?", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    """A computer's processor and main memory.

    Attributes:
        memory_bytes: bytes of main memory that a model may take.
        read_gb_s: memory bandwidth, in GB/s.
        int8_gop_s: 10^9 operations on bytes per second; a multiplication and an addition are two.
        bf16_gop_s: 10^9 operations on bfloat16 numbers per second.
        instruction_set: instructions that the kernels use, such as avx2; None if it is unknown.
        measured: whether the speeds were measured; else they are assumed or those of a data sheet.
    """

    memory_bytes: int
    read_gb_s: float = DEFAULT_HOST_GB_S
    int8_gop_s: float = DEFAULT_HOST_GB_S * HOST_GOP_PER_GB
    bf16_gop_s: float = DEFAULT_HOST_GB_S * HOST_GOP_PER_GB
    instruction_set: str | None = None
    measured: bool = False


@dataclass(frozen=True)
class Machine:
    """A computer, with or without graphics cards.

    Attributes:
        name: text that describes the machine, as ``parse`` reads it; "this machine" for the one that was measured.
        card: the graphics card; None: the processor computes.
        cards: number of cards of that kind.
        host: processor and main memory; None if nothing is said about them, and no weights are placed there.
    """

    name: str
    card: Card | None = None
    cards: int = 0
    host: Host | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory that the model is computed from: that of all cards, or main memory."""
        if self.card is not None:
            return self.cards * self.card.memory_bytes
        return self.host.memory_bytes if self.host else 0


def parse(text: str) -> Machine:
    """Return the machine that ``text`` describes, with the figures of data sheets.

    Raises:
        InvalidParameter: the text has another form, or names an unknown card.
    """
    name = text.strip()
    if name.lower().startswith("cpu:"):
        return Machine(name, host=_host(name, name[4:]))
    graphics, plus, memory = name.partition("+")
    match = _CARDS.fullmatch(graphics.strip())
    if match is None or not 1 <= (count := int(match[1] or 1)) <= 1024:
        raise InvalidParameter("hardware", f"{text!r} is not understood; examples: {EXAMPLES}")
    return Machine(name, _card(match[2].strip()), count, _host(name, memory) if plus else None)


def _host(text: str, memory: str) -> Host:
    match = _HOST.fullmatch(memory.strip())
    if match is None:
        raise InvalidParameter("hardware", f"{text!r} is not understood; write memory as 64GB or 64GB@200GB/s")
    bandwidth = float(match[2] or DEFAULT_HOST_GB_S)
    operations = float(match[3]) * (1000 if match[4].upper() == "TOPS" else 1) if match[3] else None
    operations = operations or bandwidth * HOST_GOP_PER_GB
    if not bandwidth > 0 or not float(match[1]) > 0:
        raise InvalidParameter("hardware", f"{text!r} has no memory; write it as 64GB@200GB/s")
    return Host(int(float(match[1]) * 1e9), bandwidth, operations, operations)


def _card(text: str) -> Card:
    """Return the card with this name; case, spaces and hyphens do not count, and the memory may be left out."""
    wanted = _plain(text)
    for card in CARDS:
        if wanted in (_plain(card.name), *(_plain(alias) for alias in card.aliases)):
            return card
    raise InvalidParameter("hardware", f"{text!r} is unknown; known cards: {', '.join(card.name for card in CARDS)}")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower()).removeprefix("nvidia").removeprefix("rtx").removesuffix("b")
