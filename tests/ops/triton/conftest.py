"""The Triton backend in its interpreter, in the place of the backends that other tests of ops take."""

from __future__ import annotations

import pytest
import torch

from tests.ops import test_sampling
from tests.support.interpreter import interpreted, use_interpreter

if not torch.cuda.is_available():
    interpreted()  # before a test imports the kernels otherwise


@pytest.fixture
def backend(request, device, monkeypatch):
    """The Triton backend, whose new tensors are full of NaN or -1 until a kernel writes them."""
    from moesaic.ops import triton
    from moesaic.ops.triton import _attention

    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if torch.bfloat16 in parameters.values():
        pytest.skip("Triton's interpreter stores bfloat16 truncated")
    if (weight := parameters.get("weight_format", "float32")) not in ("float32", "float16"):
        pytest.skip(f"the interpreter does not run {weight}")
    use_interpreter(monkeypatch)
    monkeypatch.setattr(_attention, "PROGRAMS", 24)  # the interpreter takes milliseconds for each
    return triton


@pytest.fixture
def these_kernels(backend, monkeypatch):
    """Let the tests that compare the CPU's kernels with the reference take Triton's instead."""
    monkeypatch.setattr(test_sampling, "native", backend)
