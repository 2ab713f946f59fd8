"""Resumed answers: wherever an answer is cut, its continuation is the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from moesaic.engine import Done, Engine, Limits, PromptLogprobs, Request, Sampling, Token
from moesaic.errors import GrammarError, InvalidParameter, Overloaded

V = 61
EOS = 5
COUNT = 14


def ask(ids, constraint=None, eos_ids=(), **sampling):
    return Request(
        tuple(ids), Sampling(**{"temperature": 0, "max_tokens": COUNT} | sampling), eos_ids, constraint=constraint
    )


def manual(model, **options):
    return Engine(model, thread=False, poison=True, **options)


def read(streams):
    """Return (ids, Done) of each stream; Done without the fields that depend on the engine's past."""
    out = []
    for stream in streams:
        *tokens, done = stream
        assert isinstance(done, Done)
        assert done.cached_tokens <= done.prompt_tokens
        out.append(([token.id for token in tokens], replace(done, cached_tokens=0, preemptions=0)))
    return out


def idle(engine):
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.blocks)
    engine._scheduler.blocks.check([])
    assert not engine._streams and not engine._cancelled


class Passing:
    """A constraint: an id differs from the previous one modulo 3, and the answer may end after 5 tokens."""

    def __init__(self, most=99):
        self.said, self.most = [], most

    def mask(self):
        bits = np.zeros(-(-V // 32) * 32, dtype=bool)
        if len(self.said) < self.most:
            bits[[token_id for token_id in range(V) if not self.said or (token_id - self.said[-1]) % 3]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id):
        self.said.append(token_id)

    @property
    def may_end(self):
        return len(self.said) >= 5

    @property
    def done(self):
        return len(self.said) == self.most


class Counted(nn.Module):
    """A model that counts the tokens it has run."""

    def __init__(self, model):
        super().__init__()
        self.model, self.ran = model, 0
        self.vocab_size, self.max_length = model.vocab_size, model.max_length
        self.window, self.cache_shapes, self.logits = model.window, model.cache_shapes, model.logits

    def forward(self, batch):
        self.ran += len(batch.tokens)
        return self.model(batch)


WAYS = {
    "greedy": {},
    "a seed": {"temperature": 1.3, "seed": 7},
    "a seed and truncation": {"temperature": 1.5, "seed": 8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        "temperature": 1.0,
        "seed": 3,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.5,
    },
    "greedy with penalties": {"repetition_penalty": 1.8, "frequency_penalty": 1.5},
    "a bias": {"temperature": 1.0, "seed": 4, "logit_bias": {7: 2.0, 9: -50.0}},
    "an end": {"temperature": 1.0, "seed": 11, "eos_ids": tuple(range(0, V, 9))},
    "a late end": {"temperature": 1.0, "seed": 11, "eos_ids": tuple(range(0, V, 9)), "min_tokens": 6},
    "to the end of the context": {"temperature": 1.0, "seed": 2, "max_tokens": None},
    "a grammar": {"temperature": 1.2, "seed": 5, "constraint": Passing},
    "a grammar that may end": {"temperature": 1.2, "seed": 6, "constraint": Passing, "eos_ids": tuple(range(0, V, 4))},
    "a grammar that ends": {"constraint": lambda: Passing(9), "min_tokens": 12},
}
KINDS = {
    "float32": ("model", {}),
    "int8": ("model", {"dtype": torch.int8, "block_size": 4}),
    "window": ("windowed", {"block_size": 3, "limits": Limits(8, 8)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_resumed_anywhere_is_the_same(kind, way, prompts, request):
    which, options = KINDS[kind]
    model = request.getfixturevalue(which)
    prompt = prompts[4] if "context" not in way else (prompts[4] * 4)[:113]
    whole = ask(prompt, **WAYS[way])
    [first] = read((engine := manual(model, **options)).submit(whole))
    elsewhere = manual(model, **options)
    cuts = [replace(whole, resume=(tuple(first[0][:cut]),)) for cut in range(len(first[0]) + 1)]
    fresh = [replace(each, salt=f"{cut}") for cut, each in enumerate(cuts)]  # share no cached prefix
    for where, asked in ((elsewhere, fresh), (engine, cuts)):
        assert read([stream for each in asked for stream in where.submit(each)]) == [first] * len(cuts)
    for each in (engine, elsewhere):
        idle(each)


def test_each_of_n_answers_resumes_at_its_own_position(model, prompts):
    whole = ask(prompts[5], temperature=1.0, seed=9, n=3, eos_ids=tuple(range(0, V, 30)))
    first = read(manual(model).submit(whole))
    assert len({tuple(ids) for ids, _ in first}) == 3 and len({len(ids) for ids, _ in first}) > 1
    engine = manual(model, block_size=4)
    streams = []
    for a, b in product(range(0, COUNT + 1, 3), repeat=2):
        for lengths in ((a, b, (a + b) % COUNT), (a, b), (a,)):
            cuts = tuple(tuple(ids[:cut]) for (ids, _), cut in zip(first, lengths, strict=False))
            streams += engine.submit(replace(whole, resume=cuts, salt=f"{a} {b}"))
    assert read(streams) == first * (len(streams) // 3)
    idle(engine)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_resumed_answers_are_the_same_on_a_small_cache(model, prompts, data):
    size = data.draw(st.integers(1, 9))
    budget = data.draw(st.integers(6, 40))
    tokens = data.draw(st.integers(80, 160)) // size * size
    engine = manual(model, block_size=size, cache_tokens=tokens, limits=Limits(budget, data.draw(st.integers(1, 6))))
    requests, expected = [], []
    for prompt in data.draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=4)):
        whole = ask(
            prompt,
            temperature=data.draw(st.sampled_from([0, 1.0])),
            seed=data.draw(st.integers(0, 9)),
            n=data.draw(st.integers(1, 3)),
            eos_ids=data.draw(st.sampled_from([(), tuple(range(0, V, 9))])),
        )
        answers = read(manual(model).submit(whole))
        cuts = tuple(tuple(ids[: data.draw(st.integers(0, len(ids)))]) for ids, _ in answers)
        requests.append(replace(whole, resume=cuts, priority=data.draw(st.integers(0, 1))))
        expected += answers
    streams = [stream for each in requests for stream in engine.submit(each)]
    assert read(streams) == expected
    idle(engine)


def test_resumed_tokens_are_sent_at_once_without_logprobs(model, prompts):
    whole = ask(prompts[1], logprobs=2)
    tokens = [event for event in next(iter(manual(model).submit(whole))) if isinstance(event, Token)]
    engine = manual(model)
    [stream] = engine.submit(replace(whole, resume=([token.id for token in tokens[:6]],)))
    assert stream.poll() == [Token(token.id) for token in tokens[:6]]
    assert engine.stats().steps == engine.stats().generated_tokens == 0
    rest = list(stream)[:-1]
    assert [token.id for token in rest] == [token.id for token in tokens[6:]]
    assert [token.logprob for token in rest] == pytest.approx([token.logprob for token in tokens[6:]], abs=1e-5)
    assert engine.stats().generated_tokens == COUNT - 6


def test_resumed_tokens_are_prefilled_and_cached(model, prompts):
    whole = ask(prompts[6], max_tokens=20)
    [(ids, _)] = read(manual(model).submit(whole))
    counted = Counted(model)
    engine = manual(counted, block_size=4)
    resumed = replace(whole, resume=(tuple(ids[:17]),))
    read(engine.submit(resumed))
    assert (engine.stats().steps, counted.ran) == (3, len(prompts[6]) + 17 + 2)
    counted.ran = 0
    [stream] = engine.submit(resumed)
    *_, done = stream
    assert done.cached_tokens == len(prompts[6])
    assert counted.ran <= 4 + 2, "the tokens it was given are found too"


def test_n_answers_compute_the_prompt_once(model, prompts):
    whole = ask(prompts[6], temperature=1.0, seed=1, n=3, max_tokens=6)
    answers = read(manual(model).submit(whole))
    cuts = tuple(tuple(ids[:cut]) for (ids, _), cut in zip(answers, (6, 3, 0), strict=True))
    engine = manual(model, block_size=4)
    ends = [list(stream)[-1] for stream in engine.submit(replace(whole, resume=cuts))]
    shared = (len(prompts[6]) - 1) // 4 * 4
    assert [end.cached_tokens for end in ends][:2] == [0, 0], "one has ended, and the next computes it"
    assert ends[2].cached_tokens == shared


# Ends


@pytest.mark.parametrize(
    ("request_", "given", "reason", "stop_id"),
    [
        (ask([1, 2], max_tokens=3), (7, 8, 9), "length", None),
        (ask([1] * 120, max_tokens=None), (7,) * 8, "length", None),
        (ask([1, 2], eos_ids=(EOS,)), (7, EOS), "stop", EOS),
        (ask([1, 2], eos_ids=(EOS,), max_tokens=2), (7, EOS), "stop", EOS),
        (ask([1, 2], stop_token_ids=(9,)), (7, 9), "stop", 9),
        (ask([1, 2], lambda: Passing(2)), (7, 8), "stop", None),
        (ask([1, 2], Passing, eos_ids=(EOS,)), (7, 8, 9, 10, 11, EOS), "stop", EOS),
        (replace(ask([1, 2]), finished=frozenset({0})), (7, 8), "cancelled", None),
        (replace(ask([1, 2], eos_ids=(EOS,)), finished=frozenset({0})), (7, EOS), "stop", EOS),
    ],
)
def test_a_finished_answer_ends_without_a_step(model, request_, given, reason, stop_id):
    counted = Counted(model)
    engine = manual(counted)
    [stream] = engine.submit(replace(request_, resume=(given,)))
    *tokens, done = stream.poll()
    assert [token.id for token in tokens] == list(given)
    assert (done.reason, done.stop_id, done.completion_tokens) == (reason, stop_id, len(given))
    assert done.prompt_tokens == len(request_.ids)
    assert list(stream) == []
    stream.cancel()
    idle(engine)
    assert not engine.step()
    assert counted.ran == 0


def test_a_finished_answer_is_not_queued(model):
    engine = manual(model, limits=Limits(16, 1, queue=1))
    ended = ask([1], max_tokens=1, n=3)
    engine.submit(replace(ended, resume=((7,), (8,))))
    with pytest.raises(Overloaded):
        engine.submit(ask([1]))
    engine.submit(replace(ended, resume=((7,), (8,), (9,))))


def test_resumed_answers_are_the_same_with_a_thread(model, prompts):
    whole = ask(prompts[2], temperature=1.0, seed=1, n=2)
    first = read(manual(model).submit(whole))
    with Engine(model, poison=True) as engine:
        for cut in range(COUNT + 1):
            given = tuple(tuple(ids[:cut]) for ids, _ in first)
            assert read(engine.submit(replace(whole, resume=given))) == first


def test_prompt_logprobs_are_not_sent_again_on_resume(model, prompts):
    whole = ask(prompts[3], n=2, prompt_logprobs=1)
    answers = read(manual(model).submit(ask(prompts[3], n=2)))
    for cuts in ((0, 4), (4, 0), (4, 4)):
        given = tuple(tuple(ids[:cut]) for (ids, _), cut in zip(answers, cuts, strict=True))
        streams = manual(model).submit(replace(whole, resume=given))
        events = [list(stream) for stream in streams]
        told = [sum(isinstance(event, PromptLogprobs) for event in each) for each in events]
        assert told == [cuts[0] == 0, 0]
        assert [[e.id for e in each if isinstance(e, Token)] for each in events] == [ids for ids, _ in answers]


# Refusals


class Costly(Passing):
    def mask(self):
        if len(self.said) == 1:
            raise GrammarError("too costly")
        return super().mask()


@pytest.mark.parametrize(
    ("request_", "given", "error", "match"),
    [
        (ask([1]), ((1,), (2,)), InvalidParameter, "2 answers, but n is 1"),
        (ask([1]), ((1, V),), InvalidParameter, "61 is not in the vocabulary"),
        (ask([1]), ((-1,),), InvalidParameter, "-1, expected at least 0"),
        (ask([1]), ((1.5,),), InvalidParameter, "whole number"),
        (ask([1]), (1,), InvalidParameter, "expected a list of token ids"),
        (ask([1]), "12", InvalidParameter, "expected the token ids"),
        (ask([1]), 3, InvalidParameter, "expected the token ids"),
        (ask([1], max_tokens=3), ((1, 2, 3, 4),), InvalidParameter, "has room for 3"),
        (ask([1] * 120, max_tokens=None), ((1,) * 9,), InvalidParameter, "has room for 8"),
        (ask([1], n=2, eos_ids=(EOS,)), ((), (EOS, 1)), InvalidParameter, "answer 1 ends before its token 1"),
        (ask([1], Passing), ((1, 2, 5),), InvalidParameter, "does not allow 5 as token 2 of answer 0"),
        (ask([1], Passing, eos_ids=(EOS,)), ((1, 2, EOS),), InvalidParameter, "does not allow 5"),
        (ask([1], lambda: Passing(2)), ((1, 2, 3),), InvalidParameter, "ends before its token 2"),
        (ask([1], Costly), ((1, 2, 3),), GrammarError, "too costly"),
    ],
)
def test_impossible_resumed_tokens_are_errors(model, request_, given, error, match):
    engine = manual(model)
    with pytest.raises(error, match=match) as caught:
        engine.submit(replace(request_, resume=given))
    assert error is GrammarError or caught.value.param == "resume"
    assert "\n" not in str(caught.value)
    assert not engine.step()
