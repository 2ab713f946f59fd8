"""Continued answers: wherever a job's log was cut, the reader gets every word once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.backend import Delta, Event, Finished, GenerationRequest, PromptDone, TokenInfo, ToolCall
from moesaic.cluster.worker.replay import ReplayFilter
from moesaic.errors import InvalidRequest


@st.composite
def answers(draw: st.DrawFn, index: int) -> list[Event]:
    """Draw one answer: tokens whose text comes with them, before them or later, then tool calls and an end."""
    out: list[Event] = [PromptDone(index, (), 3)]
    for position, text in enumerate(draw(st.lists(st.text("abé ", max_size=3), max_size=6))):
        token = TokenInfo(100 + position, text)
        order = draw(st.sampled_from(["with it", "before", "later"]))
        if order == "before":
            out.append(Delta(index, text))
        out.append(Delta(index, text if order == "with it" else "", (token,)))
        if order == "later":
            out.append(Delta(index, text))
    for position in range(draw(st.integers(0, 2))):
        out.append(Delta(index, calls=(ToolCall(position, f"call-{index}-{position}", "f"),)))
        for part in draw(st.lists(st.text("{}1", min_size=1, max_size=3), max_size=3)):
            out.append(Delta(index, calls=(ToolCall(position, "", "", part),)))
    return [*out, Finished(index, "stop", 3, 6)]


@st.composite
def runs(draw: st.DrawFn) -> list[Event]:
    """Draw the events of a request. The events of its answers are interleaved."""
    answers_left = [draw(answers(index)) for index in range(draw(st.integers(1, 3)))]
    out = []
    while any(answers_left):
        out.append(draw(st.sampled_from([answer for answer in answers_left if answer])).pop(0))
    return out


def resumed_events(events: Sequence[Event], resume: Sequence[Sequence[int]], draw: Any) -> list[Event]:
    """Return the events of a backend that resumes answers: each token in its own event, and answers in any order."""
    count = 1 + max(event.index for event in events)
    rest = [[event for event in events if event.index == index] for index in range(count)]
    for index, ids in enumerate(resume):
        generated = [token.id for event in rest[index] if isinstance(event, Delta) for token in event.tokens]
        assert list(ids) == generated[: len(ids)], "the answer is resumed with tokens that it never had"
    out = []
    while any(rest):
        out.append(draw(st.sampled_from([answer for answer in rest if answer])).pop(0))
    return out


def read(events: Sequence[Event]) -> Any:
    """Return the text, tokens, calls and numbers of starts and ends that a reader gets, by answer."""
    out: dict[int, Any] = {}
    for event in events:
        answer = out.setdefault(event.index, {"text": "", "ids": [], "calls": {}, "begun": 0, "ended": 0})
        if isinstance(event, Delta):
            answer["text"] += event.text
            answer["ids"] += [token.id for token in event.tokens]
            for call in event.calls:
                job_id, name, arguments = answer["calls"].get(call.index, ("", "", ""))
                answer["calls"][call.index] = (job_id + call.id, name + call.name, arguments + call.arguments)
        else:
            answer["begun" if isinstance(event, PromptDone) else "ended"] += 1
    return out


@given(runs(), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
def test_replay_has_no_gap_and_no_repeat(events, cuts, data):
    """Several workers die, one after another."""
    whole, log = read(events), []
    for cut in [*cuts, len(events)]:
        replay = ReplayFilter(log)
        resumed = resumed_events(events, replay.resume(), data.draw)
        fresh = [new for event in resumed if (new := replay.fresh(event)) is not None]
        log += fresh[:cut] if cut < len(events) else fresh
    assert read(log) == whole
    assert ReplayFilter(log).all_finished(len(whole)) and not ReplayFilter(log).all_finished(len(whole) + 1)


@given(runs(), st.integers(0, 40), st.data())
def test_replayed_text_may_be_split_differently(events, cut, data):
    """The second worker may split the text into other pieces than the first."""
    replay = ReplayFilter(events[:cut])
    rest: list[Event] = []
    for index in range(1 + max(event.index for event in events)):
        answer = [event for event in events if event.index == index]
        text = "".join(event.text for event in answer if isinstance(event, Delta))
        tokens = [token for event in answer if isinstance(event, Delta) for token in event.tokens]
        calls = [call for event in answer if isinstance(event, Delta) for call in event.calls]
        cut_at = data.draw(st.integers(0, len(text)))
        rest += [
            PromptDone(index),
            Delta(index, text[:cut_at], tuple(tokens)),
            Delta(index, text[cut_at:], (), tuple(calls)),
        ]
        rest.append(Finished(index, "stop", 3, 6))
    fresh = [new for event in rest if (new := replay.fresh(event)) is not None]
    assert read([*events[:cut], *fresh]) == read(events)


def test_empty_log_resumes_nothing():
    assert ReplayFilter([]).resume() == () and not ReplayFilter([]).all_finished(1)
    assert ReplayFilter([PromptDone(0), PromptDone(1)]).resume() == ()
    assert ReplayFilter([Delta(2, "x", (TokenInfo(7, "x"),))]).resume() == ((), (), (7,))


def test_text_without_tokens_is_continued_as_text():
    messages = ({"role": "user", "content": "Hi"},)
    log = [PromptDone(0), Delta(0, "Once "), Delta(0, "upon")]
    replay = ReplayFilter(log)
    assert replay.continued(GenerationRequest(messages=messages)) == GenerationRequest(
        messages=(*messages, {"role": "assistant", "content": "Once upon"}), continue_final=True
    )
    assert replay.fresh(PromptDone(0)) is None
    assert replay.fresh(Delta(0, " a time", (TokenInfo(1, " a time"),))) == Delta(
        0, " a time", (TokenInfo(1, " a time"),)
    )
    started = (*messages, {"role": "assistant", "content": "Well, "})
    assert (
        ReplayFilter(log).continued(GenerationRequest(messages=started, continue_final=True)).messages[-1]["content"]
        == "Well, Once upon"
    )
    assert ReplayFilter(log).continued(GenerationRequest(prompt="Say: ")).prompt == "Say: Once upon"
    with pytest.raises(InvalidRequest):
        ReplayFilter(log).continued(GenerationRequest(prompt=(1, 2)))
