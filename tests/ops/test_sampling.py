"""Truncations and draws: the reference against transformers, every other backend against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from moesaic import registry
from moesaic.ops import native, reference

V = 50
OFF = (1.0, 0.0, 1.0, 0.0, 1.0)
WARPERS = {
    "temperature": (0, TemperatureLogitsWarper, [0.1, 0.7, 1.5, 20.0]),
    "top_k": (1, TopKLogitsWarper, [1, 2, 7, V, V + 9]),
    "top_p": (2, TopPLogitsWarper, [1e-6, 0.1, 0.5, 0.9, 0.999]),
    "min_p": (3, MinPLogitsWarper, [0.01, 0.2, 1.0]),
    "typical_p": (4, TypicalLogitsWarper, [1e-6, 0.2, 0.7, 0.95]),
}


@pytest.fixture(params=registry.names("ops"))
def backend(request, device):
    found = registry.load("ops", request.param)
    if why := found.why_not("truncate", device, None):
        pytest.skip(f"{request.param}: {why}")
    return found


def rows(count=16, seed=0, scale=3.0, size=V):
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device()) * scale


def only(column, *values):
    """Return settings in which only one column is not off."""
    out = torch.tensor([OFF] * len(values))
    out[:, column] = torch.tensor([float(value) for value in values])
    return out


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("cut", [None, 5])
def test_each_truncation_equals_transformers(backend, name, cut):
    column, theirs, values = WARPERS[name]
    logits = rows()
    if cut:  # tokens that are forbidden beforehand
        logits = TopKLogitsWarper(cut)(None, logits)
    for value in values:
        expected = theirs(value)(None, logits.clone())
        got = backend.truncate(logits, only(column, *[value] * len(logits)))
        assert torch.equal(got.isinf(), expected.isinf())
        torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WARPERS)
def test_every_row_has_its_own_settings(backend, name):
    column, theirs, values = WARPERS[name]
    logits = rows(len(values))
    got = backend.truncate(logits, only(column, *values)).softmax(-1)
    for row, value in enumerate(values):
        torch.testing.assert_close(got[row : row + 1], theirs(value)(None, logits[row : row + 1]).softmax(-1))


def test_equal_logits_are_kept_together(backend):
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, -9.0]])
    for column, value in ((1, 2), (2, 0.5)):
        got = backend.truncate(logits, only(column, value))
        assert got.isfinite().tolist() == [[True, True, True, True, False]]


@pytest.fixture
def on_cpu(device):
    if device != "cpu":
        pytest.skip("the kernels run on the CPU")


@pytest.mark.usefixtures("on_cpu")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 2, 15, 16, 17, 333, 5000]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 8.0, 1000.0]),
    forbidden=st.sampled_from([0.0, 0.5, 0.99]),
    chosen=st.lists(
        st.tuples(
            st.sampled_from([1e-6, 0.2, 1.0, 3.0]),
            st.sampled_from([0, 1, 3, 40, 4999, 9999]),
            st.sampled_from([1.0, 0.01, 0.5, 0.95, 0.999]),
            st.sampled_from([0.0, 0.05, 1.0]),
            st.sampled_from([1.0, 0.3, 0.9]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_kernels_keep_what_the_reference_keeps(seed, size, scale, forbidden, chosen):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(chosen), size, generator=generator) * scale
    logits[:, 1:][torch.rand(len(chosen), size - 1, generator=generator) < forbidden] = -torch.inf
    settings = torch.tensor(chosen)
    expected, got = reference.truncate(logits, settings), native.truncate(logits, settings)
    both = expected.isfinite() & got.isfinite()
    torch.testing.assert_close(got[both], expected[both], rtol=1e-6, atol=1e-6)
    # If a mass is reached within rounding error, either may keep one more entry, or its equals.
    mass = expected.logsumexp(-1)
    for row in range(len(chosen)):
        apart = expected[row].isfinite() != got[row].isfinite()
        kept = torch.maximum(expected[row], got[row])[apart]
        assert len(kept.unique()) <= 2
        assert expected[row].isfinite().any() and got[row].isfinite().any() and bool(mass[row].isfinite())


def test_draw_inverts_the_cumulative_distribution(backend):
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(9, -1).contiguous()
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.5, 0.69, 0.71, 0.99, 1 - 2**-52, 0.45], dtype=torch.float64)
    assert backend.draw(logits, numbers).tolist() == [0, 0, 2, 2, 2, 3, 3, 3, 2]


def test_tokens_without_mass_are_never_drawn(backend):
    logits = torch.full((2, 5000), -torch.inf)
    logits[:, 3] = logits[:, 4000] = 1.0
    assert backend.draw(logits, torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)).tolist() == [3, 4000]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("size", [1, 16, 31, 32000])
def test_kernels_draw_what_the_reference_draws(size):
    logits, numbers = rows(64, size=size), torch.rand(64, dtype=torch.float64)
    mass = logits.double().softmax(-1).cumsum(-1)
    for row, token_id in enumerate(native.draw(logits, numbers).tolist()):
        before = float(mass[row, token_id - 1]) if token_id else 0.0
        assert before - 1e-6 <= float(numbers[row]) <= float(mass[row, token_id]) + 1e-6


@pytest.mark.usefixtures("on_cpu")
def test_truncate_and_draw_do_not_depend_on_the_isa():
    logits, settings = rows(8, size=1000), torch.tensor([[0.7, 40, 0.9, 0.02, 0.95]] * 8)
    best, answers = native.instruction_set(), []
    try:
        for name in native.INSTRUCTION_SETS:
            if native.use_instruction_set(name):
                kept = native.truncate(logits, settings)
                answers.append((kept, native.draw(kept, torch.linspace(0, 0.99, 8, dtype=torch.float64))))
    finally:
        native.use_instruction_set(best)
    assert all(torch.equal(one, other) for answer in answers for one, other in zip(answer, answers[0], strict=True))
