"""Chooses the backend that runs an op, and checks the dtypes and devices of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from moesaic import registry
from moesaic.errors import InvalidParameter

FormatName = str | tuple[str, str, str] | None
"""Name of the format of an op's weight, or None for an op without one.

For ``experts`` with different formats, it has the names of those of gate, up and down."""

OPS = (
    "linear",
    "embedding",
    "route",
    "experts",
    "attention",
    "rms_norm",
    "rotary",
    "rope",
    "swiglu",
    "add",
    "finite",
    "argmax",
    "truncate",
    "draw",
    "quantize",
    "quantize_with_feedback",
    "store_codes",
)


@functools.cache
def backends() -> tuple[str, ...]:
    """Return the backends in the order in which they are tried: by name, ``reference`` last."""
    return tuple(sorted(registry.names("ops"), key=lambda name: (name == "reference", name)))


def explain(op: str, device: str, weight_format: FormatName) -> dict[str, str | None]:
    """Return, for each backend in the order of ``backends``, why it cannot run ``op``; None if it can.

    ``device`` is a device type such as "cpu"; ``weight_format`` is as for ``why_not``.
    """
    return {name: registry.load("ops", name).why_not(op, device, weight_format) for name in backends()}


def chosen(op: str, device: str, weight_format: FormatName) -> str:
    """Return the name of the backend that runs ``op`` if no gradient is needed; arguments as for ``explain``."""
    return next(name for name, why in explain(op, device, weight_format).items() if why is None)


@functools.cache
def pick(op: str, device: torch.device, weight_format: FormatName, trained: bool) -> Callable[..., Any]:
    """Return the function of the first backend that can run ``op``; with ``trained``, a gradient is needed."""
    name = "reference" if trained else chosen(op, device.type, weight_format)  # only the reference is differentiable
    return cast(Callable[..., Any], getattr(registry.load("ops", name), op))


ARGUMENTS = {
    "linear": ("x", "weight"),
    "route": ("x", "weight"),
    "attention": ("q", "k", "v", "batch"),
    "rms_norm": ("x", "weight"),
    "rotary": ("frequencies", "positions"),
    "rope": ("x", "cos", "sin"),
    "swiglu": ("gate", "up"),
    "add": ("x", "y"),
    "finite": ("x",),
    "argmax": ("x",),
    "truncate": ("logits", "settings"),
    "draw": ("logits", "numbers"),
}
"""Names of the arguments whose devices ``pick_checked`` compares."""


@functools.cache
def pick_checked(
    op: str, weight_format: str | None, trained: bool, dtype: torch.dtype, device: torch.device, *others: torch.device
) -> Callable[..., Any]:
    """Return the function that runs ``op``, after checking the first argument's dtype and the devices of all.

    ``dtype`` and ``device`` are those of the first argument, ``others`` the devices of the others in ``ARGUMENTS``.
    """
    first, *names = ARGUMENTS[op]
    if not dtype.is_floating_point:
        raise InvalidParameter(first, f"is {dtype}, expected a floating-point dtype")
    for name, other in zip(names, others, strict=True):
        if other != device:
            raise InvalidParameter(name, f"is on {other}, but {first} is on {device}")
    return pick(op, device, weight_format, trained)


@functools.cache
def pick_experts(
    weight_format: FormatName,
    trained: bool,
    device: torch.device,
    dtype: torch.dtype,
    scores: torch.dtype,
    ids: torch.dtype,
    *devices: torch.device,
) -> Callable[..., Any]:
    """Return the function that runs ``experts``, after checking the devices and dtypes of its arguments."""
    if not dtype.is_floating_point:
        raise InvalidParameter("x", f"is {dtype}, expected a floating-point dtype")
    if not scores.is_floating_point:
        raise InvalidParameter("scores", f"is {scores}, expected a floating-point dtype")
    if ids != torch.int64:
        raise InvalidParameter("ids", f"is {ids}, expected torch.int64")
    for name, other in zip(("gate", "up", "down", "ids", "scores"), devices, strict=True):
        if other != device:
            raise InvalidParameter(name, f"is on {other}, but x is on {device}")
    return pick("experts", device, weight_format, trained)
