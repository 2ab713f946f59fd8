"""The machine that this process runs on: its free memory, and its speeds as measured or as the data sheet has them."""

from __future__ import annotations

import torch

from moesaic import memory
from moesaic.errors import InvalidParameter
from moesaic.hardware import CARDS, Card, Host, Machine, limits
from moesaic.ops import native

NAME = "this machine"
MEASURED_GB = 0.25
"""Gigabytes that are read to measure the bandwidth; several times what caches of most processors hold."""
UNKNOWN_CARD = (500.0, 100.0)
"""Bandwidth in GB/s and 10^12 operations per second that are assumed for a card that is not in the table."""


def describe(device: str = "cpu") -> Machine:
    """Return this machine as it is now; on the CPU its speeds are measured, which takes about half a second.

    Args:
        device: type of the device that the model is loaded to: cpu or cuda.

    Raises:
        InvalidParameter: torch cannot use the device.
    """
    if torch.device(device).type != "cuda":
        return Machine(NAME, host=_measured_host())
    if not torch.cuda.is_available():
        raise InvalidParameter("device", f"is {device!r}, but torch sees no such device here")
    return Machine(NAME, _card(torch.device(device)), torch.cuda.device_count(), Host(memory.available()))


def _measured_host() -> Host:
    available = memory.available()
    if native.why_not("linear", "cpu", "int8") is not None:  # without the compiled kernels, nothing can be measured
        return Host(available)
    found = limits.measure(MEASURED_GB, runs=2)
    return Host(
        available,
        found.read_gb_s,
        found.int8_gop_s,
        found.bf16_gop_s,
        native.instruction_set(),
        measured=True,
    )


def _card(device: torch.device) -> Card:
    """Return the card in the table whose name torch reports, or one with assumed speeds, with its free memory."""
    name = torch.cuda.get_device_name(device)
    mebibytes = torch.cuda.mem_get_info(device)[0] >> 20
    plain = name.lower().replace(" ", "").replace("-", "")
    known = next(
        (card for card in CARDS if any(alias.lower().replace(" ", "") in plain for alias in card.aliases)), None
    )
    if known is None:
        bandwidth, operations = UNKNOWN_CARD
        return Card(name, mebibytes, bandwidth, operations, 2 * operations, 32)
    return Card(name, mebibytes, known.read_gb_s, known.bf16_top_s, known.int8_top_s, known.link_gb_s, known.aliases)
