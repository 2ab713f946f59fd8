"""Answers with speculation are those without: the proposals of a step never change a token."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.engine import Done, Engine, Limits, Request, Sampling, Token
from moesaic.engine.blocks import Blocks
from moesaic.engine.runner import Runner
from moesaic.engine.scheduler import Scheduler
from moesaic.errors import InvalidParameter

LOOP = (5, 6, 7, 8, 9, 10, 11, 12) * 3


def answers(model, requests, speculation, **options):
    """Return tokens and ends of each stream, and the statistics.

    The clock ticks once for each reading, so every step takes the same time and proposals always look worthwhile.
    """
    clock = itertools.count().__next__
    engine = Engine(model, thread=False, poison=True, speculation=speculation, clock=clock, **options)
    streams = [stream for request in requests for stream in engine.submit(request)]
    events = [list(stream) for stream in streams]
    engine._scheduler.blocks.check([])
    assert engine.stats().free_blocks == engine.stats().blocks
    return [[e for e in each if isinstance(e, Token)] for each in events], [e[-1] for e in events], engine.stats()


def same(model, requests, **options):
    """Assert that answers are the same with and without speculation; return the statistics of the former."""
    plain, plain_ends, _ = answers(model, requests, "off", **options)
    fast, fast_ends, stats = answers(model, requests, "ngram", **options)
    for one, other in zip(plain, fast, strict=True):
        assert [token.id for token in one] == [token.id for token in other]
        for a, b in zip(one, other, strict=True):
            assert (a.logprob is None) == (b.logprob is None)
            assert a.logprob is None or b.logprob == pytest.approx(a.logprob, abs=1e-4)
            assert [token_id for token_id, _ in a.top] == [token_id for token_id, _ in b.top]
    for one, other in zip(plain_ends, fast_ends, strict=True):
        assert (one.reason, one.stop_id, one.completion_tokens) == (
            other.reason,
            other.stop_id,
            other.completion_tokens,
        )
    return stats


def ask(ids=LOOP, max_tokens=60, eos_ids=(), forbidden=None, **sampling):
    return Request(tuple(ids), Sampling(max_tokens=max_tokens, **sampling), eos_ids, forbidden=forbidden)


FEW = {"allowed_token_ids": (3, 4, 5), "max_tokens": 90}
"""With three tokens, n-grams repeat soon, so that many proposals are accepted and many are not."""
KINDS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "seed": 3},
    "truncated": {"temperature": 0.9, "seed": 4, "top_k": 2, "top_p": 0.9, "min_p": 0.05, **FEW},
    "repetition": {"temperature": 0.5, "seed": 5, "repetition_penalty": 1.2, **FEW},
    "frequency": {"temperature": 0.3, "seed": 5, "frequency_penalty": 0.9, **FEW},
    "n": {"temperature": 0.6, "seed": 6, "n": 3, **FEW},
    "logprobs": {"temperature": 0.3, "seed": 9, "logprobs": 3, "prompt_logprobs": 1, **FEW},
    "min_tokens": {"temperature": 0.3, "seed": 7, "min_tokens": 45, "eos_ids": (4,), **FEW},
    "bias": {"temperature": 0.2, "seed": 10, "logit_bias": {5: 6.0, 6: 6.0}},
    "forbidden": {"temperature": 0.3, "seed": 2, "forbidden": lambda ids: {5} if ids.count(3) % 3 else {4}, **FEW},
}


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_answer_is_unchanged(model, kind, block_size):
    stats = same(model, [ask(**KINDS[kind])], block_size=block_size)
    assert stats.draft_tokens > 0


def test_an_answer_of_one_token_has_no_proposals(model):
    assert same(model, [ask(temperature=0.0, max_tokens=1)]).draft_tokens == 0


def test_proposals_are_accepted_and_rejected_and_save_steps(model):
    requests = [ask(**KINDS[kind]) for kind in ("greedy", "frequency", "truncated")]
    _, _, plain = answers(model, requests, "off")
    stats = same(model, requests)
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.steps < plain.steps
    assert plain.draft_tokens == 0


@pytest.mark.parametrize("which", ["model", "windowed"])
@pytest.mark.parametrize("options", [{"block_size": 2, "cache_tokens": 120}, {"limits": Limits(9, 9), "block_size": 4}])
def test_answers_in_a_crowd_are_unchanged_also_if_preempted(request, which, options, prompts):
    model = request.getfixturevalue(which)
    requests = [ask(ids, max_tokens=30, temperature=0.3, seed=n) for n, ids in enumerate(prompts)]
    stats = same(model, [*requests, ask(temperature=0.0, max_tokens=40), ask(temperature=0.0)], **options)
    assert stats.draft_tokens > 0


def test_an_int8_cache_is_unchanged(model):
    assert same(model, [ask(temperature=0.0)], dtype=torch.int8).accepted_tokens > 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=30), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 0.2, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    block_size=st.integers(1, 9),
    tokens=st.integers(1, 40),
)
def test_random_requests_are_unchanged(model, prompts, temperature, penalty, block_size, tokens):
    requests = [
        ask(ids, tokens, temperature=temperature, seed=1, repetition_penalty=penalty, logit_bias={1: 4, 2: 4, 3: 4})
        for ids in prompts
    ]
    same(model, requests, block_size=block_size, cache_tokens=block_size * (80 // block_size + 1))


def test_a_resumed_answer_is_unchanged(model):
    [whole], _, _ = answers(model, [ask(temperature=0.0)], "off")
    ids = tuple(token.id for token in whole)
    request = Request(LOOP, Sampling(temperature=0.0, max_tokens=60), resume=(ids[:30],))
    [resumed], [done], _ = answers(model, [request], "ngram")
    assert tuple(token.id for token in resumed) == ids
    assert isinstance(done, Done)


def test_the_prefix_cache_holds_no_rejected_token(model):
    clock = itertools.count().__next__
    engine = Engine(model, thread=False, poison=True, block_size=2, clock=clock)
    request = ask(temperature=0.4, seed=3)
    first = [event.id for event in engine.submit(request)[0] if isinstance(event, Token)]
    assert engine.stats().draft_tokens > engine.stats().accepted_tokens
    follow_up = ask((*LOOP, *first), max_tokens=20, temperature=0.0)
    [answer], _, _ = answers(model, [follow_up], "off")
    *tokens, done = engine.submit(follow_up)[0]
    assert [token.id for token in tokens] == [token.id for token in answer]
    assert done.cached_tokens == (len(LOOP) + len(first) - 1) // 2 * 2


def test_a_request_can_switch_speculation_off(model):
    _, _, stats = answers(model, [ask(temperature=0.0, speculation=False)], "ngram")
    assert stats.draft_tokens == 0


def test_an_unknown_kind_of_speculation_is_an_error(model):
    with pytest.raises(InvalidParameter) as caught:
        Engine(model, thread=False, speculation="magic")
    assert caught.value.param == "speculation"


class Fixed:
    """Proposes the same tokens in each step."""

    def __init__(self, tokens):
        self.tokens = tokens

    def propose(self, sequences, budget):
        return dict.fromkeys(sequences, self.tokens)

    def observe(self, sequence, tokens):
        pass


def go_on(model, ids, proposed, count):
    """Continue ``ids`` by ``count`` tokens or until the model fails; return the tokens, and whether it failed."""
    runner = Runner(model, 64, 4, torch.float32, torch.device("cpu"), poison=True)
    scheduler = Scheduler(Blocks(64, 4), Limits(64, 8), model.max_length, model.window, Fixed(proposed))
    [sequence] = scheduler.prepare(Request(tuple(ids), Sampling(0, max_tokens=count)), 0)
    scheduler.add([sequence])
    while not sequence.ended:
        step = scheduler.schedule()
        outcome = runner.run(step)
        if outcome.failed:
            break
        scheduler.update(step, outcome)
    return sequence.ids[len(ids) :], not sequence.ended


def broken(model, token_id):
    out = copy.deepcopy(model)
    with torch.no_grad():
        next(out.embed.weight.parameters())[token_id] = torch.nan
    return out


def test_a_proposal_that_breaks_the_model_ends_nothing(model, greedy, prompts):
    expected = greedy(model, prompts[0], 6)
    assert 60 not in (*prompts[0], *expected)
    assert go_on(broken(model, 60), prompts[0], (expected[1], 60, 4), 6) == (expected, False)


def test_an_accepted_token_that_breaks_the_model_ends_the_answer_where_it_ends_without(model, greedy, prompts):
    answers = {ids: greedy(model, ids, 4) for ids in prompts}
    ids, expected = next((ids, a) for ids, a in answers.items() if a[2] not in (*ids, *a[:2]))
    plain = go_on(broken(model, expected[2]), ids, (), 4)
    assert plain == (expected[:3], True)
    assert go_on(broken(model, expected[2]), ids, tuple(expected[1:]), 4) == plain
