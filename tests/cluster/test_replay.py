"""An answer that is gone on with: wherever its log was cut, the reader gets every word once."""

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
    """Draw one answer: tokens whose text is shown when it pleases the detokenizer, calls, an end."""
    out: list[Event] = [PromptDone(index, (), 3)]
    for place, said in enumerate(draw(st.lists(st.text("abé ", max_size=3), max_size=6))):
        mark = TokenInfo(100 + place, said)
        shown = draw(st.sampled_from(["with it", "before", "later"]))
        if shown == "before":
            out.append(Delta(index, said))
        out.append(Delta(index, said if shown == "with it" else "", (mark,)))
        if shown == "later":
            out.append(Delta(index, said))
    for place in range(draw(st.integers(0, 2))):
        out.append(Delta(index, calls=(ToolCall(place, f"call-{index}-{place}", "f"),)))
        for part in draw(st.lists(st.text("{}1", min_size=1, max_size=3), max_size=3)):
            out.append(Delta(index, calls=(ToolCall(place, "", "", part),)))
    return [*out, Finished(index, "stop", 3, 6)]


@st.composite
def runs(draw: st.DrawFn) -> list[Event]:
    """Draw the events of a request, those of its answers mixed."""
    rest = [draw(answers(index)) for index in range(draw(st.integers(1, 3)))]
    out = []
    while any(rest):
        out.append(draw(st.sampled_from([each for each in rest if each])).pop(0))
    return out


def again(events: Sequence[Event], resume: Sequence[Sequence[int]], draw: Any) -> list[Event]:
    """Return what a door says that was given tokens: these come one by one, and the order of answers is its own."""
    count = 1 + max(event.index for event in events)
    rest = [[event for event in events if event.index == index] for index in range(count)]
    for index, ids in enumerate(resume):
        said = [mark.id for event in rest[index] if isinstance(event, Delta) for mark in event.tokens]
        assert list(ids) == said[: len(ids)], "it is asked to go on behind what it never said"
    out = []
    while any(rest):
        out.append(draw(st.sampled_from([each for each in rest if each])).pop(0))
    return out


def read(events: Sequence[Event]) -> Any:
    """Return all that a reader has of each answer."""
    out: dict[int, Any] = {}
    for event in events:
        found = out.setdefault(event.index, {"text": "", "ids": [], "calls": {}, "begun": 0, "ended": 0})
        if isinstance(event, Delta):
            found["text"] += event.text
            found["ids"] += [mark.id for mark in event.tokens]
            for call in event.calls:
                job_id, name, arguments = found["calls"].get(call.index, ("", "", ""))
                found["calls"][call.index] = (job_id + call.id, name + call.name, arguments + call.arguments)
        else:
            found["begun" if isinstance(event, PromptDone) else "ended"] += 1
    return out


@given(runs(), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
def test_replay_has_no_gap_and_no_repeat(events, cuts, data):
    """Also where the second worker dies, and the third."""
    whole, log = read(events), []
    for cut in [*cuts, len(events)]:
        told = ReplayFilter(log)
        said = again(events, told.resume(), data.draw)
        fresh = [new for event in said if (new := told.fresh(event)) is not None]
        log += fresh[:cut] if cut < len(events) else fresh
    assert read(log) == whole
    assert ReplayFilter(log).all_finished(len(whole)) and not ReplayFilter(log).all_finished(len(whole) + 1)


@given(runs(), st.integers(0, 40), st.data())
def test_replayed_text_may_be_split_differently(events, cut, data):
    """A worker that shows its text in larger pieces, or in other ones, says the same."""
    told = ReplayFilter(events[:cut])
    rest: list[Event] = []
    for index in range(1 + max(event.index for event in events)):
        mine = [event for event in events if event.index == index]
        text = "".join(event.text for event in mine if isinstance(event, Delta))
        marks = [mark for event in mine if isinstance(event, Delta) for mark in event.tokens]
        calls = [call for event in mine if isinstance(event, Delta) for call in event.calls]
        at = data.draw(st.integers(0, len(text)))
        rest += [PromptDone(index), Delta(index, text[:at], tuple(marks)), Delta(index, text[at:], (), tuple(calls))]
        rest.append(Finished(index, "stop", 3, 6))
    fresh = [new for event in rest if (new := told.fresh(event)) is not None]
    assert read([*events[:cut], *fresh]) == read(events)


def test_empty_log_resumes_nothing():
    assert ReplayFilter([]).resume() == () and not ReplayFilter([]).all_finished(1)
    assert ReplayFilter([PromptDone(0), PromptDone(1)]).resume() == ()
    assert ReplayFilter([Delta(2, "x", (TokenInfo(7, "x"),))]).resume() == ((), (), (7,))


def test_text_without_tokens_is_continued_as_text():
    said = ({"role": "user", "content": "Hi"},)
    log = [PromptDone(0), Delta(0, "Once "), Delta(0, "upon")]
    told = ReplayFilter(log)
    assert told.continued(GenerationRequest(messages=said)) == GenerationRequest(
        messages=(*said, {"role": "assistant", "content": "Once upon"}), continue_final=True
    )
    assert told.fresh(PromptDone(0)) is None
    assert told.fresh(Delta(0, " a time", (TokenInfo(1, " a time"),))) == Delta(
        0, " a time", (TokenInfo(1, " a time"),)
    )
    begun = (*said, {"role": "assistant", "content": "Well, "})
    assert (
        ReplayFilter(log).continued(GenerationRequest(messages=begun, continue_final=True)).messages[-1]["content"]
        == "Well, Once upon"
    )
    assert ReplayFilter(log).continued(GenerationRequest(prompt="Say: ")).prompt == "Say: Once upon"
    with pytest.raises(InvalidRequest):
        ReplayFilter(log).continued(GenerationRequest(prompt=(1, 2)))
