"""Streams that break at every byte and in every way: the client returns one answer or raises a typed error."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from moesaic.client import AsyncClient, Client, Piece, Timeouts
from moesaic.errors import AnswerChanged, BadReply, ConnectionFailed, MoesaicError, StreamBroken
from tests.support.breaking_server import ARGUMENTS, TEXT, Plan, stream
from tests.support.client import AT_ONCE
from tests.support.sizes import sizes

SIZE = len(stream(Plan(), 0))
MIDDLE = stream(Plan(), 0).index(b"dich") + 2
AFTER_ENDS = stream(Plan(), 0).index(b'"usage"')


def assert_one_answer(pieces: list[Piece]) -> None:
    assert "".join(piece.text for piece in pieces if piece.index == 0) == TEXT
    calls = [part for piece in pieces if piece.index == 1 for part in piece.calls]
    assert "".join(part.arguments for part in calls) == ARGUMENTS
    assert [(part.id, part.name) for part in calls if part.id] == [("c1", "weather")]
    assert sorted((piece.index, piece.reason) for piece in pieces if piece.reason) == [(0, "stop"), (1, "tool_calls")]
    assert all(piece.text or piece.calls or piece.reason for piece in pieces)


def asked(breaking, http_client, **plan):
    return Client(breaking.url(**plan), http=http_client, retries=AT_ONCE)


EVERY = sizes(7, 1)
"""Distances of the bytes at which streams are broken: some in the fast lane, and all of them in the slow lane."""


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("how", ["eof", "end"])
def test_stream_that_breaks_anywhere_gives_one_answer(breaking, http_client, how, step):
    for cut in range(0, SIZE + 1, step if how == "eof" else 11 * step):
        client = asked(breaking, http_client, cut=cut, how=how, keyed=1)
        with client.chat("Hi", stream=True) as stream:
            pieces = list(stream)
        assert_one_answer(pieces)
        whole = stream.answer()
        assert (whole.text, whole.usage.completion_tokens, whole.id) == (TEXT, 9, "a")
        [other] = whole.alternatives
        assert [(call.id, call.arguments, call.parsed()) for call in other.calls] == [
            ("c1", ARGUMENTS, {"city": "Århus"})
        ]


@pytest.mark.parametrize("step", EVERY)
def test_stream_that_breaks_anywhere_with_asyncio(breaking, step):
    async def main() -> None:
        async with httpx.AsyncClient() as http:
            for cut in range(0, SIZE + 1, step):
                client = AsyncClient(breaking.url(cut=cut, how="reset", keyed=1), http=http, retries=AT_ONCE)
                async with client.chat("Hi", stream=True) as stream:
                    assert_one_answer([piece async for piece in stream])

    asyncio.run(main())


def test_progress_resets_the_number_of_tries(breaking, http_client):
    cuts, before = "+".join(map(str, range(1, SIZE, 60))), len(breaking.requests)
    with asked(breaking, http_client, cut=cuts, keyed=1).chat("Hi", stream=True) as stream:
        assert_one_answer(list(stream))
    assert stream.resumed > AT_ONCE.resumes
    asked_for = breaking.requests[before:]
    assert len(asked_for) == stream.resumed + 1 and asked_for[0][1]["stream"]
    assert all(each == asked_for[0] for each in asked_for)  # the same key, and the same body


def test_stream_without_progress_fails(breaking, http_client):
    client = asked(breaking, http_client, cut="+".join([str(MIDDLE)] * 20), keyed=1)
    before = len(breaking.requests)
    got = []
    with client.chat("Hi", stream=True) as stream, pytest.raises(StreamBroken):
        got.extend(stream)
    assert len(breaking.requests) == before + AT_ONCE.resumes
    assert TEXT.startswith("".join(piece.text for piece in got)) and got
    with pytest.raises(StreamBroken):
        stream.answer()


@pytest.mark.parametrize("how", ["eof", "reset", "end"])
def test_stream_is_not_repeated_without_idempotency_keys(breaking, http_client, how):
    before = len(breaking.requests)
    with asked(breaking, http_client, cut=MIDDLE, how=how).chat("Hi", stream=True) as stream:
        with pytest.raises(StreamBroken, match="cannot resume"):
            list(stream)
        assert TEXT.startswith(stream.text) and (
            stream.text or how == "reset"
        )  # a reset may overtake data that was sent
    assert len(breaking.requests) == before + 1


def test_request_is_repeated_before_the_first_byte(breaking, http_client):
    with asked(breaking, http_client, cut=0).chat("Hi", stream=True) as stream:
        assert_one_answer(list(stream))
    with asked(breaking, http_client, drop=2).chat("Hi", stream=True) as stream:
        assert_one_answer(list(stream))


def test_server_that_lost_the_key_breaks_the_stream(breaking, http_client):
    client = asked(breaking, http_client, cut=MIDDLE, keyed=1, forgets=1)
    with client.chat("Hi", stream=True) as stream, pytest.raises(StreamBroken, match="no longer has it"):
        list(stream)


@pytest.mark.parametrize(
    ("other", "cut"),
    [("text", MIDDLE), ("short", MIDDLE), ("call", AFTER_ENDS), ("arguments", AFTER_ENDS), ("reason", AFTER_ENDS)],
)
def test_different_answers_are_never_joined(breaking, http_client, other, cut):
    client = asked(breaking, http_client, cut=cut, keyed=1, other=other)
    got = []
    with client.chat("Hi", stream=True) as stream, pytest.raises(AnswerChanged):
        got.extend(stream)
    assert TEXT.startswith("".join(piece.text for piece in got if piece.index == 0)) and got


def test_silence_breaks_a_stream_and_comments_do_not(breaking, http_client):
    timeouts = Timeouts(silence=0.5)
    url = breaking.url(cut=MIDDLE, how="hang", keyed=1)
    with Client(url, http=http_client, retries=AT_ONCE, timeouts=timeouts).chat("Hi", stream=True) as stream:
        assert_one_answer(list(stream))
    assert stream.resumed == 1
    with Client(breaking.url(beats=10), http=http_client, timeouts=timeouts).chat("Hi", stream=True) as stream:
        assert_one_answer(list(stream))

    async def main() -> None:
        async with AsyncClient(url, retries=AT_ONCE, timeouts=timeouts) as client:
            async with client.chat("Hi", stream=True) as stream:
                assert_one_answer([piece async for piece in stream])
            assert stream.resumed == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("error", MoesaicError),
        ("undone", StreamBroken),
        ("unreasoned", BadReply),
        ("junk", BadReply),
        ("html", BadReply),
    ],
)
def test_invalid_stream_raises(breaking, http_client, body, error):
    client = asked(breaking, http_client, body=body)
    with pytest.raises(error) as caught, client.chat("Hi", stream=True) as stream:
        list(stream)
    assert type(caught.value) is error
    if body == "error":
        assert (str(caught.value), caught.value.status, caught.value.request_id) == ("NaN", 500, "r1")
        assert stream.text == TEXT


def test_unreachable_server():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", retries=AT_ONCE)
    with client:
        with pytest.raises(ConnectionFailed, match="check that the server is running"):
            client.models()
        with pytest.raises(ConnectionFailed), client.chat("Hi", stream=True):
            pass
