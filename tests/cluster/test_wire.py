"""Events, requests and errors are read as they were written, and invalid bytes are refused with a typed error."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import errors
from moesaic.backend import (
    Delta,
    Finished,
    GenerationRequest,
    ModelInfo,
    ModelStats,
    PromptDone,
    TokenInfo,
    TokenLimits,
    ToolCall,
    TopToken,
)
from moesaic.cluster import wire
from moesaic.engine import Sampling
from moesaic.errors import InvalidRequest, MoesaicError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ids = st.integers(0, 2**31)
indexes = st.integers(0, 7)
scores = st.none() | st.floats(-100, 0)
tokens = st.builds(
    TokenInfo,
    ids,
    texts,
    st.booleans(),
    scores,
    st.lists(st.builds(TopToken, ids, texts, st.floats(-9, 0), st.binary(max_size=4)), max_size=2).map(tuple),
    st.binary(max_size=4),
    indexes,
)
token_lists = st.lists(tokens, max_size=3).map(tuple)
calls = st.lists(st.builds(ToolCall, indexes, texts, texts, texts), max_size=2).map(tuple)
events = st.one_of(
    st.builds(PromptDone, indexes, token_lists, ids),
    st.builds(Delta, indexes, texts, token_lists, calls),
    st.builds(
        Finished, indexes, st.sampled_from(["stop", "length", "cancelled"]), ids, ids, ids, st.none() | texts,
        st.none() | ids, st.booleans(),
    ),
)  # fmt: skip


@given(st.lists(events, max_size=6))
def test_events_round_trip(sent):
    assert wire.unpack_events(wire.pack_events(sent)) == sent


FULL: dict[str, Any] = {
    "model": "m",
    "messages": ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}),
    "prompt": (1, 2, 3),
    "sampling": {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1,
        "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {7: 1.5, 8: -100.0}, "stop": ("a", "b"),
        "stop_token_ids": (1, 2), "max_tokens": 9, "min_tokens": 1, "n": 2, "seed": 2**62, "logprobs": 3,
        "prompt_logprobs": 1, "ignore_eos": True, "bad_words": ("x", "y"), "allowed_token_ids": (4, 2),
        "speculation": False,
    },
    "continue_final": True,
    "tools": ({"type": "function", "function": {"name": "f", "parameters": {}}},),
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"date_string": "26 Jul 2024", "builtin_tools": ["search"]},
    "now": "2026-12-03T23:59:59",
    "grammar": ("json_schema", {"type": "object"}),
    "grammar_param": "response_format",
    "truncate": 5,
    "parse_special": True,
    "add_bos": False,
    "skip_special": False,
    "include_stop": True,
    "resume": ((1, 2), ()),
    "priority": 3,
    "tenant": "t",
    "idempotency_key": "o",
    "limits": TokenLimits(3, 9),
}  # fmt: skip


def test_requests_round_trip():
    default = GenerationRequest()
    assert FULL.keys() == {field.name for field in dataclasses.fields(GenerationRequest)}
    assert all(getattr(default, name) != value for name, value in FULL.items())
    assert FULL["sampling"].keys() == {field.name for field in dataclasses.fields(Sampling)}
    read = wire.unpack_request(wire.pack_request(GenerationRequest(**FULL)))
    assert read == GenerationRequest(**FULL)
    assert Sampling(**read.sampling) == Sampling(**FULL["sampling"])
    for name, value in FULL.items():
        assert wire.unpack_request(wire.pack_request(GenerationRequest(**{name: value}))) == GenerationRequest(
            **{name: value}
        ), name
    assert wire.unpack_request(wire.pack_request(GenerationRequest(prompt="text"))) == GenerationRequest(prompt="text")


def tree(kind: type[MoesaicError] = MoesaicError) -> list[type[MoesaicError]]:
    return [kind, *(error for subclass in kind.__subclasses__() for error in tree(subclass))]


@pytest.mark.parametrize("kind", [error for error in tree() if error.__module__ == errors.__name__])
def test_errors_round_trip(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "what is wrong")
    error.retry_after = 2.5
    if issubclass(kind, errors.InvalidParameter):
        error.param = "top_p"
    written = msgspec.json.decode(msgspec.json.encode(wire.error_info(error)), type=wire.ErrorInfo)
    read = wire.to_error(written)
    assert type(read) is kind and str(read) == "what is wrong"
    assert (read.status, read.retry_after) == (error.status, 2.5)
    assert getattr(read, "param", None) == getattr(error, "param", None)


def test_a_prompt_that_is_too_long_keeps_its_numbers():
    written = msgspec.json.encode(wire.error_info(errors.PromptTooLong(9, 3)))
    read = wire.to_error(msgspec.json.decode(written, type=wire.ErrorInfo))
    assert isinstance(read, errors.PromptTooLong) and (read.tokens, read.limit) == (9, 3)


def test_texts_to_embed_round_trip():
    body = wire.EmbedBody(["a", [1, 2]], 5)
    assert wire.unpack_embed(msgspec.json.encode(body)) == body


def test_foreign_errors_are_not_disclosed():
    assert "secret" not in wire.error_info(ValueError("secret")).message
    for name in ("Path", "annotations", "__name__", "nothing", "Exception", ""):
        assert type(wire.to_error(wire.ErrorInfo(name, "a message"))) is MoesaicError


def test_models_and_stats_round_trip():
    card = ModelInfo("m", ("a",), "classify", "loading", 9, ("x",), {"dtype": "int8"})
    sent = wire.RegisterRequest("w", (card,), 3, {"machine": "x"}, (("job", 4),), "run")
    assert msgspec.json.decode(msgspec.json.encode(sent), type=wire.RegisterRequest) == sent
    load = ModelStats(*range(1, 11), alive=False)
    renew = wire.RenewRequest("w", (("job", 4),), {"m": load})
    assert msgspec.json.decode(msgspec.json.encode(renew), type=wire.RenewRequest) == renew


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)
almost_events = st.lists(
    st.lists(st.sampled_from(["b", "p", "e", 0, -1, 300, "stop", [], None, 2**70]), max_size=7), max_size=3
)
almost_requests = st.dictionaries(
    st.sampled_from([*FULL, "none"]), junk | st.just({"logit_bias": {"x": 1}}), max_size=4
)


@given(st.binary(max_size=30) | (junk | almost_events | almost_requests).map(msgspec.json.encode))
@settings(max_examples=300)
def test_invalid_bytes_are_refused(given):
    for read in (wire.unpack_events, wire.unpack_request):
        try:
            read(given)
        except InvalidRequest as error:
            assert "\n" not in str(error)


def test_nesting_depth_is_limited():
    for read in (wire.unpack_events, wire.unpack_request):
        with pytest.raises(InvalidRequest):
            read(b"[" * 100_000)
    with pytest.raises(InvalidRequest):
        wire.unpack_request(b'{"sampling":' + b'{"a":' * 100_000)


@pytest.mark.parametrize("index", [-1, 256, 10**9])
def test_answer_index_is_bounded(index):
    """A worker must not choose how much memory the gateway keeps for each answer."""
    with pytest.raises(InvalidRequest):
        wire.unpack_events(msgspec.json.encode([["p", index, "x"]]))
