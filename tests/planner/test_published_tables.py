"""Tables of hardware that others have published for these models, and where and why the planner differs.

AIME's articles give the size of the weights in GiB and the smallest number of cards. Hugging Face's articles on Mixtral
multiply the number of parameters by the bits of a weight.
"""

from __future__ import annotations

import pytest

from moesaic.hardware import parse
from moesaic.model_sizes import ModelSizes
from moesaic.planner import STORED, Row, Wish, plan_model, published_spec


def row(model: str, hardware: str, name: str = STORED, **wish) -> Row:
    sizes = ModelSizes.count(published_spec(model))
    return plan_model(sizes, parse(hardware), Wish(formats=(name,), **wish)).rows[0]


@pytest.mark.parametrize(
    ("model", "gibibytes"), [("mixtral-8x7b", 87), ("mixtral-8x22b", 262), ("llama-3-8b", 15), ("llama-3-70b", 132)]
)
def test_sizes_of_the_weights(model: str, gibibytes: int) -> None:
    assert row(model, "1xH100").weight_bytes / 2**30 == pytest.approx(gibibytes, abs=0.7)


@pytest.mark.parametrize(
    ("model", "card", "count"),
    [
        ("mixtral-8x22b", "A100-80GB", 4),
        ("mixtral-8x22b", "H100-80GB", 4),
        ("llama-3-8b", "RTX-A5000", 1),
        ("llama-3-8b", "RTX-4090", 1),
        ("llama-3-70b", "H100-80GB", 2),
        ("llama-3-70b", "A100-80GB", 2),
        ("llama-3-70b", "A100-40GB", 4),
        ("llama-3-70b", "RTX-A6000", 4),
        ("llama-3-70b", "RTX-6000-Ada", 4),
        ("llama-3-70b", "RTX-A5000", 8),
    ],
)
def test_smallest_numbers_of_cards(model: str, card: str, count: int) -> None:
    fits = [cards for cards in (1, 2, 4, 8) if row(model, f"{cards}x{card}").fits]
    assert fits[0] == count and row(model, f"{count}x{card}").one.reading != "slower"


def test_two_cards_of_48_gb_hold_mixtral_with_short_contexts() -> None:
    """AIME names four cards for 32,768 tokens, and two for 8,192: with two, only one long context fits."""
    two, four = (row("mixtral-8x7b", f"{cards}x6000Ada") for cards in (2, 4))
    assert not row("mixtral-8x7b", "1x6000Ada").fits
    assert two.fits and two.batches[8192] >= 4 and two.batches[32768] == 1
    assert four.batches[32768] >= 16


@pytest.mark.parametrize(
    ("name", "gigabytes", "more"),
    [
        ("float32", 186.8, 0.0),
        ("bfloat16", 93.4, 0.0),
        ("int8", 46.7, 0.02),  # one scale for 256 columns, and an embedding of 16 bits
        ("int4", 23.35, 0.06),  # the same on half the size; the preset q4 also keeps the head in 8 bits
    ],
)
def test_bits_times_parameters(name: str, gigabytes: float, more: float) -> None:
    weights = row("mixtral-8x7b", "8xH100", name).weight_bytes / 1e9
    # In float32 the embedding, 131 million parameters, stays in the 16 bits of the checkpoint.
    assert weights == pytest.approx(gigabytes * (1 + more), rel=0.01)


def test_four_bits_need_27_gb_and_a_card_of_30() -> None:
    found = row("mixtral-8x7b", "1xA100-40GB", "q4", context=4096)
    assert found.fits and 25e9 < found.bytes < 27e9
    assert not row("mixtral-8x7b", "1xRTX-4090", "q4", context=4096).fits
    assert row("mixtral-8x7b", "1xRTX-5090", "q4", context=4096).fits
