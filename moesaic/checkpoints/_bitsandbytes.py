"""Weights that bitsandbytes quantized: NF4 and FP4 in blocks (QLoRA, arXiv:2305.14314), and int8 rows (LLM.int8(),
arXiv:2208.07339).

Four bits: a weight ``X`` holds two codes in each byte of the flattened matrix, the upper half of the byte first. Each
block of consecutive codes shares a scale, and may continue in the next row. The file also has

    X.absmax                                   the scale of each block; uint8 codes if scales are quantized themselves
    X.quant_map                                the 16 levels
    X.nested_absmax, X.nested_quant_map        scales of blocks of scales, and the 256 levels of scales
    X.quant_state.bitsandbytes__nf4 or fp4     a JSON object as bytes: shape, block size, mean of the scales

If the shape is [E, R, C], the weight is a stack of experts, whose name does not end with ``weight``.

Eight bits: ``M.weight`` is int8 [R, C], and ``M.SCB`` has the largest absolute weight of each row, the value of code
127. The tensors show which of the two it is. The settings say how another program computes, and are not needed.

Layout: https://github.com/bitsandbytes-foundation/bitsandbytes, ``QuantState.as_dict`` and ``Linear8bitLt``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoints import _expert_stacks
from moesaic.checkpoints._coded import Coded, check_matrix, common_step, grouped, refuse_codes
from moesaic.checkpoints._fields import Fields
from moesaic.checkpoints._views import Shape, View, dtype_name
from moesaic.errors import CheckpointError
from moesaic.formats import Codes
from moesaic.formats.grouped import TABLES

SETTINGS = frozenset(
    "quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight "
    "llm_int8_skip_modules llm_int8_threshold".split()
)
"""Keys of the settings. None of them changes the weights."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE_BYTES = 1 << 16
"""Maximum size of the JSON object of a weight, which takes about 200 bytes."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)")
_STATE = "quant_state.bitsandbytes__"
_ROW_ORDER = 0


def weight_views(stored: Mapping[str, View], settings: Mapping[str, Any], path: Path) -> dict[str, View]:
    """Return the tensors of a checkpoint with one view for each quantized weight; other tensors stay as they are.

    ``_quantized`` describes the arguments.

    Raises:
        ConfigError: a key of the settings is not known.
        CheckpointError: a tensor is missing, or does not fit the others.
    """
    Fields(settings, path).finish(SETTINGS)
    parts: dict[str, dict[str, View]] = {}
    for name, view in stored.items():
        if owner := _owner(name):
            parts.setdefault(owner[0], {})[owner[1]] = view
    for name, found in parts.items():
        if name not in stored:
            view = next(iter(found.values()))
            raise CheckpointError(view.info.file, f"{name} is missing, but the file has its {', '.join(found)}")
    views: dict[str, View] = {}
    for name, view in stored.items():
        if name in parts:
            views |= _views(name, view, parts[name])
        elif _owner(name) is None:
            refuse_codes(name, view, "its SCB or quant_state")
            views[name] = view
    return views


def _owner(name: str) -> tuple[str, str] | None:
    """Return the weight that tensor ``name`` describes, and the last part of ``name``; None: it describes no weight."""
    if match := _PART.fullmatch(name):
        return match[1], match[2]
    module, _, part = name.rpartition(".")
    return (f"{module}.weight", part) if part in ("SCB", "weight_format") else None


def _views(name: str, view: View, parts: Mapping[str, View]) -> dict[str, View]:
    """Return the view of the weight ``name``, or the views of all experts if it is a stack of them."""
    states = [part for part in parts if part.startswith("quant_state.")]
    if "SCB" in parts and not states:
        return {name: Rows(name, view, parts)}
    if len(states) != 1 or states[0].removeprefix(_STATE) not in ("nf4", "fp4") or "SCB" in parts:
        found = ", ".join(parts)
        problem = f"{name} has {found}; expected SCB, or exactly one of {_STATE}nf4 and {_STATE}fp4"
        raise CheckpointError(view.info.file, problem)
    state = _read_state(name, states[0], parts[states[0]])
    stack = _expert_stacks.split_name(name)
    fits = len(state.shape) == 2 if stack is None else _expert_stacks.is_stack(state.shape)
    if not fits:
        expected = "rows and columns" if stack is None else "experts, rows and columns"
        raise CheckpointError(view.info.file, f"{name} has the shape {list(state.shape)}, expected {expected}")
    if stack is None:
        return {name: Blocks(name, view, parts, state)}
    experts, rows, columns = state.shape
    matrix = Blocks(name, view, parts, replace(state, shape=(experts * rows, columns)))
    return {
        f"{stack[0]}.{expert}.{stack[1]}.weight": _expert_stacks.CodedRows(matrix, slice(begin, begin + rows))
        for expert, begin in enumerate(range(0, experts * rows, rows))
    }


@dataclass(frozen=True)
class State:
    """What the JSON object of a weight says: kind of levels, shape, and blocks."""

    levels: str
    shape: Shape
    block: int
    nested_block: int
    """Number of scales that share a scale."""
    mean: float
    """The mean of the scales, which was subtracted before they were quantized."""

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-math.prod(self.shape) // self.block)


def _read_state(name: str, part: str, view: View) -> State:
    """Return the state of the weight ``name``.

    Raises:
        CheckpointError: the tensor is not a JSON object, or a key is missing or has a value that is not supported.
    """
    info, label = view.info, f"{name}.{part}"
    if len(info.shape) != 1 or info.dtype != torch.uint8 or info.nbytes > MAX_STATE_BYTES:
        raise CheckpointError(info.file, f"{label} is not a uint8 vector of at most {MAX_STATE_BYTES} bytes")
    try:
        raw = json.loads(bytes(view.read().tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(info.file, f"{label} is not JSON") from error
    if not isinstance(raw, dict):
        raise CheckpointError(info.file, f"{label} is not a JSON object")
    fields = Fields(raw, info.file)
    levels = part.removeprefix(_STATE)
    fields.allow("quant_type", levels)
    shape, block, mean = fields.take("shape"), fields.integer("blocksize"), fields.take("nested_offset", 0.0)
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(info.file, f"{label} has the shape {shape!r}, expected rows and columns")
    if block not in BLOCK_SIZES:
        raise CheckpointError(info.file, f"{label} has the blocksize {block}, expected one of {BLOCK_SIZES}")
    if type(mean) not in (int, float) or not abs(mean) < math.inf:
        raise CheckpointError(info.file, f"{label} has the nested_offset {mean!r}, expected a number")
    nested = fields.integer("nested_blocksize", 256)
    fields.finish(("dtype", "nested_dtype"))
    return State(levels, tuple(shape), block, nested, float(mean))


class Blocks(Coded):
    """A weight of four bits, whose blocks are parts of the flattened matrix."""

    def __init__(self, name: str, view: View, parts: Mapping[str, View], state: State) -> None:
        _check_packed(name, view, state)
        nested = _check_scales(name, view, parts, state)
        self._packed, self._parts, self._state = view, parts, state
        scale = torch.float32 if nested else parts["absmax"].info.dtype
        step = common_step(state.shape[1], state.block)
        decoder = grouped(step, scale=dtype_name(scale), levels=state.levels)
        super().__init__(view, state.shape, step, decoder)

    def _part(self, rows: slice, columns: slice) -> Codes:
        width = self.info.shape[1]
        starts = torch.arange(rows.start, rows.stop)[:, None] * width
        blocks = (starts + torch.arange(columns.start, columns.stop, self._step)) // self._state.block
        first, last = int(blocks[0, 0]), int(blocks[-1, -1]) + 1
        return Codes(self._read_codes(rows, columns), self._read_scales(first, last)[blocks - first])

    def _read_codes(self, rows: slice, columns: slice) -> Tensor:
        width = self.info.shape[1]
        begin, end = rows.start * width, rows.stop * width
        packed = self._read_bytes(begin // 2, -(-end // 2))
        if width % 2 == 0:  # so is the step; only these columns of a mapped file are read
            return _nibbles(packed.reshape(-1, width // 2)[:, columns.start // 2 : columns.stop // 2])
        return _nibbles(packed)[begin % 2 :][: end - begin].reshape(-1, width)[:, columns]

    def _read_bytes(self, begin: int, end: int) -> Tensor:
        """Return some of the bytes of the flattened matrix; the tensor that holds them may have any dtype."""
        size = self._packed.info.dtype.itemsize
        first = begin // size
        data = self._packed.read((slice(first, -(-end // size)),)).flatten().view(torch.uint8)
        return data[begin - first * size : end - first * size]

    def _read_scales(self, first: int, last: int) -> Tensor:
        """Return the scales of the blocks ``first`` to ``last``."""
        absmax = self._parts["absmax"]
        if len(absmax.info.shape) == 2:
            return absmax.read().T.flatten()[first:last]
        stored = absmax.read((slice(first, last),))
        if stored.dtype != torch.uint8:
            return stored
        levels, scales = self._parts["nested_quant_map"].read(), self._parts["nested_absmax"].read()
        factors = scales.flatten()[torch.arange(first, last) // self._state.nested_block]
        return levels[stored.long()] * factors + self._state.mean


def _nibbles(packed: Tensor) -> Tensor:
    """Return the halves of bytes [..., n] as [..., 2 n]; the upper half of a byte comes first."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


