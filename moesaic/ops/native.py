"""The ops on the CPU in C++: Python bindings of ``csrc/``, which does not depend on torch.

The library is built when the package is installed. At run time it chooses the best instruction set of the processor:
AMX, AVX-512 with VNNI, AVX2, or portable C++. Activations are rounded to 8 bits for a weight in an integer format,
with one scale for each token and 256 columns (see ``formats/_tiles.py``); in the same way, with one scale for each
token and 32 columns, for a weight in the format ``grouped``; and to bfloat16 for a bfloat16 weight.

These ops are not differentiable. If a gradient is needed, ``ops`` chooses the reference backend.
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

from moesaic.errors import InvalidParameter
from moesaic.formats import Codes, Packed
from moesaic.formats._feedback import rotate_padded
from moesaic.formats._tiles import TRIED_STEPS, Tiled
from moesaic.ops import OPS, Batch, FormatName, _grouping

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_TYPES = TYPES | {torch.int8: 3}
QUANTIZED_TO = ("int8", "int4", "int3", "int2")
FED_BACK_TO = QUANTIZED_TO[1:]
OUT_OF_MEMORY, ID_OUT_OF_RANGE = 1, 2  # csrc/api.cpp, Status


class _Arguments(ctypes.Structure):
    """Base of the structs that hold an op's arguments; their fields have the order of those in csrc/kernels.h."""

    op: ClassVar[str]


def _struct(op: str, *fields: tuple[str, Any]) -> type[_Arguments]:
    return type(op, (_Arguments,), {"op": op, "_fields_": fields})


