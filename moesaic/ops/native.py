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
import sys
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from moesaic.formats import Codes, Packed
from moesaic.formats._feedback import rotate_padded
from moesaic.formats._tiles import TRIED_STEPS, Tiled
from moesaic.ops import OPS, Batch, FormatName, _grouping
from moesaic.ops._arguments import (
    Add,
    Argmax,
    Attention,
    Draw,
    Embedding,
    Experts,
    FeedBack,
    Finite,
    Linear,
    Norm,
    Quantize,
    Rope,
    Rotary,
    Route,
    StoreCodes,
    Swiglu,
    Truncate,
)
from moesaic.ops._calls import answer as _answer
from moesaic.ops._calls import built, formats, load, run, run_other
from moesaic.ops._calls import record as record
from moesaic.ops._calls import set_threads as set_threads

INSTRUCTION_SETS = ("portable", "neon", "avx2", "avxvnni", "avx512", "avx512bf16", "amx")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_TYPES = TYPES | {torch.int8: 3}
QUANTIZED_TO = ("int8", "int4", "int3", "int2")
FED_BACK_TO = QUANTIZED_TO[1:]


def instruction_set() -> str:
    """Return the name of the instruction set that the kernels use now, one of ``INSTRUCTION_SETS``."""
    return str(built().moesaic_isa().decode())


def use_instruction_set(name: str) -> bool:
    """Make the kernels use one of ``INSTRUCTION_SETS``, for tests and benchmarks.

    Return False, and change nothing, if this processor lacks it.
    """
    return bool(built().moesaic_set_isa(name.encode()))


def read_memory(memory: Tensor, streams: int, ahead: int) -> None:
    """Read all of ``memory`` once with all threads, to measure bandwidth.

    A thread reads ``streams`` ranges in parallel, each with a prefetch distance of ``ahead`` bytes.
    """
    built().moesaic_read(c_void_p(_address(memory)), c_int64(memory.nbytes), streams, ahead)


def multiply(rounds: int) -> int:
    """Multiply and add bytes in registers ``rounds`` times with all threads, to measure speed.

    Return the number of operations.
    """
    return int(built().moesaic_multiply(c_int64(rounds)))


def multiply_bf16(rounds: int) -> int:
    """Multiply and add bfloat16 numbers in registers ``rounds`` times with all threads, to measure speed.

    Return the number of operations.
    """
    return int(built().moesaic_multiply_bf16(c_int64(rounds)))


