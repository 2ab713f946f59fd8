"""Resumed answers: text and calls equal those of an uninterrupted answer, wherever it was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic import LLM, Grammar, errors
from moesaic.text.tools import Tools

HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Łódź", "日本", 'a "quoted" one']}, "days": {"type": "integer", "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
BYTES = range(3, 259)  # in SentencePiece's vocabulary, the ids of single bytes

SALTS = map(str, count())
"""Requests with different salts share no cached prefix."""


@pytest.fixture(scope="module")
def llm(talker):
    with LLM.load(talker, cache_tokens=32768) as llm:
        yield llm


@pytest.fixture(scope="module")
def tales_llm():
    with LLM.load("tales") as llm:
        yield llm


@pytest.fixture(scope="module")
def caller(mistral3):
    with LLM.load(mistral3) as llm:
        yield llm


def read(reply):
    """Return the pieces of an answer and how it ended, without the ids of calls, which are random."""
    pieces = [
        ([token.id for token in piece.tokens], piece.text, [(call.name, call.arguments) for call in piece.calls])
        for piece in reply
    ]
    answer = reply.answer
    assert answer.cached_tokens <= answer.prompt_tokens
    assert answer.text == "".join(text for _, text, _ in pieces)
    assert [token.id for token in answer.tokens] == [token_id for ids, _, _ in pieces for token_id in ids]
    return pieces, answer.reason, answer.stop, answer.stop_id, answer.prompt_tokens


def names(pieces):
    """Return the number of calls that begin in these pieces."""
    return sum(name != "" for *_, calls in pieces for name, _ in calls)


def tokens(answer):
    return [token_id for ids, _, _ in answer[0] for token_id in ids]


def whole(llm, ids, sampling, **options):
    return [read(reply) for reply in llm.submit(ids, sampling, **options)]


def cut_anywhere(llm, ids, sampling, **options):
    """Assert that each answer resumes from every position, with and without a cached prefix; return the answers."""
    first = whole(llm, ids, sampling, **options)
    longest = max(len(tokens(answer)) for answer in first)
    replies, cached = [], set()
    for cut in range(longest + 1):
        resume = tuple(tuple(tokens(answer)[: max(0, cut - 3 * index)]) for index, answer in enumerate(first))
        for salt in ("", next(SALTS)):
            replies.append(llm.submit(ids, sampling, salt=salt, resume=resume, **options))
    for index, resumed in enumerate(replies):
        assert [read(reply) for reply in resumed] == first
        cached.add((index % 2, resumed[0].answer.cached_tokens > 0))
    assert len(ids) <= 16 or (0, True) in cached
    assert (1, True) not in cached
    return first


WAYS = {
    "greedy": {"temperature": 0},
    "a seed": {"temperature": 1.2, "seed": 1},
    "three answers": {"temperature": 1.2, "seed": 2, "n": 3},
    "penalties": {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 1.0},
    "broken characters": {"temperature": 1.5, "seed": 4, "logit_bias": dict.fromkeys(BYTES, 100)},
    "special tokens": {"seed": 5, "n": 2, "logit_bias": dict.fromkeys((0, 1, 2, 5000, 6000), 100), "ignore_eos": True},
    "an early end": {"seed": 6, "logit_bias": {2: 100, 5000: 100, 6000: 100}, "min_tokens": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("skip_special", [True, False])
def test_text_resumes_from_every_position(llm, way, skip_special):
    sampling = llm.sampling(**{"max_tokens": 16} | WAYS[way])
    first = cut_anywhere(llm, llm.encode_chat(HELLO), sampling, chat=True, skip_special=skip_special)
    assert ("end" in way) == (first[0][1] == "stop")


def test_int8_cache_resumes(talker):
    with LLM.load(talker, kv_cache_dtype="int8") as small:
        sampling = small.sampling(temperature=1.0, seed=3, max_tokens=24)
        cut_anywhere(small, small.encode_chat(HELLO), sampling, chat=True)


def test_interrupted_multibyte_characters_resume(llm):
    sampling = llm.sampling(temperature=2.0, seed=1, max_tokens=60)
    grammar = Grammar("regex", "[é日🦊𝄞ß]{6,9}!")
    [(pieces, reason, *_)] = cut_anywhere(llm, llm.encode_chat(HELLO), sampling, chat=True, grammar=grammar)
    assert reason == "stop"
    assert sum(not text for _, text, _ in pieces) > 3, "no character was cut"


@pytest.mark.parametrize("begin", [3, 8, 20])
def test_stop_string_across_the_interruption_ends(llm, begin):
    ids, sampling = llm.encode("Once upon"), llm.sampling(temperature=0, max_tokens=24)
    [(pieces, *_)] = whole(llm, ids, sampling)
    text = "".join(text for _, text, _ in pieces)
    stop = text[begin : begin + 12]
    for stops in ((stop,), (stop, stop[2:5] + "?"), (stop[4:7], stop + "?")):  # a longer one may be under way
        [(_, reason, met, *_)] = cut_anywhere(llm, ids, replace(sampling, stop=stops))
        assert (reason, met in stops) == ("stop", True)


def test_leading_white_space_is_stripped_after_resuming(talker):
    with LLM.load(talker, chat_format="plain") as llm:
        blank, letter = llm.tokenizer.encode("\n", prefix=False), llm.tokenizer.encode("fox")
        bias = dict.fromkeys(blank, 100) | dict.fromkeys(letter, 95)
        sampling = llm.sampling(temperature=0, max_tokens=12, logit_bias=bias, frequency_penalty=2.0)
        [(pieces, *_)] = cut_anywhere(llm, llm.encode_chat(HELLO), sampling, chat=True)
        assert pieces[0][1] == pieces[1][1] == ""
        assert "".join(text for _, text, _ in pieces).startswith("fox\n")
        cut_anywhere(llm, llm.encode_chat(HELLO), sampling, chat=True, begins=False)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_answers_resume_from_every_position(llm, data):
    some = st.sampled_from
    asked = {
        "temperature": data.draw(some([0, 0.7, 3.0])),
        "seed": data.draw(st.integers(0, 99)),
        "n": data.draw(st.integers(1, 3)),
        "max_tokens": data.draw(st.integers(1, 16)),
        "logit_bias": data.draw(some([{}, dict.fromkeys(BYTES, 50), dict.fromkeys((2, 198, 13, 5000), 80)])),
        "frequency_penalty": data.draw(some([0.0, 1.5])),
    }
    sampling = llm.sampling(**asked)
    options = {"begins": data.draw(st.booleans()), "skip_special": data.draw(st.booleans())}
    ids = llm.encode("Once upon a time")
    text = "".join(text for _, text, _ in whole(llm, ids, sampling, **options)[0][0])
    if text and data.draw(st.booleans()):
        begin = data.draw(st.integers(0, len(text) - 1))
        sampling = replace(sampling, stop=(text[begin : begin + data.draw(st.integers(1, 9))],))
    first = whole(llm, ids, sampling, **options)
    for salt in ("", next(SALTS)):
        resume = tuple(tuple(tokens(each)[: data.draw(st.integers(0, len(tokens(each))))]) for each in first)
        assert whole(llm, ids, sampling, resume=resume, salt=salt, **options) == first


@pytest.mark.parametrize("which", ["llm", "tales_llm"])
def test_json_resumes_from_every_position(which, request):
    llm = request.getfixturevalue(which)
    sampling = llm.sampling(temperature=1.5, seed=2, max_tokens=80)
    ids = llm.encode_chat(HELLO)
    [first] = cut_anywhere(llm, ids, sampling, chat=True, grammar=Grammar("json_schema", SCHEMA))
    said = json.loads("".join(text for _, text, _ in first[0]))
    assert (first[1], set(said)) == ("stop", {"city", "days"})


@pytest.mark.parametrize("which", ["llm", "caller"])
def test_required_calls_resume_from_every_position(which, request):
    llm = request.getfixturevalue(which)
    tools = Tools.from_request([WEATHER, CLOCK], "required", False)
    sampling = llm.sampling(temperature=1.5, seed=4, max_tokens=200)
    first = cut_anywhere(llm, llm.encode_chat(HELLO, tools=tools), sampling, chat=True, tools=tools)
    assert all(reason == "stop" and names(pieces) == 1 for pieces, reason, *_ in first)


@pytest.mark.parametrize("which", ["llm", "caller"])
def test_truncated_calls_resume_from_every_position(which, request):
    llm = request.getfixturevalue(which)
    tools = Tools.from_request([WEATHER], "required", True)
    ids = llm.encode_chat(HELLO, tools=tools)
    for max_tokens in (14, 20):
        sampling = llm.sampling(temperature=1.5, seed=4, max_tokens=max_tokens)
        [(pieces, reason, *_)] = cut_anywhere(llm, ids, sampling, chat=True, tools=tools)
        assert (reason, "".join(text for _, text, _ in pieces)) == ("length", "")
        assert names(pieces) > 0


def written(llm):
    """Return a grammar of words and two calls, as a model could write them by itself."""
    call = '{"name": "clock", "arguments": {}}'
    syntax = llm.format.tool_syntax(llm.tokenizer)
    mark = f"<[{llm.tokenizer.control[syntax.start_token]}]> " if syntax.start_token else ""
    return Grammar("lark", f'start: "Well.\\n" {mark} {json.dumps(f"[{call}, {call}]")}')


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("which", ["llm", "caller"])
def test_voluntary_calls_resume_from_every_position(which, parallel, request):
    llm = request.getfixturevalue(which)
    tools = Tools.from_request([WEATHER, CLOCK], "auto", parallel)
    ids = llm.encode_chat(HELLO, tools=tools)
    sampling = llm.sampling(temperature=0, max_tokens=99)
    [(pieces, reason, *_)] = cut_anywhere(llm, ids, sampling, chat=True, tools=tools, grammar=written(llm))
    assert "".join(text for _, text, _ in pieces) == "Well.\n"
    assert (names(pieces), reason) == (2 if parallel else 1, "stop")


# What has ended


def ends(llm, caller):
    """Return (model, prompt, options) of answers, one for each way to end."""
    plain, tools = llm.encode("Once upon"), Tools.from_request([CLOCK], "auto", False)
    greedy = llm.sampling(temperature=0, max_tokens=24)
    text = llm.complete("Once upon", temperature=0, max_tokens=24)
    yield llm, plain, {"sampling": greedy}
    yield llm, plain, {"sampling": replace(greedy, stop=(text.text[9:14],))}
    yield llm, plain, {"sampling": replace(greedy, stop_token_ids=(text.tokens[7].id,))}
    yield llm, plain, {"sampling": greedy, "grammar": Grammar("choice", ["a fox", "a hen"])}
    asked = {"sampling": greedy, "chat": True, "tools": tools, "grammar": written(caller)}
    yield caller, caller.encode_chat(HELLO, tools=tools), asked


def test_finished_answers_end_at_once_for_the_same_reason(llm, caller):
    for model, ids, options in ends(llm, caller):
        [first] = whole(model, ids, **options)
        before = model.engine.stats().steps
        assert whole(model, ids, resume=(tuple(tokens(first)),), **options) == [first]
        assert model.engine.stats().steps == before, "the model ran"


def test_tokens_after_the_end_are_refused(llm, caller):
    for model, ids, options in ends(llm, caller):
        [first] = whole(model, ids, **options)
        before = model.engine.stats().prompt_tokens
        with pytest.raises(errors.InvalidParameter, match=r"resume: .*(ends before its token|has room for)"):
            model.submit(ids, resume=((*tokens(first), 5000),), **options)
        assert model.engine.stats().prompt_tokens == before


def test_tokens_outside_the_grammar_are_refused(llm):
    with pytest.raises(errors.InvalidParameter, match="resume: the grammar does not allow"):
        llm.submit([1], llm.sampling(), grammar=Grammar("choice", ["yes", "no"]), resume=((5000,),))
