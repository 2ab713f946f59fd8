"""Triton's interpreter, in which kernels compute on CPU tensors, with numpy.

The variable counts when a kernel, or Triton's own library, is decorated, and when a kernel runs. It is set only then,
so that programs which other tests start do not inherit it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.support.require import require

FILES = ("_attention", "_experts", "_linear", "_pointwise", "_sampling")
"""The files of kernels, with names of ops in the interface of all backends."""


@contextmanager
def interpreting() -> Iterator[None]:
    """Let what is decorated in the ``with`` block be interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def import_library() -> None:
    """Import Triton's own library for the interpreter, before something imports it otherwise."""
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        with interpreting():
            importlib.import_module("triton.language")


@functools.cache
def interpreted() -> bool:
    """Import the kernels for the interpreter, and return whether they are."""
    if importlib.util.find_spec("triton") is None:
        return False
    with interpreting():
        modules = [importlib.import_module(f"moesaic.ops.triton.{name}") for name in FILES]
    kinds = {type(value).__name__ for module in modules for value in vars(module).values()}
    return "InterpretedFunction" in kinds and "JITFunction" not in kinds


def use_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels in the interpreter until the test ends. New tensors are full of NaN or -1 until they are written."""
    if torch.cuda.is_available():
        pytest.skip("the tests of all backends run the kernels on the GPU")
    require(interpreted(), "Triton is not installed (pip install triton), or was imported without its interpreter")
    empty = torch.empty

    def poisoned(*shape: Any, **others: Any) -> torch.Tensor:
        x = empty(*shape, **others)
        return x.fill_(float("nan") if x.dtype.is_floating_point else -1)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch, "empty", poisoned)
