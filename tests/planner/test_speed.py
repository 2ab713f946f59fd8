"""Speeds follow from bytes and operations, and from the experts that a step touches."""

from __future__ import annotations

import itertools

import pytest

from moesaic.hardware import Host, Machine, parse
from moesaic.model_sizes import ModelSizes
from moesaic.planner import published_spec, speed
from moesaic.planner.speed import estimate, experts_touched

MIXTRAL = ModelSizes.count(published_spec("mixtral-8x7b"))
DENSE = ModelSizes.count(published_spec("llama-3-8b"))


def answers(sizes: ModelSizes, machine: str | Machine, batch: int = 1, context: int = 1024, text: str | None = None):
    machine = parse(machine) if isinstance(machine, str) else machine
    return estimate(sizes, sizes.weights(text), machine, batch, context).answer_tokens_s


def test_experts_touched_by_even_choices() -> None:
    expected = {1: 2.0, 2: 3.5, 4: 5.47, 8: 7.20, 16: 7.92, 64: 8.0}
    assert {tokens: round(experts_touched(8, 2, tokens), 2) for tokens in expected} == expected


@pytest.mark.parametrize(
    ("text", "limit"),
    [(None, 168), ("q8", 329), ("q4", 584)],  # tokens/s at 4.3 TB/s: a roofline worked out by hand
)
def test_one_answer_on_a_card_is_at_the_assumed_share_of_the_limit(text: str | None, limit: float) -> None:
    expected = speed.CARD_READ * limit * 4800 / 4300
    assert 0.75 * expected < answers(MIXTRAL, "1xH200", text=text) < 1.05 * expected


def test_speed_grows_with_answers_and_falls_with_context() -> None:
    for sizes, machine in itertools.product((MIXTRAL, DENSE), ("1xH200", "cpu:200GB@100GB/s", "4xA6000")):
        together = [answers(sizes, machine, batch) for batch in (1, 2, 4, 16, 64)]
        assert together == sorted(together)
        assert [one / many for one, many in itertools.pairwise(together)] != [1] * 4
        lengths = [answers(sizes, machine, context=length) for length in (512, 2048, 8192)]
        assert lengths == sorted(lengths, reverse=True)


def test_several_answers_of_a_sparse_model_read_more_experts() -> None:
    sparse, dense = (answers(sizes, "1xH200", 4) / answers(sizes, "1xH200") for sizes in (MIXTRAL, DENSE))
    assert 1.3 < sparse < 1.7 and 3.5 < dense < 4


def test_a_processor_without_wide_vectors_unpacks_three_bits_slower() -> None:
    peaks = {"avx512": 866, "avx2": 530}  # of one processor, in Gop/s
    hosts = [Host(10**11, 50, peak, peak / 2, name, measured=True) for name, peak in peaks.items()]
    wide, narrow = (Machine("this machine", host=host) for host in hosts)
    assert answers(MIXTRAL, narrow, text="q3") < 0.8 * answers(MIXTRAL, wide, text="q3")
    assert answers(MIXTRAL, narrow, text="q8") > 0.9 * answers(MIXTRAL, wide, text="q8")


def test_prompts_are_bound_by_arithmetic() -> None:
    slow, fast = (Host(10**11, 50, gop, gop, "avx512") for gop in (500, 1000))
    one, other = (estimate(MIXTRAL, MIXTRAL.weights("q4"), Machine("m", host=host), 1, 2048) for host in (slow, fast))
    assert 1.8 < other.prompt_tokens_s / one.prompt_tokens_s < 2.0
    assert one.first_token_s == pytest.approx(2048 / one.prompt_tokens_s)
    assert 0.6 < one.prompt_tokens_s * 25.24 / 500 < 0.9  # 25.24 Gop a token, worked out by hand
