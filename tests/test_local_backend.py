"""Tests of the local backend without HTTP: a reply resumes on another backend, and token limits."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest

from moesaic import LLM, errors
from moesaic.backend import Delta, Finished, GenerationRequest, PromptDone, TokenLimits
from moesaic.builtin import TALES_FOLDER
from moesaic.cli import _parser, tgi_launcher
from moesaic.cli.serving import open_model, served_options
from moesaic.local_backend import LocalBackend
from moesaic.local_stream import MAX_UNREAD_EVENTS
from moesaic.plan import make_plan
from tests.support.event_loop import async_test
from tests.support.memory import resident

TALK = ({"role": "user", "content": "Tell me of a fox."},)
CALL = {"tool_choice": "required", "parallel_tool_calls": False}
CLOCK = {"type": "function", "function": {"name": "clock"}}
GREEDY = {"temperature": 0, "max_tokens": 12}
BYTES = {"seed": 1, "temperature": 2.0, "max_tokens": 12, "logit_bias": dict.fromkeys(range(3, 259), 100)}
REQUESTS = [
    GenerationRequest(messages=TALK, sampling=GREEDY),
    GenerationRequest(messages=TALK, sampling={"temperature": 1.2, "seed": 4, "n": 3, "max_tokens": 12, "logprobs": 1}),
    GenerationRequest(prompt="Once", sampling=BYTES),
    GenerationRequest(
        messages=(*TALK, {"role": "assistant", "content": "The fox"}), continue_final=True, sampling=GREEDY
    ),
    GenerationRequest(messages=TALK, sampling={"temperature": 1.5, "seed": 2}, grammar=("regex", "[éß🦊]{4,6}")),
    GenerationRequest(messages=TALK, sampling=GREEDY | {"max_tokens": 99}, tools=(CLOCK,), **CALL),
    GenerationRequest(messages=TALK, sampling=GREEDY | {"prompt_logprobs": 0}),
]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for resident pages")
@async_test
async def test_the_cache_of_a_server_grows_with_use():
    args = tgi_launcher.translate(_parser().parse_args(["serve", "tales"]), {}).args
    backend = await open_model(make_plan(TALES_FOLDER, served_options(args, TALES_FOLDER)), args, "tales", None)
    try:
        keys = backend._llm.engine._runner.cache.keys[0]
        assert resident(keys) == 0
        async for _ in await backend.generate(REQUESTS[0]):
            pass
        assert 0 < resident(keys) < keys.nbytes / 8
    finally:
        await backend.close()


@asynccontextmanager
async def open_backend(folder):
    backend = LocalBackend(LLM.load(folder))
    try:
        yield backend
    finally:
        await backend.close()


class Reader:
    """Reply as a client sees it, possibly from several backends."""

    def __init__(self):
        self.ids, self.text, self.calls, self.ended = [], "", [], None
        self.repeated_tokens = self.repeated_chars = 0  # still to come again after a resume

    def take(self, event):
        if isinstance(event, Finished):
            self.ended = msgspec.structs.replace(event, cached_tokens=0)
        elif isinstance(event, Delta):
            repeated = min(len(event.tokens), self.repeated_tokens)
            self.repeated_tokens -= repeated
            self.ids += [info.id for info in event.tokens[repeated:]]
            assert all(info.logprob is None for info in event.tokens[:repeated])
            dropped = min(len(event.text), self.repeated_chars)
            self.repeated_chars -= dropped
            self.text += event.text[dropped:]
            if not repeated:
                self.calls += [(call.index, call.name, call.arguments) for call in event.calls]

    def content(self):
        return self.ids, self.text, self.calls, self.ended


async def read(backend, request, readers, max_tokens=10**6):
    """Read until an unfinished choice has ``max_tokens`` tokens or all have finished; return the PromptDone events."""
    stream = await backend.generate(request)
    prompts = []
    async for event in stream:
        if isinstance(event, PromptDone):
            prompts.append(event)
        else:
            assert event.index in {prompt.index for prompt in prompts}
            readers[event.index].take(event)
            if any(len(reader.ids) >= max_tokens and not reader.ended for reader in readers):
                stream.cancel()
                break
    return prompts


async def resume_on(one, other, request, whole, cut):
    """Read ``cut`` tokens of a reply from one backend and resume it on the other; compare the result with ``whole``."""
    readers = [Reader() for _ in whole]
    await read(one, request, readers, cut)
    for reader in readers:
        reader.repeated_tokens, reader.repeated_chars, reader.ended = len(reader.ids), len(reader.text), None
    written = msgspec.json.encode([reader.ids for reader in readers])
    resume = msgspec.json.decode(written, type=tuple[tuple[int, ...], ...])
    prompts = await read(other, replace(request, resume=resume), readers)
    assert [reader.content() for reader in readers] == [reader.content() for reader in whole]
    return prompts


@async_test
async def test_a_reply_resumes_on_another_backend(talker):
    async with open_backend(talker) as one, open_backend(talker) as other:
        for request in REQUESTS:
            whole = [Reader() for _ in range(request.sampling.get("n", 1))]
            first = await read(one, request, whole)
            max_tokens = max(len(reader.ids) for reader in whole)
            cuts = range(1, max_tokens, max(1, max_tokens // 11))
            for prompts in await asyncio.gather(*(resume_on(one, other, request, whole, cut) for cut in cuts)):
                assert [prompt.prompt_tokens for prompt in prompts] == [prompt.prompt_tokens for prompt in first]
                assert not prompts[0].prompt, "prompt logprobs must not be repeated"


@async_test
async def test_a_long_resumed_reply_is_not_a_slow_reader(talker):
    async with open_backend(talker) as backend:
        long = (7,) * (MAX_UNREAD_EVENTS + 500)
        request = GenerationRequest(
            prompt="Once", sampling={"max_tokens": len(long) + 2, "ignore_eos": True}, resume=(long,)
        )
        reader = Reader()
        await read(backend, request, [reader])
        assert reader.ids[: len(long)] == list(long)
        assert (reader.ended.generated_tokens, reader.ended.reason) == (len(long) + 2, "length")


@async_test
async def test_impossible_resume_tokens_are_refused(talker):
    async with open_backend(talker) as backend:
        for resume in (((1,), (1,)), ((32000,),), ((5000,) * 5000,), ((2, 5000),)):
            with pytest.raises(errors.InvalidParameter, match="resume"):
                await backend.generate(GenerationRequest(messages=TALK, resume=resume))
        assert backend.stats()["talker0"].prompt_tokens == 0


@async_test
async def test_token_limits_are_checked_where_the_prompt_is_tokenized(talker):
    async with open_backend(talker) as backend:
        prompt = len(await backend.tokenize(GenerationRequest(prompt="Once upon")))
        limits = TokenLimits(total=prompt + 3)
        request = GenerationRequest(prompt="Once upon", limits=limits, sampling={**BYTES, "ignore_eos": True})
        unbounded = replace(request, sampling={**request.sampling, "max_tokens": None})
        *_, finished = [event async for event in await backend.generate(unbounded)]
        assert (finished.generated_tokens, finished.reason) == (3, "length")
        with pytest.raises(errors.InvalidRequest, match=f"must be <= {prompt + 3}. Given: {prompt} `inputs` tokens"):
            await backend.generate(replace(request, sampling={**request.sampling, "max_tokens": 4}))
        with pytest.raises(errors.InvalidRequest, match=f"less than {prompt - 1} tokens"):
            await backend.generate(replace(request, limits=TokenLimits(prompt=prompt - 1), sampling={}))
