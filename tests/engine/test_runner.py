import copy

import pytest
import torch

from moesaic.engine.blocks import Blocks
from moesaic.engine.request import Request, Sampling, Token
from moesaic.engine.runner import SCORED_ROWS, Runner
from moesaic.engine.scheduler import Limits, Scheduler
from moesaic.ops import Batch

BAD = 60


@pytest.fixture
def broken(model):
    """A model in which the embedding of one token is NaN."""
    out = copy.deepcopy(model)
    with torch.no_grad():
        next(out.embed.weight.parameters())[BAD] = torch.nan
    return out


def make(model, batch_tokens=256, blocks=64, size=4, poison=True, dtype=torch.float32):
    runner = Runner(model, blocks, size, dtype, torch.device("cpu"), poison=poison)
    return runner, Scheduler(Blocks(blocks, size), Limits(batch_tokens, 8), model.max_length, model.window)


def add(scheduler, ids, **sampling):
    sequences = scheduler.prepare(Request(tuple(ids), Sampling(0, **sampling)), 0)
    scheduler.add(sequences)
    return sequences[0]


def test_only_the_broken_sequence_fails(broken, model, greedy):
    runner, scheduler = make(broken)
    good, bad, other = (add(scheduler, ids) for ids in ([1, 2, 3], [4, BAD, 5, 6], [7, 8]))
    outcome = runner.run(scheduler.schedule())
    assert outcome.failed == {bad}
    for sequence in (good, other):
        [token] = outcome.tokens[sequence]
        assert [token.id] == greedy(model, sequence.ids, 1)
    assert bad not in outcome.tokens


def test_a_broken_prompt_chunk_is_never_shared(broken):
    runner, scheduler = make(broken, batch_tokens=8)
    bad = add(scheduler, [1, 2, BAD, *range(20)])
    step = scheduler.schedule()
    assert not step.runs[0].samples
    assert runner.run(step).failed == {bad}


def test_infinite_logits_of_a_finite_hidden_state_fail(model):
    inf = copy.deepcopy(model)
    with torch.no_grad():
        next(inf.head.weight.parameters())[3] = torch.inf
    runner, scheduler = make(inf)
    bad = add(scheduler, [1, 2, 3])
    assert runner.run(scheduler.schedule()).failed == {bad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_wipe_clears_only_the_given_blocks(model, dtype):
    runner, _ = make(model, blocks=3, dtype=dtype)
    before = [part.clone() for part in runner.cache.tensors()]
    runner.wipe([0, 2])
    for part, was in zip(runner.cache.tensors(), before, strict=True):
        assert torch.equal(part[[0, 2]], torch.zeros_like(part[[0, 2]]))
        assert torch.equal(part[1].nan_to_num(9), was[1].nan_to_num(9))
    runner.wipe([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("poison", [True, False])
def test_the_cache_has_the_models_shape(model, poison, dtype):
    runner, _ = make(model, blocks=3, size=5, poison=poison, dtype=dtype)
    assert [tuple(layer.shape) for layer in runner.cache.keys] == [(3, 5, 2, 8)] * 2
    for part in runner.cache.tensors():
        expected = -128 if part.dtype == torch.int8 else torch.nan
        assert torch.equal(
            part.float().nan_to_num(9), torch.full(part.shape, expected if poison else 0.0).nan_to_num(9)
        )


@pytest.mark.parametrize("batch_tokens", [8, 13, 256])
@pytest.mark.parametrize("length", [1, 2, SCORED_ROWS + 1, SCORED_ROWS + 30])
def test_prompt_logprobs_do_not_depend_on_chunking(model, batch_tokens, length):
    ids = torch.randint(61, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    runner, scheduler = make(model, batch_tokens)
    add(scheduler, ids, prompt_logprobs=2, max_tokens=1)
    events = []
    while not events:
        step = scheduler.schedule()
        events = scheduler.update(step, runner.run(step))
    prompt = events[0][1][0]
    with torch.inference_mode():
        expected = model.logits(model(Batch.whole([ids]))).log_softmax(-1)
    assert prompt.tokens[0] == Token(ids[0])
    assert [token.id for token in prompt.tokens] == ids
    for place, token in enumerate(prompt.tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(expected[place].topk(2).values.tolist(), abs=1e-4)
