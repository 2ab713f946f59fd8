import copy
import queue
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from moesaic.engine import Done, Engine, Limits, PromptLogprobs, Request, Sampling, Token
from moesaic.errors import (
    EngineStopped,
    InvalidParameter,
    MoesaicError,
    NumericalError,
    Overloaded,
    PromptTooLong,
)
from moesaic.ops import Batch

BAD = 60
NEW = 10


def ask(ids, temperature=0.0, max_tokens=NEW, eos_ids=(), priority=0, salt="", **sampling):
    return Request(tuple(ids), Sampling(temperature, max_tokens=max_tokens, **sampling), eos_ids, priority, salt)


def ids_of(events):
    return [event.id for event in events if isinstance(event, Token)]


def run(engine, requests):
    """Submit all, then read all: ids for each stream, and their ends."""
    streams = [stream for request in requests for stream in engine.submit(request)]
    events = [list(stream) for stream in streams]
    assert all(isinstance(e[-1], Done) and sum(isinstance(x, Done) for x in e) == 1 for e in events)
    return [ids_of(e) for e in events], [e[-1] for e in events]


def manual(model, **options):
    return Engine(model, thread=False, poison=True, **options)


def idle(engine):
    """Assert that nothing is left of anybody."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.blocks)
    engine._scheduler.blocks.check([])


@pytest.fixture
def broken(model):
    out = copy.deepcopy(model)
    with torch.no_grad():
        next(out.embed.weight.parameters())[BAD] = torch.nan
    return out


class Faulty(nn.Module):
    """A model that raises at its n-th step."""

    def __init__(self, model, step, error):
        super().__init__()
        self.model, self.left, self.error = model, step, error
        self.vocab_size, self.max_length = model.vocab_size, model.max_length
        self.window, self.cache_shapes, self.logits = model.window, model.cache_shapes, model.logits
        self.go = threading.Event()
        self.go.set()

    def forward(self, batch):
        self.go.wait()
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.model(batch)


# What is said does not depend on how it is computed


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 32])
@pytest.mark.parametrize(("batch_tokens", "sequences"), [(9, 9), (40, 3), (512, 64)])
def test_greedy_answers_are_those_of_the_bare_model(model, greedy, prompts, block_size, batch_tokens, sequences):
    engine = manual(model, block_size=block_size, cache_tokens=1024, limits=Limits(batch_tokens, sequences))
    answers, _ = run(engine, [ask(prompt) for prompt in prompts])
    assert answers == [greedy(model, prompt, NEW) for prompt in prompts]
    idle(engine)


@pytest.mark.parametrize("block_size", [1, 4, 9])
def test_on_a_cache_that_barely_holds_one_request_too(model, greedy, prompts, block_size):
    need = max(map(len, prompts)) + NEW
    engine = manual(model, block_size=block_size, cache_tokens=-(-need // block_size) * block_size)
    answers, _ = run(engine, [ask(prompt) for prompt in prompts])
    assert answers == [greedy(model, prompt, NEW) for prompt in prompts]
    idle(engine)


def test_preempted_answers_are_the_same(model, greedy, prompts):
    engine = manual(model, block_size=2, cache_tokens=80)
    order = sorted(prompts, key=len)
    answers, ends = run(engine, [ask(prompt, max_tokens=25) for prompt in order])
    assert engine.stats().preemptions > 0
    assert sum(end.preemptions for end in ends) == engine.stats().preemptions
    assert answers == [greedy(model, prompt, 25) for prompt in order]


def test_a_second_time_the_prefix_cache_answers_the_same(model, greedy, prompts):
    engine = manual(model, block_size=4)
    first, _ = run(engine, [ask(prompt) for prompt in prompts])
    second, ends = run(engine, [ask(prompt) for prompt in prompts])
    assert first == second
    assert [end.cached_tokens for end in ends] == [(len(prompt) - 1) // 4 * 4 for prompt in prompts]
    assert engine.stats().cached_tokens >= sum(end.cached_tokens for end in ends)


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("batch_tokens", [8, 512])
def test_a_sliding_window_answers_the_same_on_a_cache_smaller_than_the_prompt(
    windowed, greedy, prompts, block_size, batch_tokens
):
    # 9 places are seen; with the block being written, and a block begun before them, this is the least there can be.
    blocks = -(-(9 - 1) // block_size) + 1
    engine = manual(windowed, block_size=block_size, cache_tokens=blocks * block_size, limits=Limits(batch_tokens, 8))
    assert engine.capacity == windowed.max_length
    answers, _ = run(engine, [ask(prompt) for prompt in prompts])
    assert answers == [greedy(windowed, prompt, NEW) for prompt in prompts]
    idle(engine)


@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("model", {"block_size": 1, "limits": Limits(9, 9)}),
        ("model", {"block_size": 16, "limits": Limits(40, 3)}),
        ("model", {"block_size": 2, "cache_tokens": 60}),
        ("windowed", {"block_size": 3, "limits": Limits(8, 8)}),
    ],
)
def test_an_int8_cache_answers_the_same_whatever_the_company(which, options, prompts, request):
    """Batched, in pieces, preempted, and from the prefix cache: as alone."""
    model = request.getfixturevalue(which)
    asked = [ask(prompt, max_tokens=15) for prompt in sorted(prompts, key=len)[:6]]
    alone = [run(manual(model, dtype=torch.int8), [each])[0][0] for each in asked]
    engine = manual(model, dtype=torch.int8, **options)
    for _ in range(2):
        answers, _ = run(engine, asked)
        assert answers == alone
    assert engine.stats().cached_tokens > 0
    assert (engine.stats().preemptions > 0) == ("cache_tokens" in options)
    idle(engine)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 32),
    st.integers(8, 64),
    st.integers(1, 8),
    st.integers(50, 200),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_seeded_answers_are_the_same_alone_and_in_a_crowd(
    exact, prompts, block_size, batch_tokens, sequences, tokens, seed, window
):
    request = ask(prompts[3], temperature=1.0, seed=seed, max_tokens=8, n=2, top_p=0.9, repetition_penalty=1.2)
    alone, _ = run(manual(exact), [request])
    tokens = max(tokens, 64)
    engine = manual(
        exact,
        block_size=block_size,
        cache_tokens=tokens // block_size * block_size,
        limits=Limits(batch_tokens, sequences),
    )
    crowd = [ask(prompt, temperature=2.0, max_tokens=12, priority=i % 2) for i, prompt in enumerate(prompts[:5])]
    together, _ = run(engine, [*crowd, request])
    assert together[-2:] == alone
    assert alone[0] != alone[1]
    idle(engine)


def test_without_a_seed_answers_differ(model, prompts):
    engine = manual(model)
    answers, _ = run(engine, [ask(prompts[0], temperature=2.0, max_tokens=20)] * 2)
    assert answers[0] != answers[1]


def test_n_answers_compute_the_prompt_once(model, prompts):
    prompt = prompts[6]
    engine = manual(model, block_size=4)
    _, ends = run(engine, [ask(prompt, temperature=1.0, n=4)])
    shared = (len(prompt) - 1) // 4 * 4
    assert [end.cached_tokens for end in ends] == [0, shared, shared, shared]


# Ends


def test_eos_and_stop_ids_end_an_answer_and_are_its_last_token(model, greedy, prompts):
    text = greedy(model, prompts[0], NEW)
    stop = next(i for i in range(1, NEW) if text[i] not in text[:i])
    for request in (ask(prompts[0], eos_ids=(59, text[stop])), ask(prompts[0], stop_token_ids=(text[stop],))):
        [answer], [done] = run(manual(model), [request])
        assert answer == text[: stop + 1]
        assert (done.reason, done.stop_id) == ("stop", text[stop])
        assert (done.prompt_tokens, done.completion_tokens) == (len(prompts[0]), stop + 1)
    [answer], [done] = run(manual(model), [ask(prompts[0], eos_ids=(text[stop],), ignore_eos=True)])
    assert (answer, done.reason, done.stop_id) == (text, "length", None)


def test_min_tokens_holds_off_the_end(model, greedy, prompts):
    text = greedy(model, prompts[0], 1)
    [answer], _ = run(manual(model), [ask(prompts[0], eos_ids=(text[0],), min_tokens=4)])
    assert len(answer) >= 4
    assert text[0] not in answer[:4]


def test_an_answer_ends_where_the_context_does(model):
    [answer], [done] = run(manual(model), [ask([1] * 120, max_tokens=None)])
    assert (len(answer), done.reason) == (model.max_length - 120, "length")


def test_a_context_shorter_than_the_models_is_kept_to(model):
    engine = manual(model, context=20)
    [answer], _ = run(engine, [ask([1] * 15, max_tokens=None)])
    assert len(answer) == 5
    with pytest.raises(PromptTooLong):
        engine.submit(ask([1] * 20))


def test_logprobs_come_with_tokens_and_the_prompts_come_first(model, prompts):
    engine = manual(model, block_size=4)
    run(engine, [ask(prompts[5])])  # so that there would be something to find
    [stream] = engine.submit(ask(prompts[5], logprobs=2, prompt_logprobs=1))
    prompt, *tokens, done = stream
    assert isinstance(prompt, PromptLogprobs)
    assert [token.id for token in prompt.tokens] == list(prompts[5])
    assert all(token.logprob is not None and len(token.top) == 1 for token in prompt.tokens[1:])
    assert all(token.top[0][0] == token.id and token.logprob == token.top[0][1] for token in tokens)
    assert done.cached_tokens == 0
    streams = engine.submit(ask(prompts[5], temperature=1.0, prompt_logprobs=1, n=2))
    assert [sum(isinstance(e, PromptLogprobs) for e in stream) for stream in streams] == [1, 0]


@pytest.mark.parametrize("start", [0, 1, 5, 12, 13, 14, 40])
def test_prompt_logprobs_from_a_token_on_read_the_prefix_cache_before_it(model, start):
    ids = tuple(torch.randint(60, (14,)).tolist())
    [whole] = [next(stream) for stream in manual(model).submit(ask(ids, prompt_logprobs=1))]
    engine = manual(model, block_size=4)
    for found in (0, max(0, min(start, 14) - 1) // 4 * 4):  # the second time, the cache has the prompt
        request = replace(ask(ids, max_tokens=1, prompt_logprobs=1), prompt_logprobs_start=start)
        [stream] = engine.submit(request)
        prompt, *_, done = stream
        assert done.cached_tokens == found
        assert [token.id for token in prompt.tokens] == list(ids)
        assert all(token.logprob is None and not token.top for token in prompt.tokens[: max(1, start)])
        for token, other in list(zip(prompt.tokens, whole.tokens, strict=True))[max(1, start) :]:
            assert token.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert token.top[0][0] == other.top[0][0]


def test_a_context_one_token_longer_than_the_models_has_room_for_a_last_token_that_is_not_read(model):
    ids = torch.randint(60, (128,)).tolist()
    with pytest.raises(PromptTooLong):
        manual(model).submit(ask(ids))
    [answer], [done] = run(manual(model, context=129), [ask(ids)])
    with torch.inference_mode():
        assert answer == [int(model.logits(model(Batch.whole([ids])))[-1].argmax())]
    assert done.reason == "length"


# Refusals


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (ask([61]), InvalidParameter, "prompt"),
        (ask([1], eos_ids=(61,)), InvalidParameter, "eos_ids"),
        (ask([1], stop_token_ids=(5, 61)), InvalidParameter, "stop_token_ids"),
        (ask([1], logit_bias={61: 1.0}), InvalidParameter, "logit_bias"),
        (ask([1] * 128), PromptTooLong, None),
    ],
)
def test_what_cannot_be_done_is_refused_at_submit(model, request_, error, param):
    engine = manual(model)
    with pytest.raises(error) as caught:
        engine.submit(request_)
    assert getattr(caught.value, "param", None) == param
    assert not engine.step()


def test_a_full_queue_refuses_and_later_does_not(model):
    engine = manual(model, limits=Limits(16, 2, queue=2))
    streams = engine.submit(ask([1], temperature=1.0, n=2))
    with pytest.raises(Overloaded):
        engine.submit(ask([1]))
    engine.step()
    engine.submit(ask([1]))
    assert [len(list(stream)) for stream in streams] == [NEW + 1] * 2


@pytest.mark.parametrize("options", [{"block_size": 0}, {"cache_tokens": 15}, {"context": 1}, {"context": 130}])
def test_impossible_sizes_are_refused(model, options):
    with pytest.raises(InvalidParameter):
        Engine(model, thread=False, **options)


# Failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_nan_ends_its_request_alone_and_leaves_nothing_behind(broken, model, prompts, dtype):
    texts = {prompt: run(manual(model, dtype=dtype), [ask(prompt)])[0][0] for prompt in prompts}
    texts = {prompt: text for prompt, text in texts.items() if BAD not in (*prompt, *text)}
    assert len(texts) >= 2
    engine = Engine(broken, thread=False, block_size=4, limits=Limits(16, 8), dtype=dtype)
    good = [engine.submit(ask(prompt))[0] for prompt in texts]
    bad = [1, 2, 3, 4, 5, 6, 7, 8, BAD]
    for stream in engine.submit(ask(bad, temperature=1.0, n=2)):
        with pytest.raises(NumericalError):
            list(stream)
        assert list(stream) == [], "it is raised once"
    assert [ids_of(list(stream)) for stream in good] == list(texts.values())
    assert engine.stats().numerical_errors == 2
    idle(engine)
    assert not any(part.isnan().any() for part in engine._runner.cache.tensors())
    _, [done] = run(engine, [ask(bad[:8], max_tokens=1)])
    assert done.cached_tokens == 0


def test_a_broken_token_in_mid_answer_ends_it_after_what_was_good(broken, model, greedy, prompts):
    prompt, text = next((p, t) for p in prompts if BAD not in p and BAD in (t := greedy(model, p, 30))[1:-1])
    [stream] = manual(broken).submit(ask(prompt, max_tokens=30))
    seen = [next(stream).id for _ in range(text.index(BAD) + 1)]
    assert seen == text[: len(seen)]
    with pytest.raises(NumericalError):
        next(stream)


@pytest.mark.parametrize("thread", [True, False])
def test_when_the_model_breaks_every_stream_ends_with_the_cause(model, prompts, thread):
    cause = RuntimeError("no more")
    faulty = Faulty(model, 3, cause)
    engine = Engine(faulty, thread=thread, limits=Limits(16, 2))
    faulty.go.clear()  # else the thread may be through with it before all have asked
    streams = [engine.submit(ask(prompt))[0] for prompt in prompts[:5]]
    faulty.go.set()
    for stream in streams:
        with pytest.raises(EngineStopped, match="RuntimeError: no more") as caught:
            list(stream)
        assert caught.value.__cause__ is cause
        assert list(stream) == []
    with pytest.raises(EngineStopped) as caught:
        engine.submit(ask([1]))
    assert caught.value.__cause__ is cause
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_even_what_is_no_exception_ends_every_stream(model):
    class Panic(BaseException):
        pass

    engine = Engine(Faulty(model, 1, Panic()))
    [stream] = engine.submit(ask([1]))
    with pytest.raises(EngineStopped):
        list(stream)
    with pytest.raises(EngineStopped):
        engine.submit(ask([1]))
    engine.close()


@pytest.mark.parametrize("thread", [True, False])
def test_closing_ends_what_runs_and_may_be_repeated(model, thread):
    with Engine(model, thread=thread, limits=Limits(1, 1)) as engine:
        [running], [waiting] = (engine.submit(ask([1], max_tokens=100)) for _ in range(2))
        next(running)
    for stream in (running, waiting):
        with pytest.raises(EngineStopped, match="closed"):
            list(stream)
    with pytest.raises(EngineStopped):
        engine.submit(ask([1]))
    engine.close()
    assert engine._thread not in threading.enumerate()


# Cancelling, threads, and those who do not want to wait


def test_cancelling_frees_the_blocks_within_a_step(model, prompts):
    engine = manual(model)
    [a], [b] = (engine.submit(ask(prompt, max_tokens=100)) for prompt in prompts[:2])
    for stream in (a, b):
        next(stream)
    a.cancel()
    engine.step()
    assert engine.stats().running == 1
    *_, done = a
    assert done.reason == "cancelled"
    a.cancel()
    b.cancel()
    assert list(b)[-1].reason == "cancelled"
    idle(engine)


def test_cancelling_what_waits(model):
    engine = manual(model, limits=Limits(1, 1))
    [a], [b] = (engine.submit(ask([1])) for _ in range(2))
    b.cancel()
    assert [event.reason for event in b] == ["cancelled"]
    assert len(list(a)) == NEW + 1


def test_many_threads_submit_read_and_cancel(model, greedy, prompts):
    expected = {prompt: greedy(model, prompt, NEW) for prompt in prompts}
    wrong = queue.SimpleQueue()
    with Engine(model, block_size=2, cache_tokens=120, poison=True) as engine:

        def talk(number):
            for turn in range(4):
                prompt = prompts[(number + turn) % len(prompts)]
                [stream] = engine.submit(ask(prompt))
                if (number + turn) % 5 == 0:
                    next(stream)
                    stream.cancel()
                answer = ids_of(list(stream))
                if (number + turn) % 5 and answer != expected[prompt]:
                    wrong.put((prompt, answer))

        threads = [threading.Thread(target=talk, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong.empty()
        idle(engine)


def test_a_listener_is_told_once_a_step_and_polls(model, prompts):
    told = queue.SimpleQueue()
    engine = Engine(model)
    engine.listen(told.put)
    streams = engine.submit(ask(prompts[1], temperature=1.0, n=2))
    seen, ended = {stream: [] for stream in streams}, set()
    while len(ended) < 2:  # one that has polled its end already may be told of once more
        streams = told.get(timeout=30)
        assert len(set(streams)) == len(streams)
        for stream in streams:
            seen[stream] += stream.poll()
            if isinstance(seen[stream][-1], Done):
                ended.add(stream)
    assert [len(events) for events in seen.values()] == [NEW + 1] * 2
    assert all(stream.poll() == [] for stream in streams)
    engine.close()


def test_polling_gives_what_came_before_an_error_and_then_the_error(model):
    engine = Engine(Faulty(model, 2, RuntimeError()), thread=False)
    [stream] = engine.submit(ask([1]))
    while engine.step():
        pass
    assert len(stream.poll()) == 2
    with pytest.raises(MoesaicError):
        stream.poll()
    assert stream.poll() == []


def test_priorities_reach_the_scheduler(model):
    engine = manual(model, limits=Limits(8, 1))
    [low] = engine.submit(ask([1], priority=5))
    [high] = engine.submit(ask([1], priority=-5))
    list(high)
    assert low.poll() == []
    assert len(list(low)) == NEW + 1


def test_importing_the_engine_does_not_import_torch():
    code = "import sys, moesaic.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=sys.path[0] or None, check=False).returncode == 0
