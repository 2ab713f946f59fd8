"""Grammar constraints in the engine: constraints over token ids, on the small model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from moesaic.engine import Done, Engine, Limits, Request, Sampling, Token
from moesaic.errors import GrammarError
from moesaic.ops import Batch

V = 61
EOS = 5


class Table:
    """A constraint that allows the ids of a table for each position; the answer may end at the positions ``whole``."""

    def __init__(self, table, whole=(), then=None):
        self.table, self.whole, self.then = table, whole, then
        self.said = []

    @property
    def at(self):
        return self.table[len(self.said)] if len(self.said) < len(self.table) else self.then or ()

    def mask(self):
        bits = np.zeros(-(-V // 32) * 32, dtype=bool)
        bits[list(self.at)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id):
        assert token_id in self.at
        self.said.append(token_id)

    @property
    def may_end(self):
        return len(self.said) in self.whole

    @property
    def done(self):
        return self.may_end and not self.at


class Made:
    """A factory that keeps the constraints it made."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.all = args, kwargs, []

    def __call__(self):
        self.all.append(Table(*self.args, **self.kwargs))
        return self.all[-1]


def ask(ids, constraint=None, eos_ids=(EOS,), **sampling):
    return Request(
        tuple(ids), Sampling(**{"temperature": 0, "max_tokens": 8} | sampling), eos_ids, constraint=constraint
    )


def answers(engine, *requests):
    """Return (ids, Done) of every answer."""
    streams = [stream for request in requests for stream in engine.submit(request)]
    out = []
    for stream in streams:
        *tokens, done = stream
        assert isinstance(done, Done)
        out.append(([token.id for token in tokens], done))
    return out


@pytest.fixture
def engine(model):
    return Engine(model, thread=False, poison=True)


SETS = [(7, 9, 30), (1, 2), tuple(range(20, 60)), (40,), (8, 60), tuple(range(EOS + 1, V))]
"""Allowed ids by position. 61 is not a multiple of 32, so the last word of a mask has unused bits."""


def oracle(model, prompt, sets):
    ids = list(prompt)
    with torch.inference_mode():
        for allowed in sets:
            logits = model.logits(model(Batch.whole([ids]))[-1:])[0]
            ids.append(max(allowed, key=lambda token_id: (float(logits[token_id]), -token_id)))
    return ids[len(prompt) :]


def test_greedy_takes_the_likeliest_allowed_token(engine, model, prompts):
    for prompt in prompts:
        made = Made(SETS, whole=(len(SETS),))
        [(ids, done)] = answers(engine, ask(prompt, made))
        assert ids == oracle(model, prompt, SETS) == made.all[0].said
        assert (done.reason, done.stop_id, done.completion_tokens) == ("stop", None, len(SETS))


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.3}, {"typical_p": 0.4}, {"min_p": 0.2}])
def test_draws_are_allowed_under_any_truncation(engine, options):
    # A bias and penalties that favour forbidden tokens.
    wants = {"logit_bias": {3: 100, 9: -100}, "repetition_penalty": 1.5, "presence_penalty": 2.0}
    for seed in range(5):
        made = Made(SETS, whole=(len(SETS),))
        requests = ask((1, 2, 3), made, temperature=20.0, seed=seed, n=3, **options, **wants)
        for ids, done in answers(engine, requests):
            assert all(token_id in allowed for token_id, allowed in zip(ids, SETS, strict=True))
            assert done.reason == "stop"
        assert len(made.all) == 3
        assert len({id(each) for each in made.all}) == 3


def test_bias_applies_among_allowed_tokens(engine):
    [(ids, _)] = answers(engine, ask((1, 2), Made([(7, 9, 30)] * 3, whole=(3,)), logit_bias={9: 100, 10: 100}))
    assert ids == [9, 9, 9]


def test_a_stop_id_needs_a_complete_answer(engine):
    def end_of(made, **sampling):
        [(ids, done)] = answers(engine, ask((1, 2), made, logit_bias={EOS: 100}, **sampling))
        return ids, done

    ids, done = end_of(Made([(7,)] * 6, whole=(2, 4, 6)))
    assert ids == [7, 7, EOS]
    assert (done.reason, done.stop_id) == ("stop", EOS)
    ids, _ = end_of(Made([(7,)] * 6, whole=(2, 4, 6)), min_tokens=3)
    assert ids == [7, 7, 7, 7, EOS]
    ids, done = end_of(Made([(7,)] * 6, whole=(2, 4, 6)), ignore_eos=True)
    assert (ids, done.stop_id) == ([7] * 6, None)
    ids, done = end_of(Made([], whole=(0,)))
    assert (ids, done.stop_id) == ([EOS], EOS)


def test_grammar_overrides_min_tokens(engine):
    made = Made([(7,), (8,)], whole=(2,))
    [(ids, done)] = answers(engine, ask((1,), made, min_tokens=6))
    assert (ids, done.reason) == ([7, 8], "stop")
    # Only a stop id is allowed, so it is chosen before min_tokens.
    [(ids, done)] = answers(engine, ask((1,), Made([(7,), (8,)], whole=(2,)), min_tokens=6, stop_token_ids=(8,)))
    assert (ids, done.stop_id) == ([7, 8], 8)
    [(ids, _)] = answers(engine, ask((1,), Made([(7, 8), (9,)], whole=(2,)), min_tokens=6, stop_token_ids=(8,)))
    assert ids == [7, 9]


