"""Calls of the compiled kernels: the library, single calls, and recordings of many."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from ctypes import addressof, byref, c_int64
from typing import TypeVar

import torch
from torch import Tensor

from moesaic.errors import InvalidParameter
from moesaic.ops._arguments import Arguments, Call, Experts, Linear, Linears
from moesaic.ops._graph import Arena, Graph, NotRecordable, OnlyViews

OUT_OF_MEMORY, ID_OUT_OF_RANGE = 1, 2  # csrc/api.cpp, Status
MAX_LAYERS = 8  # csrc/kernels.cpp

log = logging.getLogger("moesaic.ops")

T = TypeVar("T")


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it was not built."""
    spec = importlib.util.find_spec("moesaic.ops._native")  # an editable install may put it elsewhere
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    for text in (library.moesaic_isa, library.moesaic_formats, library.moesaic_ops):
        text.restype = ctypes.c_char_p
    library.moesaic_multiply.restype = library.moesaic_multiply_bf16.restype = c_int64
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    set_threads(cores, library)
    return library


@functools.cache
def formats() -> dict[str, int]:
    """Return the library's number of each weight format that it reads; empty if it was not built."""
    library = load()
    names = library.moesaic_formats().decode().split() if library else []
    return {name: number for number, name in enumerate(names)}


@functools.cache
def op_numbers() -> dict[str, int]:
    """Return the library's number of each op."""
    return {name: number for number, name in enumerate(built().moesaic_ops().decode().split())}


def set_threads(count: int, library: ctypes.CDLL | None = None) -> None:
    """Set the number of threads that the kernels use, the calling thread included.

    Without this call, it is the number of available cores. ``library`` None: the loaded library.
    """
    (library or built()).moesaic_set_threads(max(1, min(count, 1024)))


def built() -> ctypes.CDLL:
    library = load()
    assert library is not None, "the compiled kernels are missing"
    return library


def run(arguments: Arguments) -> None:
    """Run an op, and raise its errors. ctypes releases the GIL during the call."""
    call = Call(op_numbers()[arguments.op], addressof(arguments))
    _check(built().moesaic_run(byref(call), c_int64(1)), arguments)
    if (recording := _recordings.current) is not None:
        recording.calls.append(arguments)


def run_other(arguments: Arguments) -> None:
    """Run a function of the library that is no op of a step."""
    _check(getattr(built(), f"moesaic_{arguments.op}")(byref(arguments)), arguments)


def _check(status: int, arguments: Arguments | None = None) -> None:
    """Raise the error of one call, or of some call of a graph."""
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"out of memory in {arguments.op if arguments else 'a graph'}")
    if status == ID_OUT_OF_RANGE:
        noun = "experts" if isinstance(arguments, Experts) else "rows"
        limit = f": there are {getattr(arguments, noun)} {noun}" if arguments else ""
        raise InvalidParameter("ids", f"an id is out of range{limit}")


# Recording


class _Recording:
    """The calls of a computation so far, and the memory of its results."""

    def __init__(self) -> None:
        self.calls: list[Arguments] = []
        self.arena = Arena()


class _Recordings(threading.local):
    """The recording of each thread; None if it does not record."""

    current: _Recording | None = None


_recordings = _Recordings()


def answer(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return uninitialized memory for a result, in ``dtype``, or in x's if that is None."""
    if (recording := _recordings.current) is not None:
        return recording.arena.empty(shape, dtype or x.dtype)
    return x.new_empty(shape, dtype=dtype)


class NativeGraph(Graph[T]):
    """The calls of a computation, which one call of the library repeats."""

    def __init__(self, compute: Callable[[], T], result: T, recording: _Recording) -> None:
        self._compute, self._recording = compute, recording  # own the memory that the calls refer to
        self._arguments = _merged(recording.calls)
        numbers = op_numbers()
        self._calls = (Call * len(self._arguments))(*(Call(numbers[a.op], addressof(a)) for a in self._arguments))
        self._result = result

    @property
    def result(self) -> T:
        return self._result

    @property
    def nbytes(self) -> int:
        return self._recording.arena.nbytes

    def replay(self) -> None:
        _check(built().moesaic_run(self._calls, c_int64(len(self._calls))))


def record(device: torch.device, compute: Callable[[], T]) -> NativeGraph[T] | None:
    if device.type != "cpu" or load() is None:
        return None
    _recordings.current = recording = _Recording()
    try:
        with OnlyViews():
            result = compute()
    except NotRecordable as error:
        log.info("steps are not recorded: %s", error)
        return None
    finally:
        _recordings.current = None
    return NativeGraph(compute, result, recording)


def _merged(calls: list[Arguments]) -> list[Arguments]:
    """Return the calls, with consecutive linear layers of the same input as one.

    They round their input once, and their rows are one set of tasks for the threads.
    """
    groups: list[list[Arguments]] = []
    for call in calls:
        if groups and len(groups[-1]) < MAX_LAYERS and _share_input(groups[-1][0], call):
            groups[-1].append(call)
        else:
            groups.append([call])
    return [group[0] if len(group) == 1 else _linears(group) for group in groups]


def _linears(layers: list[Arguments]) -> Arguments:
    return Linears((Linear * len(layers))(*layers), len(layers))


def _share_input(first: Arguments, second: Arguments) -> bool:
    """Return whether two calls are linear layers that round the same input in the same way."""
    if not isinstance(first, Linear) or not isinstance(second, Linear):
        return False
    fields = ("x", "order", "type", "tokens", "columns")
    alike = all(getattr(first, name) == getattr(second, name) for name in fields)
    return alike and _rounding(first.format) == _rounding(second.format)


def _rounding(number: int) -> str:
    """Return how a format with this number has activations rounded: all integer formats do it in one way."""
    name = next(name for name, each in formats().items() if each == number)
    return "int" if name.startswith("int") else name
