"""The parameters of the format ``grouped`` as the compiled kernels read them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import addressof, c_float, c_int, c_int8

from moesaic.formats import grouped, load

NAME = grouped.Format.name
SCALES = ("float16", "bfloat16", "float32", "super", "super4")  # csrc/kernels.h, Grouping::Scale
OFFSETS = ("none", "value", "zero")  # csrc/kernels.h, Grouping::Offset


class Grouping(ctypes.Structure):
    """How a weight is stored; csrc/kernels.h has the same fields in the same order."""

    _fields_ = (
        *((name, c_int) for name in ("bits", "group", "scale", "offset", "tables")),
        ("levels", c_int8 * 16 * 2),
        ("steps", c_float * 2),
    )


@functools.cache
def address(name: str) -> int | None:
    """Return the address of the parameters of a format ``grouped:...``; None for other formats."""
    parameters = _parameters(name)
    return None if parameters is None else addressof(parameters)


@functools.cache  # which also keeps the memory alive
def _parameters(name: str) -> Grouping | None:
    weight_format = load(name)
    if not isinstance(weight_format, grouped.Format):
        return None
    levels = grouped.TABLES.get(weight_format.levels)
    tables = [] if levels is None else byte_tables(levels)
    parameters = Grouping(
        *(weight_format.bits, weight_format.group),
        *(SCALES.index(weight_format.scale), OFFSETS.index(weight_format.offset), len(tables)),
    )
    for number, (entries, step) in enumerate(tables):
        parameters.levels[number][:] = entries
        parameters.steps[number] = step
    return parameters


def byte_tables(levels: Sequence[float]) -> list[tuple[list[int], float]]:
    """Return tables of signed bytes and their steps, whose products add up to ``levels``.

    One table holds integers exactly. Two tables hold other levels with 14 bits: the error is at most 6.2e-5 of the
    largest level, and none for bitsandbytes' FP4, whose levels are multiples of 1 / 192. The entries of each of the two
    span less than 128, because AVX2 multiplies such bytes faster.
    """
    if all(level == round(level) and -128 <= level <= 127 for level in levels):
        return [([round(level) for level in levels], 1.0)]
    step = max(map(abs, levels)) / (42 * 192)  # the largest multiple of 192 below 2^13
    whole = [round(level / step) for level in levels]
    return [([each >> 7 for each in whole], 128 * step), ([each & 127 for each in whole], step)]
