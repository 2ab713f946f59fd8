"""``linear`` and ``experts`` of the Triton backend for every weight format, under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from moesaic import formats, ops, registry
from moesaic.errors import InvalidParameter
from moesaic.ops import reference
from moesaic.ops import triton as kernels
from tests.ops import test_ops
from tests.support import grouped
from tests.support.interpreter import use_interpreter

# numpy warns of NaN, and of how the interpreter reads the bounds of a loop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture
def backend(device, monkeypatch):
    """The Triton backend, whose new tensors are full of NaN or -1 until a kernel writes them."""
    assert os.environ.get("TRITON_INTERPRET") is None
    use_interpreter(monkeypatch)

    class Interpreted:
        """The backend, which runs on the CPU here although ``why_not`` refuses it."""

        __name__ = kernels.__name__
        linear, experts = staticmethod(kernels.linear), staticmethod(kernels.experts)

        @staticmethod
        def why_not(op, device, weight_format):
            return kernels.why_not(op, "cuda", weight_format)

    return Interpreted


def stacks(names, experts, d, f):
    shapes = ((f, d), (f, d), (d, f))
    return [
        formats.load(name).pack(torch.randn(experts, *shape) / 4) for name, shape in zip(names, shapes, strict=True)
    ]


@pytest.mark.parametrize("weight_format", [*registry.names("formats"), *grouped.TEXTS])
@pytest.mark.parametrize(("tokens", "inp", "out"), [(1, 8, 3), (3, 320, 31), (13, 700, 65)])
def test_linear(backend, device, weight_format, tokens, inp, out):
    """The test of all backends, with shapes that do not take the interpreter long."""
    test_ops.test_linear(backend, device, weight_format, tokens, inp, out)


@pytest.mark.parametrize("weight_format", [*registry.names("formats"), grouped.KINDS[2], grouped.KINDS[-1]])
@pytest.mark.parametrize(("tokens", "experts", "k", "d", "f"), [(1, 4, 1, 24, 16), (5, 3, 3, 300, 33)])
def test_experts(backend, device, weight_format, tokens, experts, k, d, f):
    """The test of all backends, with shapes that do not take the interpreter long."""
    test_ops.test_experts(backend, device, weight_format, tokens, experts, k, d, f)


def test_every_format_has_a_reader():
    assert registry.names("ops/triton/tiles") == registry.names("formats")


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("weight_format", ["float16", "int8", "int4", "int3", "int2", *grouped.KINDS])
def test_float16_activations(backend, weight_format, tokens):
    weight, x = formats.load(weight_format).pack(torch.randn(40, 448)), torch.randn(tokens, 448)
    found = backend.linear(x.half(), weight)
    assert found.dtype == torch.float16
    expected = reference.linear(x.half().float(), weight)
    assert (found.float() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_result_may_have_another_dtype(backend, tokens):
    weight, x = formats.load("int4").pack(torch.randn(8, 64)), torch.randn(tokens, 64).half()
    found = backend.linear(x, weight, torch.float32)
    torch.testing.assert_close(found, reference.linear(x.float(), weight), atol=2e-2, rtol=2e-3)


def test_large_activations_do_not_overflow_float16(backend):
    """Rotated without the division by 16, the sum of these 256 columns would be infinite."""
    weight = formats.load("int8").pack(torch.randn(32, 256))
    x = 1000 * formats._rotation._signs(256, torch.device("cpu"))[None]
    expected = reference.linear(x, weight)
    for rows in (1, 6):
        found = backend.linear(x.half().expand(rows, -1), weight, torch.float32)
        assert (found - expected).norm() <= 1e-2 * expected.norm() * rows**0.5


@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize(
    "names",
    [
        ("int8", "int4", "grouped:group=64:offset=zero:order=act"),
        ("grouped:group=64:offset=zero:order=act", "float32", "int3"),
    ],
)
def test_stacks_of_different_formats(backend, names, tokens):
    packed, x = stacks(names, 4, 72, 100), torch.randn(tokens, 72)
    ids, scores = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]), torch.rand(tokens, 2)
    expected = reference.experts(x, *packed, ids, scores)
    found = backend.experts(x, *packed, ids, scores)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_ids_out_of_range_give_nan_for_their_token_only(backend, bad, tokens):
    packed, x = stacks(["int4"] * 3, 4, 64, 64), torch.randn(tokens, 64)
    ids, scores = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]), torch.rand(tokens, 2)
    expected = reference.experts(x, *packed, ids, scores)
    ids[1, 1] = bad
    found = backend.experts(x, *packed, ids, scores)
    assert found[1].isnan().all()
    others = torch.arange(tokens) != 1
    torch.testing.assert_close(found[others], expected[others], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0, 0, 50), (20, 0, 17, 13)])
def test_experts_may_have_several_items_or_none(backend, counts):
    packed, x = stacks(["float32"] * 3, 8, 16, 24), torch.randn(50, 16)
    ids, scores = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None], torch.rand(50, 1)
    expected = reference.experts(x, *packed, ids, scores)
    torch.testing.assert_close(backend.experts(x, *packed, ids, scores), expected, atol=1e-4, rtol=1e-4)


def test_a_step_may_be_empty(backend):
    packed = stacks(["int4"] * 3, 4, 64, 32)
    ids, scores = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert backend.experts(torch.zeros(0, 64), *packed, ids, scores).shape == (0, 64)
    assert backend.linear(torch.zeros(0, 64), formats.load("int4").pack(torch.randn(8, 64))).shape == (0, 8)


def test_float64_is_refused(backend):
    with pytest.raises(InvalidParameter, match=r"x: is torch\.float64"):
        backend.linear(torch.zeros(1, 64, dtype=torch.float64), formats.load("int4").pack(torch.randn(8, 64)))


def test_the_backend_says_which_weights_it_does_not_read(backend):
    assert ops.explain("linear", "cpu", "int4")["triton"] == "it runs on NVIDIA GPUs only"
    assert kernels.why_not("experts", "cuda", ("int4", "int3", "grouped:bits=8")) is None
    assert kernels.why_not("linear", "cuda", "int7") == "it does not read int7"
    assert kernels.why_not("quantize", "cuda", "int8") == "it has no kernel for quantize"
