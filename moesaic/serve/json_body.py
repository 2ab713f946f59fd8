"""Reads the body of a request within limits of size and time, decodes it as strict JSON, and converts it to a type.

This module depends on ASGI and JSON, not on the content of a body.
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
from moesaic.serve.settings import Settings
from moesaic.serve.types import Disconnected, Receive, Scope, header

MAX_EXACT_FLOAT = 2**53
"""Integers below this are represented exactly as floats."""
MAX_DEPTH = 32
"""Largest nesting depth of a JSON body."""
LARGE_BODY_BYTES = 64 << 10
"""A larger body is decoded in a thread, since decoding it would delay running streams."""
JSON_MEDIA_TYPE = re.compile(r"application/([\w.-]+\+)?json", re.I)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_body(scope: Scope, receive: Receive, settings: Settings, max_bytes: int | None = None) -> bytes:
    """Return the body of a request as bytes; it is not decoded.

    Args:
        scope: the request's ASGI scope.
        receive: the request's ASGI callable, which returns the next message from the client.
        settings: has the limits of size and time.
        max_bytes: largest size in bytes; None: ``settings.body_bytes``.

    Raises:
        TooLarge: the body is too large.
        WrongMedia: the headers say that the body is not JSON, or that it is compressed.
        InvalidRequest: the body did not arrive in time.
        Disconnected: the client disconnected before the end of the body.
    """
    max_bytes = max_bytes or settings.body_bytes
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise TooLarge(f"the body has {length} bytes; the limit is {max_bytes}")
    if (header(scope, b"content-encoding") or "identity") != "identity":
        raise WrongMedia("compressed bodies are not supported: send the body without Content-Encoding")
    # A page of another origin cannot send this type without a CORS preflight.
    if not JSON_MEDIA_TYPE.fullmatch((header(scope, b"content-type") or "").partition(";")[0].strip()):
        raise WrongMedia("the body must be JSON: send it with `Content-Type: application/json`")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise TooLarge(f"the body has more than {max_bytes} bytes")
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {settings.body_seconds:g} s") from None


def decode_json(body: bytes, kind: Any) -> Any:
    """Decode strict JSON into the type ``kind``. NaN, infinity, duplicate keys and deep nesting are refused.

    A float without a fraction, such as ``3.0``, is accepted for an integer: JSON makes no difference.

    Raises:
        InvalidRequest: the body is not JSON, or is not of the type ``kind``.
        InvalidParameter: one parameter is wrong; the error names it.
    """
    return fit(parse_json(body), kind)


def parse_json(body: bytes) -> Any:
    """Decode strict JSON into dictionaries, lists and plain values, with the checks of ``decode_json``.

    Raises:
        InvalidRequest: the body is not JSON.
    """
    try:
        text = body.decode("utf-8-sig")  # RFC 8259, section 8.1: a byte order mark may be ignored
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_float=_parse_float, parse_constant=_refuse_constant
        )
        _check_depth(value)
        if SURROGATE.search(text):  # lone surrogates cannot be encoded as text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeError:
        raise InvalidRequest("the body is not JSON: it is not valid UTF-8, or has a lone surrogate") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def decode_json_fast(body: bytes, kind: Any) -> Any:
    """Decode JSON into the type ``kind`` at a tenth of the cost of ``decode_json``, for messages of our own programs.

    The type must not contain ``Any``, so that the type itself limits the nesting depth. Duplicate keys are
    accepted, and a float is not accepted for an integer.

    Raises:
        InvalidRequest: the body is not JSON, or is not of the type ``kind``.
        InvalidParameter: one parameter is wrong; the error names it.
    """
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise _conversion_error(str(error)) from None
    except RecursionError:  # in a value that is skipped
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def fit(value: Any, kind: Any) -> Any:
    """Convert decoded JSON into the type ``kind`` and return it.

    Raises:
        InvalidRequest: ``value`` is not of the type ``kind``.
        InvalidParameter: one parameter is wrong; the error names it.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _conversion_error(str(error)) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.40} is too large")
    return int(value) if value.is_integer() and abs(value) < MAX_EXACT_FLOAT else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise RecursionError


def _conversion_error(message: str) -> InvalidRequest:
    match = re.fullmatch(r"(.*) - at `\$\.?(.*?)`", message, re.S)
    if match and match[2]:
        return InvalidParameter(match[2], match[1])
    if missing := re.fullmatch(r"Object missing required field `(.*?)`.*", message):
        return InvalidParameter(missing[1], "is missing")
    return InvalidRequest(match[1] if match else message)
