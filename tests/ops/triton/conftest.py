"""Runs the kernels under Triton's interpreter: they then compute on CPU tensors, with numpy.

The variable counts when a kernel, or Triton's own library, is decorated, and when a kernel runs. It is set only then,
so that programs which other tests start do not inherit it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import pytest
import torch

from tests.ops import test_sampling
from tests.support.require import require

FILES = ("_attention", "_experts", "_linear", "_pointwise", "_sampling")


def interpreted():
    """Import the kernels for the interpreter, and return whether they are."""
    if importlib.util.find_spec("triton") is None:
        return False
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for name in FILES:
            importlib.import_module(f"moesaic.ops.triton.{name}")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    kernel = sys.modules["moesaic.ops.triton._pointwise"]._add
    return type(kernel).__name__ == "InterpretedFunction"


INTERPRETED = not torch.cuda.is_available() and interpreted()


@pytest.fixture
def backend(request, device, monkeypatch):
    """The Triton backend, whose new tensors are full of NaN or -1 until a kernel writes them."""
    from moesaic.ops import triton
    from moesaic.ops.triton import _attention

    if torch.cuda.is_available():
        pytest.skip("the tests of all backends run the kernels on the GPU")
    require(INTERPRETED, "Triton is not installed (pip install triton)")
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if torch.bfloat16 in parameters.values():
        pytest.skip("Triton's interpreter stores bfloat16 truncated")
    if (weight := parameters.get("weight_format", "float32")) not in ("float32", "float16"):
        pytest.skip(f"the interpreter does not run {weight}")
    empty = torch.empty

    def poisoned(*shape, dtype=None, **others):
        x = empty(*shape, dtype=dtype, **others)
        return x.fill_(float("nan") if x.dtype.is_floating_point else -1)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(_attention, "PROGRAMS", 24)  # the interpreter takes milliseconds for each
    return triton


@pytest.fixture
def these_kernels(backend, monkeypatch):
    """Let the tests that compare the CPU's kernels with the reference take Triton's instead."""
    monkeypatch.setattr(test_sampling, "native", backend)
