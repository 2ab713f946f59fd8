import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor, SequenceBiasLogitsProcessor

from moesaic import ops, registry
from moesaic.engine import sampler
from moesaic.engine.request import Request, Sampling, Sequence, Token

V = 50


def sequence(sampling=None, answer=(), prompt=(1, 2, 3), eos_ids=(), seed=0, index=0):
    request = Request(prompt, sampling or Sampling(), eos_ids)
    return Sequence(request, index, 0, seed, 999, [*prompt, *answer], [])


def rows(count=16, seed=0, scale=3.0):
    return torch.randn(count, V, generator=torch.Generator().manual_seed(seed)) * scale


def column(*values):
    return torch.tensor(values)[:, None]


def test_sampling_steps_have_the_order_of_transformers():
    # Parameters for which another order of the truncations, or of temperature, keeps other tokens.
    s = Sampling(0.6, 12, 0.8, 0.03, 0.75, 1.4, logit_bias={3: 4.0, 9: -100.0, 11: 2.5}, min_tokens=5)
    seq = sequence(s, answer=(7, 8, 7, 11), eos_ids=(11, 12))
    seen = torch.tensor([seq.ids])
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[3], 4.0], [[9], -100.0], [[11], 2.5]]),
            MinNewTokensLengthLogitsProcessor(3, 5, [11, 12], device="cpu"),
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.03),
            TypicalLogitsWarper(0.75),
        ]
    )
    for seed in range(50):
        row = rows(1, seed)
        expected = theirs(seen, row.clone()).softmax(-1)
        settings = torch.tensor([[setting(s) for setting in sampler.SETTINGS]])
        for backend in (name for name, why in ops.explain("truncate", "cpu", None).items() if why is None):
            got = (
                registry.load("ops", backend).truncate(sampler.adjust(row[0].clone(), seq)[None], settings).softmax(-1)
            )
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_frequency_and_presence_count_the_answer_only():
    seq = sequence(Sampling(frequency_penalty=0.5, presence_penalty=-1.5), answer=(7, 9, 7, 7), prompt=(7, 20))
    row = rows(1)[0]
    expected = row.clone()
    for token_id in range(V):
        count = [7, 9, 7, 7].count(token_id)
        expected[token_id] -= 0.5 * count + (-1.5 if count else 0.0)
    torch.testing.assert_close(sampler.adjust(row, seq), expected)


def test_repetition_counts_prompt_and_answer_once():
    seq = sequence(Sampling(repetition_penalty=1.7), answer=(7, 9, 7))
    row = rows(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seq.ids]), row.clone())[0]
    torch.testing.assert_close(sampler.adjust(row[0].clone(), seq), expected)


def test_no_stop_id_before_min_tokens():
    logits = torch.zeros(1, V)
    logits[0, 5], logits[0, 6], logits[0, 7] = 9.0, 8.0, 7.0
    s = Sampling(temperature=0, min_tokens=2, stop_token_ids=(6,))
    for answer, expected in (((), 7), ((1,), 7), ((1, 1), 5)):
        seq = sequence(s, answer=answer, eos_ids=(5,))
        assert sampler.sample(logits, [seq])[seq] == [Token(expected)]


def test_greedy_and_drawn_rows_share_a_call():
    logits = rows(4)
    before = logits.clone()
    settings = [
        Sampling(0),
        Sampling(1.0, top_k=1),
        Sampling(0, logit_bias={4: 100}, logprobs=2),
        Sampling(1e-9, top_p=0.5),
    ]
    seqs = [sequence(s) for s in settings]
    got = sampler.sample(logits, seqs)
    assert [got[seq][0].id for seq in seqs] == [
        int(logits[0].argmax()),
        int(logits[1].argmax()),
        4,
        int(logits[3].argmax()),
    ]
    assert torch.equal(logits, before)


def test_a_low_temperature_selects_the_likeliest():
    logits = rows(1) * 1e4
    seq = sequence(Sampling(temperature=2e-4))
    assert sampler.sample(logits, [seq])[seq][0].id == int(logits.argmax())