def test_max_tokens_ends_the_answer(engine):
    [(ids, done)] = answers(engine, ask((1,), Made([(7,)] * 30, whole=(30,)), max_tokens=4))
    assert (ids, done.reason) == ([7] * 4, "length")
    [(ids, done)] = answers(engine, ask((1,), Made([(7,)] * 4, whole=(4,)), max_tokens=4))
    assert (ids, done.reason) == ([7] * 4, "stop")


def test_an_empty_mask_fails_only_its_answer(engine, prompts):
    alone = answers(engine, ask(prompts[0]))[0][0]
    dead, fine = engine.submit(ask(prompts[1], Made([(7,), ()]))), engine.submit(ask(prompts[0]))
    events = []
    with pytest.raises(GrammarError, match="no token") as caught:
        events.extend(iter(dead[0]))
    assert caught.value.status == 400
    assert [event.id for event in fine[0] if isinstance(event, Token)] == alone
    # The first of three answers fails; the others, which waited for its prompt, fail on their own.
    for stream in engine.submit(ask(prompts[2], Made([()]), n=3)):
        with pytest.raises(GrammarError):
            list(stream)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks, stats.numerical_errors) == (0, 0, stats.blocks, 0)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_other_sequences_get_the_same_tokens(engine, prompts, temperature):
    def plain(prompt, seed):
        return ask(prompt, temperature=temperature, seed=seed, repetition_penalty=1.2, max_tokens=12)

    alone = [answers(engine, plain(prompt, seed))[0][0] for seed, prompt in enumerate(prompts)]
    mixed = []
    for seed, prompt in enumerate(prompts):
        mixed += [plain(prompt, seed), ask(prompt, Made(SETS, whole=(len(SETS),)), temperature=temperature, seed=seed)]
    assert [ids for ids, _ in answers(engine, *mixed)][::2] == alone


def test_preemption_does_not_repeat_accepted_tokens(model, prompts):
    sets = [tuple(range(6 + n % 3, 50 + n % 7)) for n in range(25)]
    engine = Engine(model, thread=False, poison=True, block_size=2, cache_tokens=80, limits=Limits(40, 8))
    made = [Made(sets, whole=(25,)) for _ in prompts]
    order = sorted(prompts, key=len)
    requests = [ask(prompt, each, max_tokens=25) for prompt, each in zip(order, made, strict=True)]
    for prompt, each, (ids, _) in zip(order, made, answers(engine, *requests), strict=True):
        assert ids == each.all[0].said == oracle(model, prompt, sets)
    assert engine.stats().preemptions > 0


def test_reported_logprobs_ignore_the_grammar(engine, model):
    [stream] = engine.submit(ask((1, 2, 3), Made([(7, 9)], whole=(1,)), logprobs=2))
    token = next(stream)
    with torch.inference_mode():
        row = model.logits(model(Batch.whole([[1, 2, 3]]))[-1:])[0].log_softmax(-1)
    assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)
    assert [token_id for token_id, _ in token.top] == row.topk(2).indices.tolist()


# Allowed ids and forbidden continuations


def test_only_allowed_ids_are_generated(engine):
    allowed = (7, 9, 30)
    for seed in range(3):
        [(ids, done)] = answers(engine, ask((1, 2), temperature=20.0, seed=seed, allowed_token_ids=allowed))
        assert set(ids) <= set(allowed) and done.reason == "length"
    [(ids, _)] = answers(engine, ask((1, 2), allowed_token_ids=(EOS, 7), logit_bias={EOS: 100}, min_tokens=3))
    assert ids == [7, 7, 7, EOS]
    [(ids, _)] = answers(engine, ask((1, 2), allowed_token_ids=(EOS,), min_tokens=3))
    assert ids == [EOS]
    [(ids, _)] = answers(engine, ask((1, 2), Made([(7, 9)] * 2, whole=(2,)), allowed_token_ids=(9, 10)))
    assert ids == [9, 9]


def never_twice(generated):
    return generated[-1:]


def test_forbidden_tokens_do_not_follow(model, prompts):
    def forbidding(prompt, resume=(), **sampling):
        sampling = Sampling(**{"temperature": 0, "max_tokens": 12, "logit_bias": {7: 100, 9: 99}} | sampling)
        return Request(tuple(prompt), sampling, (EOS,), forbidden=never_twice, resume=resume)

    for prompt in prompts[:2]:
        engine = Engine(model, thread=False, poison=True)
        [(whole, _)] = answers(engine, forbidding(prompt))
        assert whole == [7, 9] * 6
        [(resumed, _)] = answers(engine, forbidding(prompt, resume=(tuple(whole[:5]),)))
        assert resumed == whole
    # Preempted sequences go on as if nothing had happened.
    small = Engine(model, cache_tokens=96, block_size=4, thread=False, limits=Limits(batch_tokens=16, sequences=4))
    drawn = [forbidding(prompt, temperature=5.0, seed=3, logit_bias={}) for prompt in prompts[:3]]
    alone = [answers(Engine(model, thread=False), request)[0][0] for request in drawn]
    assert [ids for ids, _ in answers(small, *drawn)] == alone
    assert all(one != other for ids in alone for one, other in pairwise(ids))


def test_an_answer_that_no_token_may_continue_fails(engine):
    request = Request((1, 2), Sampling(allowed_token_ids=(7,), max_tokens=4), (EOS,), forbidden=never_twice)
    [stream] = engine.submit(request)
    with pytest.raises(GrammarError, match="no token is left"):
        list(stream)
