"""The ops on the CPU, in C++: binds ``csrc/``, which knows no torch.

The library is built when the package is installed, and chooses at run time what the processor has:
AMX, AVX-512 with VNNI, AVX2, or plain C++. Activations that meet an integer format are rounded to
eight bits, with one scale for each token and 256 columns, see ``formats/_tiles.py``; those that meet
bfloat16 are rounded to it.

Not differentiable: where a gradient is wanted, the reference is asked.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.formats import Packed
from moesaic.ops import OPS, Batch

FORMATS = {"int8": 0, "int4": 1, "int4_64": 2, "int3": 3, "int2": 4, "bfloat16": 5}
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_TYPES = TYPES | {torch.int8: 3}


class _Arguments(ctypes.Structure):
    """A struct of csrc/kernels.h, filled field by field in its order."""

    op: ClassVar[str]


def _struct(op: str, *fields: tuple[str, Any]) -> type[_Arguments]:
    return type(op, (_Arguments,), {"op": op, "_fields_": fields})


_Linear = _struct(
    "linear",
    *(("format", c_int), ("type", c_int), ("tokens", c_int64), ("columns", c_int64), ("out", c_int64)),
    *((name, c_void_p) for name in ("x", "weight", "y")),
)
_Experts = _struct(
    "experts",
    *(("format", c_int), ("type", c_int)),
    *((name, c_int64) for name in ("tokens", "size", "inner", "experts", "choices")),
    *((name, c_void_p) for name in ("x", "gate", "up", "down", "ids", "scores", "y")),
)
_Attention = _struct(
    "attention",
    *(("type", c_int), ("cache_type", c_int)),
    *((name, c_int64) for name in ("tokens", "heads", "kv_heads", "size", "sequences", "block", "width", "window")),
    *(
        (name, c_void_p)
        for name in (
            "q",
            "k",
            "v",
            "keys",
            "values",
            "key_scales",
            "value_scales",
            "slots",
            "tables",
            "starts",
            "positions",
            "y",
        )
    ),
)
_Norm = _struct(
    "rms_norm",
    *(("type", c_int), ("tokens", c_int64), ("size", c_int64), ("eps", c_float)),
    *((name, c_void_p) for name in ("x", "weight", "y")),
)
_Rope = _struct(
    "rope",
    *(("type", c_int), ("tokens", c_int64), ("heads", c_int64), ("size", c_int64)),
    *((name, c_void_p) for name in ("x", "cos", "sin", "y")),
)
_Truncate = _struct(
    "truncate",
    *((name, c_int64) for name in ("rows", "vocabulary")),
    *((name, c_void_p) for name in ("logits", "settings", "y")),
)
_Draw = _struct(
    "draw",
    *((name, c_int64) for name in ("rows", "vocabulary")),
    *((name, c_void_p) for name in ("logits", "numbers", "ids")),
)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library, or None where there is none."""
    found = importlib.util.find_spec("moesaic.ops._native")  # wherever an editable install has put it
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    library.moesaic_isa.restype = ctypes.c_char_p
    library.moesaic_multiply.restype = library.moesaic_multiply_bf16.restype = c_int64
    for struct in (_Linear, _Experts, _Attention, _Norm, _Rope, _Truncate, _Draw):
        getattr(library, f"moesaic_{struct.op}").argtypes = [POINTER(struct)]
    set_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, library)
    return library


def set_threads(count: int, library: ctypes.CDLL | None = None) -> None:
    """Let ``count`` threads share the work, the caller's own among them; by default, as many as there are cores."""
    (library or _built()).moesaic_set_threads(max(1, min(count, 1024)))


def instruction_set() -> str:
    """Return which of the compiled instruction sets is in use."""
    return str(_built().moesaic_isa().decode())


def use_instruction_set(name: str) -> bool:
    """Use one of ``INSTRUCTION_SETS``; return whether this processor has it. For tests and comparisons."""
    return bool(_built().moesaic_set_isa(name.encode()))


def read_memory(memory: Tensor, streams: int, ahead: int) -> None:
    """Read all of ``memory`` once with all threads, to see how fast it goes; see csrc/measure.h."""
    _built().moesaic_read(c_void_p(_at(memory)), c_int64(memory.nbytes), streams, ahead)


def multiply(rounds: int) -> int:
    """Multiply and add bytes in registers with all threads, and return how many operations that was."""
    return int(_built().moesaic_multiply(c_int64(rounds)))


def multiply_bf16(rounds: int) -> int:
    """Do the same with bfloat16 numbers."""
    return int(_built().moesaic_multiply_bf16(c_int64(rounds)))


