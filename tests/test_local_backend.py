"""The door to a model in this process, without HTTP: an answer moves from one to another in mid-word."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest

from moesaic import LLM, errors
from moesaic.backend import Delta, Finished, GenerationRequest, PromptDone, TokenLimits
from moesaic.local_backend import MAX_UNREAD_EVENTS, LocalBackend

TALK = ({"role": "user", "content": "Tell me of a fox."},)
CALL = {"tool_choice": "required", "parallel_tool_calls": False}
CLOCK = {"type": "function", "function": {"name": "clock"}}
GREEDY = {"temperature": 0, "max_tokens": 12}
BYTES = {"seed": 1, "temperature": 2.0, "max_tokens": 12, "logit_bias": dict.fromkeys(range(3, 259), 100)}
ASKS = [
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


@asynccontextmanager
async def opened(folder):
    backend = LocalBackend(LLM.load(folder))
    try:
        yield backend
    finally:
        await backend.close()


class Reader:
    """What a client has of an answer, whoever it comes from."""

    def __init__(self):
        self.ids, self.text, self.calls, self.ended = [], "", [], None
        self.known = self.passed = 0  # tokens and characters that come again

    def take(self, event):
        if isinstance(event, Finished):
            self.ended = replace(event, cached_tokens=0)
        elif isinstance(event, Delta):
            again = min(len(event.tokens), self.known)
            self.known -= again
            self.ids += [mark.id for mark in event.tokens[again:]]
            assert all(mark.logprob is None for mark in event.tokens[:again])
            dropped = min(len(event.text), self.passed)
            self.passed -= dropped
            self.text += event.text[dropped:]
            if not again:
                self.calls += [(call.index, call.name, call.arguments) for call in event.calls]

    def have(self):
        return self.ids, self.text, self.calls, self.ended


async def listen(backend, ask, readers, most=10**6):
    """Read until an answer that has not ended has ``most`` tokens, or all have ended."""
    answers = await backend.generate(ask)
    begun = []
    async for event in answers:
        if isinstance(event, PromptDone):
            begun.append(event)
        else:
            assert event.index in {each.index for each in begun}
            readers[event.index].take(event)
            if any(len(each.ids) >= most and not each.ended for each in readers):
                answers.cancel()
                break
    return begun


async def moved(one, other, ask, whole, cut):
    """Read an answer from one door up to ``cut`` tokens, and go on at another's."""
    found = [Reader() for _ in whole]
    await listen(one, ask, found, cut)
    for each in found:
        each.known, each.passed, each.ended = len(each.ids), len(each.text), None
    written = msgspec.json.encode([each.ids for each in found])
    resume = msgspec.json.decode(written, type=tuple[tuple[int, ...], ...])
    begun = await listen(other, replace(ask, resume=resume), found)
    assert [each.have() for each in found] == [each.have() for each in whole]
    return begun


def test_a_reply_resumes_on_another_backend(talker):
    async def main():
        async with opened(talker) as one, opened(talker) as other:
            for ask in ASKS:
                whole = [Reader() for _ in range(ask.sampling.get("n", 1))]
                first = await listen(one, ask, whole)
                most = max(len(each.ids) for each in whole)
                cuts = range(1, most, max(1, most // 11))
                for begun in await asyncio.gather(*(moved(one, other, ask, whole, cut) for cut in cuts)):
                    assert [each.prompt_tokens for each in begun] == [each.prompt_tokens for each in first]
                    assert not begun[0].prompt, "they were told before"

    asyncio.run(main())


def test_a_long_resumed_reply_is_not_a_slow_reader(talker):
    async def main():
        async with opened(talker) as backend:
            long = (7,) * (MAX_UNREAD_EVENTS + 500)
            ask = GenerationRequest(
                prompt="Once", sampling={"max_tokens": len(long) + 2, "ignore_eos": True}, resume=(long,)
            )
            [reader] = readers = [Reader()]
            await listen(backend, ask, readers)
            assert reader.ids[: len(long)] == list(long)
            assert (reader.ended.generated_tokens, reader.ended.reason) == (len(long) + 2, "length")

    asyncio.run(main())


def test_impossible_resume_tokens_are_refused(talker):
    async def main():
        async with opened(talker) as backend:
            for resume in (((1,), (1,)), ((32000,),), ((5000,) * 5000,), ((2, 5000),)):
                with pytest.raises(errors.InvalidParameter, match="resume"):
                    await backend.generate(GenerationRequest(messages=TALK, resume=resume))
            assert backend.stats()["talker0"].prompt_tokens == 0

    asyncio.run(main())


def test_token_limits_are_checked_where_the_prompt_is_tokenized(talker):
    async def main():
        async with opened(talker) as backend:
            prompt = len(await backend.tokenize(GenerationRequest(prompt="Once upon")))
            limits = TokenLimits(total=prompt + 3)
            request = GenerationRequest(prompt="Once upon", limits=limits, sampling={**BYTES, "ignore_eos": True})
            unbounded = replace(request, sampling={**request.sampling, "max_tokens": None})
            *_, finished = [event async for event in await backend.generate(unbounded)]
            assert (finished.generated_tokens, finished.reason) == (3, "length")
            with pytest.raises(
                errors.InvalidRequest, match=f"must be <= {prompt + 3}. Given: {prompt} `inputs` tokens"
            ):
                await backend.generate(replace(request, sampling={**request.sampling, "max_tokens": 4}))
            with pytest.raises(errors.InvalidRequest, match=f"less than {prompt - 1} tokens"):
                await backend.generate(replace(request, limits=TokenLimits(prompt=prompt - 1), sampling={}))

    asyncio.run(main())
