"""The retry policy, as a unit and over real connections."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from email.utils import formatdate
from time import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.client import AsyncClient, Client, Retries, Timeouts
from moesaic.client.responses import parse_retry_after
from moesaic.client.retry import Attempts, is_transient
from moesaic.errors import BadReply, ConnectionFailed, MoesaicError, Overloaded, TimedOut, Unavailable
from tests.support.breaking_server import TEXT
from tests.support.client import AT_ONCE


def failed(status: int, wait: float | None = None) -> MoesaicError:
    error = MoesaicError("no")
    error.status, error.retry_after = status, wait
    return error


def test_transient_errors():
    for status in (408, 409, 429, 502, 503):
        assert is_transient(failed(status))
    for status in (400, 401, 403, 404, 405, 413, 415, 422, 499, 500, 501, 504):
        assert not is_transient(failed(status))
    assert is_transient(failed(500, 1.0)) and is_transient(failed(504, 0.0)) and not is_transient(failed(400, 1.0))
    assert is_transient(ConnectionFailed("x")) and not is_transient(BadReply("x")) and not is_transient(TimedOut("x"))


@given(draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=12, max_size=12))
def test_waits_grow_up_to_a_limit_and_then_end(draws):
    retries = Retries(tries=10, seconds=1e9, first=0.5, longest=8.0)
    numbers, now = iter(draws), [0.0]
    attempts = Attempts(retries, lambda: now[0], lambda: next(numbers))
    for failures in range(9):
        wait = attempts.wait_after(failed(503))
        assert wait == draws[failures] * min(8.0, 0.5 * 2**failures)
        now[0] += wait
    with pytest.raises(MoesaicError):
        attempts.wait_after(failed(503))


@pytest.mark.parametrize("tries, waits", [(4, 11), (2, 11), (1, 0)])
def test_stream_that_has_begun_has_more_tries(tries, waits):
    attempts = Attempts(Retries(tries=tries), lambda: 0.0, lambda: 0.0)
    attempts.progress()
    for _ in range(waits):
        attempts.wait_after(failed(503))
    with pytest.raises(MoesaicError):
        attempts.wait_after(failed(503))


def test_retry_after_is_added_and_limited_by_the_total_time():
    now = [100.0]
    attempts = Attempts(Retries(tries=99, seconds=10), lambda: now[0], lambda: 0.0)
    assert attempts.wait_after(failed(429, 7.0)) == 7.0
    now[0] += 7
    assert attempts.wait_after(failed(429, 3.0)) == 3.0
    with pytest.raises(MoesaicError):
        attempts.wait_after(failed(429, 3.5))
    attempts.progress()
    assert attempts.wait_after(failed(429, 9.0)) == 9.0


def test_retry_after():
    assert parse_retry_after(None) is None and parse_retry_after("soon") is None and parse_retry_after("nan") is None
    assert parse_retry_after("3") == 3.0 and parse_retry_after("-1") == 0.0
    assert 50 < (parse_retry_after(formatdate(time() + 60, usegmt=True)) or 0) <= 60


@pytest.mark.parametrize("status", ["503", "429+503+409", "408+502"])
def test_request_succeeds_after_transient_errors(breaking, http_client, status):
    before = len(breaking.requests)
    answer = Client(breaking.url(status=status), http=http_client, retries=AT_ONCE).chat("Hi")
    assert (answer.text, answer.request_id) == (TEXT, "r1")
    keys = [key for key, _ in breaking.requests[before:]]
    assert len(keys) == status.count("+") + 2 and len(set(keys)) == 1 and len(keys[0]) == 36
    with Client(breaking.url(status=status), http=http_client, retries=AT_ONCE).chat("Hi", stream=True) as stream:
        assert stream.answer().text == TEXT
    assert breaking.requests[-1][0] not in keys

    async def main() -> None:
        async with AsyncClient(breaking.url(status=status), retries=AT_ONCE) as client:
            assert (await client.chat("Hi")).text == TEXT

    asyncio.run(main())


def test_persistent_error_is_raised(breaking, http_client):
    before = len(breaking.requests)
    with pytest.raises(Unavailable, match="not now") as caught:
        Client(breaking.url(status="503+" * 9 + "503"), http=http_client, retries=AT_ONCE).chat("Hi")
    assert (caught.value.status, caught.value.request_id) == (503, "r1")
    assert len(breaking.requests) == before + AT_ONCE.tries
    with pytest.raises(MoesaicError) as caught:
        Client(breaking.url(status=500), http=http_client, retries=AT_ONCE).chat("Hi")
    assert caught.value.status == 500 and len(breaking.requests) == before + AT_ONCE.tries + 1


def test_long_retry_after_is_raised(breaking, http_client):
    client = Client(breaking.url(status=429, after=3600), http=http_client)
    with pytest.raises(Overloaded) as caught:
        client.chat("Hi")
    assert caught.value.retry_after == 3600
    assert Client(breaking.url(status=429, after=0), http=http_client, retries=AT_ONCE).chat("Hi").text == TEXT


def test_broken_connections_are_retried(breaking, http_client):
    assert Client(breaking.url(drop=2), http=http_client, retries=AT_ONCE).chat("Hi").text == TEXT
    for how in ("eof", "reset"):
        assert Client(breaking.url(cut=9, how=how), http=http_client, retries=AT_ONCE).chat("Hi").text == TEXT
    with pytest.raises(ConnectionFailed):
        Client(breaking.url(drop=2), http=http_client, retries=replace(AT_ONCE, tries=2)).chat("Hi")


def test_first_byte_timeout_is_not_retried(breaking, scripted):
    scripted.backend.script.pause = 60.0
    client = Client(scripted.url, timeouts=Timeouts(first_byte=0.2), retries=AT_ONCE)
    with client, pytest.raises(TimedOut, match="first_byte"):
        client.chat("Hi")
    assert len(scripted.backend.requests) == 1