def huge_pages(memory: Tensor) -> None:
    """Ask the system to hold ``memory`` in pages of 2 MiB, where it has a choice: fewer misses in the TLB."""
    page = 2 << 20
    begin, end = -(-_at(memory) // page) * page, (_at(memory) + memory.nbytes) // page * page
    advice = 14  # MADV_HUGEPAGE of Linux; elsewhere an error that changes nothing
    if end > begin and sys.platform == "linux":
        ctypes.CDLL(None).madvise(c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def _built() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "the compiled kernels are missing"
    return library


def why_not(op: str, device: str, format: str | None) -> str | None:
    """Declines without the library, off the CPU, and formats it does not read."""
    if _library() is None:
        return "it was not compiled when moesaic was installed"
    if device != "cpu":
        return "it runs on the CPU only"
    if op in ("linear", "experts") and format not in FORMATS:
        return f"it does not read {format}"
    return None if op in OPS else "it has no such op"


def linear(x: Tensor, weight: Packed) -> Tensor:
    dtype, x = x.dtype, _native(x)
    (tokens, columns), out = x.shape, weight.shape[0]
    y = _answer(x, (tokens, out))
    [data] = weight.parts().values()
    _run(_Linear(FORMATS[weight.name], TYPES[x.dtype], tokens, columns, out, _at(x), _at(data), _at(y)))
    return _as(dtype, y)


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    dtype, x = x.dtype, _native(x)
    y = _answer(x, tuple(x.shape))
    ids, scores = ids.contiguous(), _float(scores)
    stacks = [data for stack in (gate, up, down) for data in stack.parts().values()]
    (count, inner, size), (tokens, choices) = gate.shape, ids.shape
    _run(
        _Experts(
            *(FORMATS[gate.name], TYPES[x.dtype], tokens, size, inner, count, choices),
            *(_at(each) for each in (x, *stacks, ids, scores, y)),
        )
    )
    return _as(dtype, y)


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    dtype, q, k, v = q.dtype, _native(q), _native(k), _native(v)
    y = _answer(q, tuple(q.shape))
    tokens, heads, size = q.shape
    type = block = 0
    cached: list[int | None] = [None] * 4
    if batch.cache is not None:
        type, block = CACHE_TYPES[batch.cache.keys[0].dtype], batch.cache.block_size
        parts = (batch.cache.keys, batch.cache.values, batch.cache.key_scales, batch.cache.value_scales)
        cached = [_at(part[layer]) if part else None for part in parts]
    tables = batch.tables.contiguous()
    _run(
        _Attention(
            *(TYPES[q.dtype], type, tokens, heads, k.shape[1], size, len(batch.lengths), block),
            *(tables.shape[1], window or 0),
            *(_at(q), _at(k), _at(v), *cached),
            *(_at(batch.slots), _at(tables), _at(batch.offsets), _at(batch.positions), _at(y)),
        )
    )
    return _as(dtype, y)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype, x, weight = x.dtype, _native(x), _float(weight)
    y = _answer(x, tuple(x.shape))
    size = x.shape[-1]
    _run(_Norm(TYPES[x.dtype], x.numel() // size, size, eps, _at(x), _at(weight), _at(y)))
    return _as(dtype, y)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, x, cos, sin = x.dtype, _native(x), _float(cos), _float(sin)
    y = _answer(x, tuple(x.shape))
    tokens, heads, size = x.shape
    _run(_Rope(TYPES[x.dtype], tokens, heads, size, _at(x), _at(cos), _at(sin), _at(y)))
    return _as(dtype, y)


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    logits, settings = _float(logits), _float(settings)
    y = _answer(logits, tuple(logits.shape))
    _run(_Truncate(*logits.shape, _at(logits), _at(settings), _at(y)))
    return y


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    logits, numbers = _float(logits), numbers.double().contiguous()
    ids = torch.empty(len(logits), dtype=torch.int64)
    _run(_Draw(*logits.shape, _at(logits), _at(numbers), _at(ids)))
    return ids


# These run for every op of every step, and even a call of torch that changes nothing takes a microsecond.


def _native(x: Tensor) -> Tensor:
    """Return ``x`` in one piece, in a dtype that the library reads."""
    return (x if x.dtype in TYPES else x.float()).contiguous()


def _float(x: Tensor) -> Tensor:
    """Return ``x`` in one piece, in float32."""
    return (x if x.dtype is torch.float32 else x.float()).contiguous()


def _as(dtype: torch.dtype, y: Tensor) -> Tensor:
    return y if y.dtype is dtype else y.to(dtype)


def _answer(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape)


def _at(x: Tensor) -> int:
    return x.data_ptr()


@functools.cache
def _function(op: str) -> Any:
    return getattr(_built(), f"moesaic_{op}")


def _run(arguments: _Arguments) -> None:
    """Call the library; ctypes releases the interpreter's lock for it."""
    if _function(arguments.op)(byref(arguments)):
        raise MemoryError(f"no memory for {arguments.op}")
