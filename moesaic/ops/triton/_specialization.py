"""One way to compile a kernel, for the offline check of all kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specialization:
    """A kernel with the types of its arguments and the values of its constants.

    A file of kernels lists its own in a function ``specializations``; ``benchmarks/triton_compile.py`` compiles them.
    """

    name: str
    """Name in reports, such as "attention-decode-bf16"."""

    kernel: Any
    """The function with the decorator ``triton.jit``."""

    signature: dict[str, str]
    """The type of each argument: "*bf16", "i32" or "constexpr"."""

    constants: dict[str, Any]
    """The value of each constexpr."""

    warps: int
    stages: int = 2
    mma: bool = False
    """Whether matrix instructions are expected."""
