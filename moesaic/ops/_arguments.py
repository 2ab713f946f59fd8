"""The arguments of the compiled kernels, as structs that have the order of those in ``csrc/kernels.h``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, ClassVar


class Arguments(ctypes.Structure):
    """Base of the structs that hold an op's arguments; their fields have the order of those in csrc/kernels.h."""

    op: ClassVar[str]


class Call(ctypes.Structure):
    """A call of an op: its number in csrc/kernels.h, and the address of its arguments."""

    _fields_ = (("op", c_int64), ("arguments", c_void_p))


def _struct(op: str, *fields: tuple[str, Any]) -> type[Arguments]:
    return type(op, (Arguments,), {"op": op, "_fields_": fields})


Linear = _struct(
    "linear",
    *(("format", c_int), ("type", c_int), ("y_type", c_int), ("grouping", c_void_p)),
    *((name, c_int64) for name in ("tokens", "columns", "out")),
    *((name, c_void_p) for name in ("x", "weight", "order", "y")),
)
Linears = _struct("linears", ("layers", ctypes.POINTER(Linear)), ("count", c_int64))
Embedding = _struct(
    "embedding",
    *(("format", c_int), ("type", c_int), ("grouping", c_void_p)),
    *((name, c_int64) for name in ("tokens", "rows", "columns")),
    *((name, c_void_p) for name in ("ids", "weight", "order", "y")),
)
Route = _struct(
    "route",
    *(("type", c_int), ("tokens", c_int64), ("size", c_int64), ("experts", c_int64), ("choices", c_int64)),
    *((name, c_void_p) for name in ("x", "weight", "ids", "scores")),
)
Experts = _struct(
    "experts",
    *(("format", c_int), ("type", c_int)),
    *((name, c_void_p) for name in ("gate_grouping", "up_grouping", "down_grouping")),
    *((name, c_int64) for name in ("tokens", "size", "inner", "experts", "choices")),
    *((name, c_void_p) for name in ("x", "gate", "up", "down", "gate_order", "up_order", "down_order")),
    *((name, c_void_p) for name in ("ids", "scores", "y")),
)
Attention = _struct(
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
Norm = _struct(
    "rms_norm",
    *(("type", c_int), ("tokens", c_int64), ("size", c_int64), ("eps", c_float)),
    *((name, c_void_p) for name in ("x", "weight", "y")),
)
Rope = _struct(
    "rope",
    *(("type", c_int), ("tokens", c_int64), ("heads", c_int64), ("size", c_int64)),
    *((name, c_void_p) for name in ("x", "cos", "sin", "y")),
)
Rotary = _struct(
    "rotary",
    *(("tokens", c_int64), ("size", c_int64)),
    *((name, c_void_p) for name in ("positions", "frequencies", "cos", "sin")),
)
Add = _struct("add", ("type", c_int), ("count", c_int64), *((name, c_void_p) for name in ("a", "b", "y")))
Swiglu = _struct("swiglu", ("type", c_int), ("count", c_int64), *((name, c_void_p) for name in ("gate", "up", "y")))
Finite = _struct("finite", ("type", c_int), ("rows", c_int64), ("size", c_int64), ("x", c_void_p), ("y", c_void_p))
Argmax = _struct("argmax", ("rows", c_int64), ("size", c_int64), ("x", c_void_p), ("ids", c_void_p))
Truncate = _struct(
    "truncate",
    *((name, c_int64) for name in ("rows", "vocabulary")),
    *((name, c_void_p) for name in ("logits", "settings", "y")),
)
Draw = _struct(
    "draw",
    *((name, c_int64) for name in ("rows", "vocabulary")),
    *((name, c_void_p) for name in ("logits", "numbers", "ids")),
)
Quantize = _struct(
    "quantize",
    *(("format", c_int), ("type", c_int), ("usual_step", c_float), ("rows", c_int64), ("columns", c_int64)),
    *(("shares", c_void_p), ("tries", c_int64), ("x", c_void_p), ("weight", c_void_p)),
)
FeedBack = _struct(
    "feed_back",
    *(("bits", c_int), ("usual_step", c_float), ("rows", c_int64), ("columns", c_int64)),
    *(("levels", c_void_p), ("shares", c_void_p), ("tries", c_int64)),
    *((name, c_void_p) for name in ("x", "factor", "weight")),
)
StoreCodes = _struct(
    "store_codes",
    *(("grouping", c_void_p), ("rows", c_int64), ("columns", c_int64), ("block_bytes", c_int64)),
    *((name, c_void_p) for name in ("codes", "scale", "offset", "super_scale", "super_offset", "weight")),
)
