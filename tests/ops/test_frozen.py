"""Gradients through weights that are not trained, in every format."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moesaic import formats, ops, registry
from moesaic.errors import InvalidParameter
from moesaic.ops import _frozen
from tests.support import grouped

FORMATS = [*registry.names("formats"), *grouped.TEXTS[:3]]


def packed(weight_format, *shape):
    return formats.load(weight_format).pack(torch.randn(shape) * 0.1)


def gradient(y, x):
    """Return the gradient of a random combination of y for x."""
    torch.manual_seed(3)
    (found,) = torch.autograd.grad((y.float() * torch.randn(y.shape)).sum(), x)
    return found


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(weight_format, dtype, monkeypatch):
    monkeypatch.setattr(_frozen, "ROWS", 32)  # several parts
    weight = packed(weight_format, 70, 64)
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    y = ops.linear(x, weight)
    expected = F.linear(x.float(), weight.dequantize())
    assert (y - expected).norm() < 0.02 * expected.norm()
    found, wanted = gradient(y, x), gradient(expected, x)
    assert found.dtype == dtype
    assert (found - wanted).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.norm()


def test_linear_keeps_no_floats_of_a_quantized_weight():
    """What is saved for the backward pass is less than the weight in floats."""
    weight, kept = packed("int4", 512, 512), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.nbytes), x)[1], lambda x: x):
        ops.linear(torch.randn(4, 512, requires_grad=True), weight)
    assert sum(kept) < 512 * 512


def experts(x, gate, up, down, ids, scores):
    """The experts one token and one choice at a time, in plain floats."""
    g, u, d = (stack.dequantize() for stack in (gate, up, down))
    rows = []
    for t in range(len(x)):
        parts = [
            scores[t, j] * (d[e] @ (F.silu(g[e] @ x[t].float()) * (u[e] @ x[t].float())))
            for j, e in enumerate(ids[t].tolist())
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_experts(weight_format):
    gate, up, down = (packed(weight_format, 4, *shape) for shape in ((32, 64), (32, 64), (64, 32)))
    x = torch.randn(7, 64, requires_grad=True)
    ids = torch.rand(7, 4).argsort(1)[:, :2]
    scores = torch.rand(7, 2, requires_grad=True)
    y, expected = ops.experts(x, gate, up, down, ids, scores), experts(x, gate, up, down, ids, scores)
    assert (y - expected).norm() < 0.02 * expected.norm()
    for argument in (x, scores):
        found, wanted = gradient(ops.experts(x, gate, up, down, ids, scores), argument), gradient(expected, argument)
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        expected = experts(x, gate, up, down, ids, scores)


def test_a_delta_changes_each_matrix_of_an_expert():
    gate, up, down = (packed("float32", 3, *shape) for shape in ((8, 16), (8, 16), (16, 8)))
    changes = {"gate": torch.randn(3, 8, 16), "down": torch.randn(3, 16, 8)}
    x, ids, scores = torch.randn(5, 16), torch.rand(5, 3).argsort(1)[:, :2], torch.rand(5, 2)

    def delta(name, expert, inputs):
        return F.linear(inputs, changes[name][expert]) if name in changes else None

    found = ops.experts(x, gate, up, down, ids, scores, delta)
    changed = [
        formats.load("float32").pack(each.dequantize() + changes.get(name, 0))
        for name, each in (("gate", gate), ("up", up), ("down", down))
    ]
    assert torch.allclose(found, experts(x, *changed, ids, scores), atol=1e-4)


def test_an_expert_out_of_range_is_refused():
    gate, up, down = (packed("float32", 3, *shape) for shape in ((8, 16), (8, 16), (16, 8)))
    x = torch.randn(1, 16, requires_grad=True)
    with pytest.raises(InvalidParameter, match="ids: an id is out of range: there are 3 experts"):
        ops.experts(x, gate, up, down, torch.tensor([[0, 3]]), torch.rand(1, 2))


def test_no_tokens_give_no_rows():
    gate, up, down = (packed("float32", 3, *shape) for shape in ((8, 16), (8, 16), (16, 8)))
    x = torch.randn(0, 16, requires_grad=True)
    ids, scores = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert ops.experts(x, gate, up, down, ids, scores).shape == (0, 16)


def test_a_trained_weight_has_a_gradient():
    weight = packed("float32", 8, 16)
    weight.weight.requires_grad_()
    ops.linear(torch.randn(3, 16), weight).sum().backward()
    assert weight.weight.grad is not None