_Linear = _struct(
    "linear",
    *(("format", c_int), ("type", c_int), ("grouping", c_void_p)),
    *((name, c_int64) for name in ("tokens", "columns", "out")),
    *((name, c_void_p) for name in ("x", "weight", "order", "y")),
)
_Experts = _struct(
    "experts",
    *(("format", c_int), ("type", c_int)),
    *((name, c_void_p) for name in ("gate_grouping", "up_grouping", "down_grouping")),
    *((name, c_int64) for name in ("tokens", "size", "inner", "experts", "choices")),
    *((name, c_void_p) for name in ("x", "gate", "up", "down", "gate_order", "up_order", "down_order")),
    *((name, c_void_p) for name in ("ids", "scores", "y")),
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
_Quantize = _struct(
    "quantize",
    *(("format", c_int), ("type", c_int), ("usual_step", c_float), ("rows", c_int64), ("columns", c_int64)),
    *(("shares", c_void_p), ("tries", c_int64), ("x", c_void_p), ("weight", c_void_p)),
)
_FeedBack = _struct(
    "feed_back",
    *(("bits", c_int), ("usual_step", c_float), ("rows", c_int64), ("columns", c_int64)),
    *(("levels", c_void_p), ("shares", c_void_p), ("tries", c_int64)),
    *((name, c_void_p) for name in ("x", "factor", "weight")),
)
_StoreCodes = _struct(
    "store_codes",
    *(("grouping", c_void_p), ("rows", c_int64), ("columns", c_int64), ("block_bytes", c_int64)),
    *((name, c_void_p) for name in ("codes", "scale", "offset", "super_scale", "super_offset", "weight")),
)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it was not built."""
    spec = importlib.util.find_spec("moesaic.ops._native")  # an editable install may put it elsewhere
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.moesaic_isa.restype = library.moesaic_formats.restype = ctypes.c_char_p
    library.moesaic_multiply.restype = library.moesaic_multiply_bf16.restype = c_int64
    for struct in (_Linear, _Experts, _Attention, _Norm, _Rope, _Truncate, _Draw, _Quantize, _FeedBack, _StoreCodes):
        getattr(library, f"moesaic_{struct.op}").argtypes = [POINTER(struct)]
    set_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, library)
    return library


@functools.cache
def formats() -> dict[str, int]:
    """Return the library's number of each weight format that it reads; empty if it was not built."""
    library = _library()
    names = library.moesaic_formats().decode().split() if library else []
    return {name: number for number, name in enumerate(names)}


def set_threads(count: int, library: ctypes.CDLL | None = None) -> None:
    """Set the number of threads that the kernels use, the calling thread included.

    Without this call, it is the number of available cores. ``library`` None: the loaded library.
    """
    (library or _built()).moesaic_set_threads(max(1, min(count, 1024)))


def instruction_set() -> str:
    """Return the name of the instruction set that the kernels use now, one of ``INSTRUCTION_SETS``."""
    return str(_built().moesaic_isa().decode())


def use_instruction_set(name: str) -> bool:
    """Make the kernels use one of ``INSTRUCTION_SETS``, for tests and benchmarks.

    Return False, and change nothing, if this processor lacks it.
    """
    return bool(_built().moesaic_set_isa(name.encode()))


def read_memory(memory: Tensor, streams: int, ahead: int) -> None:
    """Read all of ``memory`` once with all threads, to measure bandwidth.

    A thread reads ``streams`` ranges in parallel, each with a prefetch distance of ``ahead`` bytes.
    """
    _built().moesaic_read(c_void_p(_address(memory)), c_int64(memory.nbytes), streams, ahead)


def multiply(rounds: int) -> int:
    """Multiply and add bytes in registers ``rounds`` times with all threads, to measure speed.

    Return the number of operations.
    """
    return int(_built().moesaic_multiply(c_int64(rounds)))


def multiply_bf16(rounds: int) -> int:
    """Multiply and add bfloat16 numbers in registers ``rounds`` times with all threads, to measure speed.

    Return the number of operations.
    """
    return int(_built().moesaic_multiply_bf16(c_int64(rounds)))


def huge_pages(memory: Tensor) -> None:
    """Advise Linux to back ``memory`` with huge pages of 2 MiB, for fewer TLB misses; do nothing elsewhere."""
    page = 2 << 20
    address = _address(memory)
    begin, end = -(-address // page) * page, (address + memory.nbytes) // page * page
    advice = 14  # MADV_HUGEPAGE
    if end > begin and sys.platform == "linux":
        ctypes.CDLL(None).madvise(c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def _built() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "the compiled kernels are missing"
    return library


def why_not(op: str, device: str, weight_format: FormatName) -> str | None:
    """Return the reason why this backend cannot run ``op`` with these arguments; None if it can."""
    if _library() is None:
        return "it was not compiled when moesaic was installed"
    if device != "cpu":
        return "it runs on the CPU only"
    if isinstance(weight_format, tuple):
        if any(_stem(name) != _grouping.NAME for name in weight_format):
            return f"it needs one format for gate, up and down, not {', '.join(weight_format)}"
        weight_format = _grouping.NAME
    if op == "store_codes" and _stem(weight_format or "") != _grouping.NAME:
        return f"it stores codes only in the format {_grouping.NAME}"
    if op == "quantize_with_feedback":
        return None if _stem(weight_format or "") in FED_BACK_TO else f"it has no feedback for {weight_format}"
    if op == "quantize" and _stem(weight_format or "") not in QUANTIZED_TO:
        return f"it does not quantize to {weight_format}"
    if op in ("linear", "experts") and _stem(weight_format or "") not in formats():
        return f"it does not read {weight_format}"
    return None if op in OPS else "it has no such op"


def _stem(name: str) -> str:
    """Return the name of a format without its parameters."""
    return name.partition(":")[0]


@functools.cache
def _number(name: str) -> int:
    return formats()[_stem(name)]


def linear(x: Tensor, weight: Packed) -> Tensor:
    dtype, x = x.dtype, _native(x)
    (tokens, columns), out = x.shape, weight.shape[0]
    y = _answer(x, (tokens, out))
    _run(
        _Linear(
            *(_number(weight.name), TYPES[x.dtype], _grouping.address(weight.name), tokens, columns, out),
            *(_address(x), *_parts(weight), _address(y)),
        )
    )
    return _as(dtype, y)


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    dtype, x = x.dtype, _native(x)
    y = _answer(x, tuple(x.shape))
    ids, scores = ids.contiguous(), _float(scores)
    stacks, orders = zip(*(_parts(stack) for stack in (gate, up, down)), strict=True)
    groupings = [_grouping.address(stack.name) for stack in (gate, up, down)]
    (count, inner, size), (tokens, choices) = gate.shape, ids.shape
    _run(
        _Experts(
            *(_number(gate.name), TYPES[x.dtype], *groupings, tokens, size, inner, count, choices),
            *(_address(x), *stacks, *orders, _address(ids), _address(scores), _address(y)),
        )
    )
    return _as(dtype, y)


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, layer: int, window: int | None) -> Tensor:
    dtype, q, k, v = q.dtype, _native(q), _native(k), _native(v)
    y = _answer(q, tuple(q.shape))
    tokens, heads, size = q.shape
    cache_type = block = 0
    cached: list[int | None] = [None] * 4
    if batch.cache is not None:
        cache_type, block = CACHE_TYPES[batch.cache.keys[0].dtype], batch.cache.block_size
        parts = (batch.cache.keys, batch.cache.values, batch.cache.key_scales, batch.cache.value_scales)
        cached = [_address(part[layer]) if part else None for part in parts]
    tables = batch.tables.contiguous()
    _run(
        _Attention(
            *(TYPES[q.dtype], cache_type, tokens, heads, k.shape[1], size, len(batch.lengths), block),
            *(tables.shape[1], window or 0),
            *(_address(q), _address(k), _address(v), *cached),
            *(_address(batch.slots), _address(tables), _address(batch.offsets), _address(batch.positions), _address(y)),
        )
    )
    return _as(dtype, y)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype, x, weight = x.dtype, _native(x), _float(weight)
    y = _answer(x, tuple(x.shape))
    size = x.shape[-1]
    _run(_Norm(TYPES[x.dtype], x.numel() // size, size, eps, _address(x), _address(weight), _address(y)))
    return _as(dtype, y)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, x, cos, sin = x.dtype, _native(x), _float(cos), _float(sin)
    y = _answer(x, tuple(x.shape))
    tokens, heads, size = x.shape
    _run(_Rope(TYPES[x.dtype], tokens, heads, size, _address(x), _address(cos), _address(sin), _address(y)))
    return _as(dtype, y)


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    logits, settings = _float(logits), _float(settings)
    y = _answer(logits, tuple(logits.shape))
    _run(_Truncate(*logits.shape, _address(logits), _address(settings), _address(y)))
    return y


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    logits, numbers = _float(logits), numbers.double().contiguous()
    ids = torch.empty(len(logits), dtype=torch.int64)
    _run(_Draw(*logits.shape, _address(logits), _address(numbers), _address(ids)))
    return ids


def quantize(weight: Packed, plain: Tensor, index: int | None = None) -> None:
    kind = weight.format
    assert isinstance(kind, Tiled)
    [data] = weight.parts().values()
    target, plain = data if index is None else data[index], _native(plain.to(data.device))
    shares, sizes = torch.tensor(TRIED_STEPS), plain.shape[-2:]
    fields = (_number(weight.name), TYPES[plain.dtype], kind.usual_step, *sizes, _address(shares), len(shares))
    matrices = zip(plain, target, strict=True) if plain.dim() == 3 else [(plain, target)]
    for matrix, tiles in matrices:
        _run(_Quantize(*fields, _address(matrix), _address(tiles)))


def quantize_with_feedback(weight: Packed, plain: Tensor, factor: Tensor, index: int | None = None) -> None:
    kind = weight.format
    assert isinstance(kind, Tiled)
    [data] = weight.parts().values()
    rotated = rotate_padded(plain.to(data.device)).contiguous()
    levels, shares = torch.tensor(kind.levels).float(), torch.tensor(TRIED_STEPS)
    addresses = (_address(levels), _address(shares), len(shares), _address(rotated), _address(factor))
    target = data if index is None else data[index]
    _run(_FeedBack(kind.bits, kind.usual_step, *rotated.shape, *addresses, _address(target)))


def store_codes(weight: Packed, codes: Codes, index: int | None = None) -> None:
    tiles = weight.parts()["tiles"]
    target = tiles if index is None else tiles[index]
    kept = {name: tensor.contiguous() for name, tensor in codes.tensors().items()}
    fields = ("codes", "scale", "offset", "super_scale", "super_offset")
    _run(
        _StoreCodes(
            *(_grouping.address(weight.name), *weight.shape[-2:], target.shape[-1]),
            *(_address(kept[name]) if name in kept else None for name in fields),
            _address(target),
        )
    )
    if codes.order is not None:
        weight.overwrite({"order": codes.order}, index)


# These helpers run for every op of every step. They avoid calls of torch: even a no-op takes a microsecond.


def _native(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and in a dtype that the library reads."""
    return (x if x.dtype in TYPES else x.float()).contiguous()


def _float(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and in float32."""
    return (x if x.dtype is torch.float32 else x.float()).contiguous()


def _as(dtype: torch.dtype, y: Tensor) -> Tensor:
    return y if y.dtype is dtype else y.to(dtype)


def _answer(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape)


def _address(x: Tensor) -> int:
    return x.data_ptr()


def _parts(weight: Packed) -> tuple[int, int | None]:
    """Return the addresses of a weight and of the order of its columns; None: they are in their own order."""
    data, *order = weight._parameters.values()  # parts() would copy the dictionary
    assert data is not None
    return data.data_ptr(), order[0].data_ptr() if order and order[0] is not None else None


@functools.cache
def _function(op: str) -> Any:
    return getattr(_built(), f"moesaic_{op}")


def _run(arguments: _Arguments) -> None:
    """Call the library's function for the op of ``arguments``, and raise its errors.

    ctypes releases the GIL during the call.
    """
    status = _function(arguments.op)(byref(arguments))
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"out of memory in {arguments.op}")
    if status == ID_OUT_OF_RANGE:
        raise InvalidParameter("ids", f"an expert id is out of range: there are {arguments.experts} experts")