def huge_pages(memory: Tensor) -> None:
    """Advise Linux to back ``memory`` with huge pages of 2 MiB, for fewer TLB misses; do nothing elsewhere."""
    page = 2 << 20
    address = _address(memory)
    begin, end = -(-address // page) * page, (address + memory.nbytes) // page * page
    advice = 14  # MADV_HUGEPAGE
    if end > begin and sys.platform == "linux":
        ctypes.CDLL(None).madvise(c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def why_not(op: str, device: str, weight_format: FormatName) -> str | None:
    """Return the reason why this backend cannot run ``op`` with these arguments; None if it can."""
    if load() is None:
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
    if op in ("linear", "embedding", "experts") and _stem(weight_format or "") not in formats():
        return f"it does not read {weight_format}"
    return None if op in OPS else "it has no such op"


def _stem(name: str) -> str:
    """Return the name of a format without its parameters."""
    return name.partition(":")[0]


@functools.cache
def _number(name: str) -> int:
    return formats()[_stem(name)]


def linear(x: Tensor, weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    dtype, x = dtype or x.dtype, _native(x)
    (tokens, columns), out = x.shape, weight.shape[0]
    y = _answer(x, (tokens, out), dtype if dtype in TYPES else torch.float32)
    run(
        Linear(
            *(_number(weight.name), TYPES[x.dtype], TYPES[y.dtype], _grouping.address(weight.name)),
            *(tokens, columns, out, _address(x), *_parts(weight), _address(y)),
        )
    )
    return _as(dtype, y)


def embedding(ids: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    ids, (rows, columns) = ids.contiguous(), weight.shape
    y = _answer(ids, (len(ids), columns), dtype if dtype in TYPES else torch.float32)
    run(
        Embedding(
            *(_number(weight.name), TYPES[y.dtype], _grouping.address(weight.name), len(ids), rows, columns),
            *(_address(ids), *_parts(weight), _address(y)),
        )
    )
    return _as(dtype, y)


def route(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x, weight, shape = _native(x), _float(weight), (len(x), k)
    ids, scores = _answer(x, shape, torch.int64), _answer(x, shape, torch.float32)
    sizes = (*x.shape, len(weight), k)
    run(Route(TYPES[x.dtype], *sizes, _address(x), _address(weight), _address(ids), _address(scores)))
    return ids, scores


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, ids: Tensor, scores: Tensor) -> Tensor:
    dtype, x = x.dtype, _native(x)
    y = _answer(x, tuple(x.shape))
    ids, scores = ids.contiguous(), _float(scores)
    stacks, orders = zip(*(_parts(stack) for stack in (gate, up, down)), strict=True)
    groupings = [_grouping.address(stack.name) for stack in (gate, up, down)]
    (count, inner, size), (tokens, choices) = gate.shape, ids.shape
    run(
        Experts(
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
    run(
        Attention(
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
    run(Norm(TYPES[x.dtype], x.numel() // size, size, eps, _address(x), _address(weight), _address(y)))
    return _as(dtype, y)


def rotary(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    frequencies, positions = _float(frequencies), positions.contiguous()
    shape = (len(positions), len(frequencies))
    cos, sin = _answer(frequencies, shape), _answer(frequencies, shape)
    run(Rotary(*shape, _address(positions), _address(frequencies), _address(cos), _address(sin)))
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, x, cos, sin = x.dtype, _native(x), _float(cos), _float(sin)
    y = _answer(x, tuple(x.shape))
    tokens, heads, size = x.shape
    run(Rope(TYPES[x.dtype], tokens, heads, size, _address(x), _address(cos), _address(sin), _address(y)))
    return _as(dtype, y)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    dtype, gate, up = gate.dtype, _native(gate), _native(up)
    y = _answer(gate, tuple(gate.shape))
    run(Swiglu(TYPES[gate.dtype], gate.numel(), _address(gate), _address(up), _address(y)))
    return _as(dtype, y)


def add(x: Tensor, y: Tensor) -> Tensor:
    dtype, x, y = x.dtype, _native(x), _native(y)
    total = _answer(x, tuple(x.shape))
    run(Add(TYPES[x.dtype], x.numel(), _address(x), _address(y), _address(total)))
    return _as(dtype, total)


def finite(x: Tensor) -> Tensor:
    x = _native(x)
    y = _answer(x, x.shape[:1], torch.bool)
    run(Finite(TYPES[x.dtype], *x.shape, _address(x), _address(y)))
    return y


def argmax(x: Tensor) -> Tensor:
    x = _float(x)
    ids = _answer(x, x.shape[:1], torch.int64)
    run(Argmax(*x.shape, _address(x), _address(ids)))
    return ids


def truncate(logits: Tensor, settings: Tensor) -> Tensor:
    logits, settings = _float(logits), _float(settings)
    y = _answer(logits, tuple(logits.shape))
    run(Truncate(*logits.shape, _address(logits), _address(settings), _address(y)))
    return y


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    logits, numbers = _float(logits), numbers.double().contiguous()
    ids = _answer(logits, (len(logits),), torch.int64)
    run(Draw(*logits.shape, _address(logits), _address(numbers), _address(ids)))
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
        run(Quantize(*fields, _address(matrix), _address(tiles)))


def quantize_with_feedback(weight: Packed, plain: Tensor, factor: Tensor, index: int | None = None) -> None:
    kind = weight.format
    assert isinstance(kind, Tiled)
    [data] = weight.parts().values()
    rotated = rotate_padded(plain.to(data.device)).contiguous()
    levels, shares = torch.tensor(kind.levels).float(), torch.tensor(TRIED_STEPS)
    addresses = (_address(levels), _address(shares), len(shares), _address(rotated), _address(factor))
    target = data if index is None else data[index]
    run_other(FeedBack(kind.bits, kind.usual_step, *rotated.shape, *addresses, _address(target)))


def store_codes(weight: Packed, codes: Codes, index: int | None = None) -> None:
    tiles = weight.parts()["tiles"]
    target = tiles if index is None else tiles[index]
    kept = {name: tensor.contiguous() for name, tensor in codes.tensors().items()}
    fields = ("codes", "scale", "offset", "super_scale", "super_offset")
    run_other(
        StoreCodes(
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


def _address(x: Tensor) -> int:
    return x.data_ptr()


def _parts(weight: Packed) -> tuple[int, int | None]:
    """Return the addresses of a weight and of the order of its columns; None: they are in their own order."""
    data, *order = weight._parameters.values()  # parts() would copy the dictionary
    assert data is not None
    return data.data_ptr(), order[0].data_ptr() if order and order[0] is not None else None