def _check_packed(name: str, view: View, state: State) -> None:
    """Raise CheckpointError unless the tensor is [n, 1], in any dtype, and has half a byte for each weight."""
    info, needed = view.info, -(-math.prod(state.shape) // 2)
    if info.nbytes != needed or not info.shape or info.shape[0] * info.dtype.itemsize != needed:
        problem = f"{name} is {list(info.shape)} {dtype_name(info.dtype)}"
        raise CheckpointError(
            info.file, f"{problem}, expected {needed} bytes in one column for a weight {list(state.shape)}"
        )


def _check_scales(name: str, view: View, parts: Mapping[str, View], state: State) -> bool:
    """Return whether the scales are quantized; raise CheckpointError if one of their tensors is missing or unsuitable.

    The levels must be those of bitsandbytes, which ignores the levels in the file.
    """
    _require(name, view, parts, "absmax", "quant_map")
    check_matrix(f"{name}.quant_map", parts["quant_map"], (16,), torch.float32)
    if not torch.allclose(parts["quant_map"].read(), torch.tensor(TABLES[state.levels]), rtol=0, atol=1e-6):
        problem = f"{name}.quant_map holds other levels than those of {state.levels}"
        raise CheckpointError(parts["quant_map"].info.file, problem)
    absmax = parts["absmax"]
    if absmax.info.dtype == torch.uint8:
        _require(name, view, parts, "nested_absmax", "nested_quant_map")
        check_matrix(f"{name}.absmax", absmax, (state.count,), torch.uint8)
        check_matrix(f"{name}.nested_quant_map", parts["nested_quant_map"], (256,), torch.float32)
        scales = -(-state.count // state.nested_block)
        check_matrix(f"{name}.nested_absmax", parts["nested_absmax"], (scales,), torch.float32)
        return True
    rows, columns = state.shape
    turned = (columns // state.block, rows)
    # A forward pass on a CPU transposes the scales of a model, which may then have been saved.
    saved_on_cpu = columns % state.block == 0 and absmax.info.shape == turned
    check_matrix(f"{name}.absmax", absmax, turned if saved_on_cpu else (state.count,), *FLOATS)
    return False


def _require(name: str, view: View, parts: Mapping[str, View], *required: str) -> None:
    for part in required:
        if part not in parts:
            raise CheckpointError(view.info.file, f"{name}.{part} is missing")


class Rows(Coded):
    """A weight of int8 with one scale for each row."""

    def __init__(self, name: str, view: View, parts: Mapping[str, View]) -> None:
        if len(view.info.shape) != 2:
            raise CheckpointError(view.info.file, f"{name} is {list(view.info.shape)}, expected rows and columns")
        rows, columns = view.info.shape
        check_matrix(name, view, (rows, columns), torch.int8)
        check_matrix(f"{name.removesuffix('.weight')}.SCB", parts["SCB"], (rows,), *FLOATS)
        _check_order(name, parts)
        self._weight, self._largest = view, parts["SCB"]
        step = common_step(columns)
        super().__init__(view, (rows, columns), step, grouped(step, bits=8, scale="float32"))

    def _part(self, rows: slice, columns: slice) -> Codes:
        codes = self._weight.read((rows, columns)).view(torch.uint8) ^ 128  # int8 plus 128
        scale = self._largest.read((rows,)).float() / 127
        return Codes(codes, scale[:, None].expand(-1, codes.shape[1] // self._step))


def _check_order(name: str, parts: Mapping[str, View]) -> None:
    """Raise CheckpointError if a file states that the rows of an int8 weight are in an order for certain GPUs."""
    order = parts.get("weight_format")
    if order is None:
        return
    if math.prod(order.info.shape) != 1 or order.info.dtype != torch.uint8 or order.read().item() != _ROW_ORDER:
        raise CheckpointError(order.info.file, f"{name} has an unsupported weight_format; supported: 'row' (0)")
