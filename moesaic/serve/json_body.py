"""A request's body: so many bytes and no more, JSON and nothing else, and of the type that an endpoint asks for.

Knows ASGI and JSON. Does not know what is asked.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from functools import cache
from typing import Any

import msgspec

from moesaic.errors import InvalidParameter, InvalidRequest, TooLarge, WrongMedia
from moesaic.serve.exchange import Disconnected, Receive, Scope, header
from moesaic.serve.settings import Settings

EXACT = 2**53
"""Below this a float is as exact as a whole number."""
DEPTH = 32
"""How deep JSON may be nested."""
LARGE_BODY_BYTES = 64 << 10
"""Bytes of JSON from which on it is decoded in a thread, for it would hold up streams."""
MEDIA = re.compile(r"application/([\w.-]+\+)?json", re.I)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_body(scope: Scope, receive: Receive, settings: Settings, most: int | None = None) -> bytes:
    """Return the body of a request, of at most ``most`` bytes if that is not what the settings say.

    Raises:
        TooLarge, WrongMedia, InvalidRequest: it is too long, is no JSON, or did not come in time.
        Disconnected: the client left first.
    """
    most = most or settings.body_bytes
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > most:
        raise TooLarge(f"the body has {length} bytes, at most {most} are taken")
    if (header(scope, b"content-encoding") or "identity") != "identity":
        raise WrongMedia("compressed bodies are not taken")
    # Pages of other origins can send anything but this without asking first.
    if not MEDIA.fullmatch((header(scope, b"content-type") or "").partition(";")[0].strip()):
        raise WrongMedia("the body must be JSON: send it with `Content-Type: application/json`")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > most:
                    raise TooLarge(f"the body has more than {most} bytes")
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise InvalidRequest(f"the body did not come within {settings.body_seconds:g} s") from None


def decode_json(body: bytes, kind: Any) -> Any:
    """Return JSON as a value of a type, strictly: no NaN, no infinity, no key twice, no abyss of brackets.

    A whole number may be written as one with a fraction of nothing: JSON knows no difference.

    Raises:
        InvalidRequest, InvalidParameter: it is not that; a parameter is named where one is at fault.
    """
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_no_constant)
        _shallow(value)
        if SURROGATE.search(text):  # halves of a character are no text: nothing can be done with them
            json.dumps(value, ensure_ascii=False).encode()
        return fit(value, kind)
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {DEPTH}") from None
    except UnicodeError:
        raise InvalidRequest("the body is not JSON: it is no valid UTF-8, or has half a character") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def decode_json_fast(body: bytes, kind: Any) -> Any:
    """Do the same at a tenth of the cost, for a type without ``Any``, whose depth is its own, and from our own clients.

    It takes a key that stands twice, and no whole number that is written as one with a fraction of nothing.
    """
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except RecursionError:  # in what it skips
        raise InvalidRequest("the body is nested too deep") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def fit(value: Any, kind: Any) -> Any:
    """Return what JSON was decoded to as a value of a type.

    Raises:
        InvalidRequest, InvalidParameter: it is not of that type.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _number(written: str) -> float:
    value = float(written)
    if math.isinf(value):
        raise ValueError(f"{written:.40} is too large a number")
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise RecursionError


def _misfit(message: str) -> InvalidRequest:
    found = re.fullmatch(r"(.*) - at `\$\.?(.*?)`", message, re.S)
    if found and found[2]:
        return InvalidParameter(found[2], found[1])
    if missing := re.fullmatch(r"Object missing required field `(.*?)`.*", message):
        return InvalidParameter(missing[1], "is missing")
    return InvalidRequest(found[1] if found else message)