def test_draws_follow_the_distribution():
    logits, n = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf, 0.5]]), 4000
    seqs = [sequence(seed=seed) for seed in range(n)]
    got = sampler.sample(logits.expand(n, -1), seqs)
    counts = torch.bincount(torch.tensor([tokens[0].id for tokens in got.values()]), minlength=6)
    expected = logits[0].softmax(-1) * n
    assert counts[4] == 0
    chi2 = float(((counts - expected) ** 2 / expected)[expected > 0].sum())
    assert chi2 < 18.5, "p < 0.001 with 4 degrees of freedom"


def test_consecutive_draws_and_answers_of_one_seed_are_independent():
    places = [sampler.uniform(sequence(seed=5, answer=(1,) * place)) for place in range(500)]
    answers = [sampler.uniform(sequence(seed=seed, index=index)) for seed in range(250) for index in range(2)]
    for numbers in (places, answers):
        assert len(set(numbers)) == 500
        x = torch.tensor(numbers)
        assert abs(float(x.mean()) - 0.5) < 0.05
        assert abs(float(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1])) < 0.15


def test_extreme_numbers_draw_tokens_with_mass(monkeypatch):
    logits = torch.full((1, V), -math.inf)
    logits[0, 3], logits[0, 40] = 1.0, 1.0
    seq = sequence()
    for number, expected in ((0.0, 3), (1 - 2**-52, 40)):
        monkeypatch.setattr(sampler, "uniform", lambda _, number=number: number)
        assert sampler.sample(logits, [seq])[seq][0].id == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Sampling,
            temperature=st.sampled_from([0, 0.3, 1.0, 4.0]),
            top_k=st.sampled_from([0, 1, 5]),
            top_p=st.sampled_from([1.0, 0.5]),
            min_p=st.sampled_from([0.0, 0.1]),
            typical_p=st.sampled_from([1.0, 0.6]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            frequency_penalty=st.sampled_from([0.0, 1.0]),
            logit_bias=st.sampled_from([{}, {4: 3.0}]),
            min_tokens=st.sampled_from([0, 9]),
            logprobs=st.sampled_from([None, 0, 3]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_row_does_not_depend_on_the_batch(samplings):
    logits = rows(len(samplings), scale=1.0)
    seqs = [sequence(s, answer=(6, 6), eos_ids=(8,), seed=i) for i, s in enumerate(samplings)]
    together = sampler.sample(logits, seqs)
    for row, seq in enumerate(seqs):
        assert together[seq] == sampler.sample(logits[row : row + 1], [seq])[seq]


def test_reported_logprobs_are_the_models_own():
    logits = rows(1)
    s = Sampling(temperature=0.2, top_k=1, repetition_penalty=2.0, logit_bias={4: 100.0}, logprobs=3)
    seq = sequence(s)
    [token] = sampler.sample(logits, [seq])[seq]
    expected = logits.log_softmax(-1)[0]
    assert token.id == 4
    assert token.logprob == pytest.approx(float(expected[4]))
    values, ids = expected.sort(descending=True)
    assert [token_id for token_id, _ in token.top] == ids[:3].tolist()
    assert [value for _, value in token.top] == pytest.approx(values[:3].tolist())


def test_ties_among_the_likeliest_go_to_the_lower_id():
    logits = torch.zeros(2, V)
    logits[:, 30] = 1.0
    assert [[token_id for token_id, _ in token.top] for token in sampler.report(logits, [0, 30], 4)] == [
        [30, 0, 1, 2]
    ] * 2


def test_top_is_limited_to_the_vocabulary():
    [token] = sampler.report(torch.zeros(1, 3), [0], 20)
    assert len(token.top) == 3
    assert sampler.report(torch.zeros(1, 3), [0], 0)[0].top == ()


def test_without_logprobs_nothing_is_reported():
    seq = sequence(Sampling(0))
    assert sampler.sample(rows(1), [seq])[seq][0].logprob is None
    seq = sequence(replace(Sampling(0), logprobs=0))
    assert sampler.sample(rows(1), [seq])[seq][0].logprob is not None
