"""The ops on NVIDIA GPUs, as Triton kernels: one private file for each kind of op.

Triton is imported when the first op is called, so this module can be imported without it. A kernel reads the lengths
of sequences from device memory, and no op waits for the device.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from moesaic import registry
from moesaic.ops import FormatName

PLAIN = ("float32", "bfloat16", "float16")
FILES = {
    "linear": "_linear",
    "experts": "_experts",
    "attention": "_attention",
    "embedding": "_pointwise",
    "route": "_pointwise",
    "rms_norm": "_pointwise",
    "rotary": "_pointwise",
    "rope": "_pointwise",
    "swiglu": "_pointwise",
    "add": "_pointwise",
    "finite": "_sampling",
    "argmax": "_sampling",
    "truncate": "_sampling",
    "draw": "_sampling",
}
"""The file of each op."""


def why_not(op: str, device: str, weight_format: FormatName) -> str | None:
    """Return the reason why this backend cannot run ``op`` with these arguments; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'moesaic[gpu]'"
    if device != "cuda":
        return "it runs on NVIDIA GPUs only"
    if op not in FILES:
        return f"it has no kernel for {op}"
    readable = PLAIN if op == "embedding" else registry.names("ops/triton/tiles")
    names = weight_format if isinstance(weight_format, tuple) else (weight_format,)
    if unread := [name for name in names if name is not None and name.partition(":")[0] not in readable]:
        return f"it does not read {', '.join(unread)}"
    return None


def record(device: torch.device, compute: Callable[[], object]) -> None:
    """Return None: this backend records nothing."""


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{FILES[name]}"), name)
