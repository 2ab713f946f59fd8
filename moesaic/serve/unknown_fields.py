"""Fields of a body that the endpoint does not know: found, and told to the client or refused.

A misspelt or unsupported field would otherwise be passed over in silence. Fields of dictionaries without a type, such
as a JSON schema, are not checked. This module knows the types of bodies, not what is in them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from moesaic.errors import InvalidParameter
from moesaic.serve.json_body import decode_json, fit, parse_json
from moesaic.serve.types import HttpRequest

log = logging.getLogger("moesaic.serve")

HEADER = b"x-moesaic-ignored-fields"
MAX_NAMED = 16
"""Fields that are named for one request."""
MAX_NAME_CHARS = 64
MAX_LOGGED = 1000
"""Fields that are logged, each once, since the server started: clients choose the names."""
UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
"""Characters that a header or a log line should not have in a name."""
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]]{0,47}")
"""A name that a program gives to a field. Others are not logged: they may be text of a user."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that ask for nothing, so that an unknown field with one is no loss."""


@dataclass(frozen=True)
class _Object:
    """The known fields of an object, each with what is known about its value."""

    fields: Mapping[str, _Known]


@dataclass(frozen=True)
class _Items:
    """What is known about each item of a list."""

    item: _Known


_Known = _Object | _Items | None


@cache
def _known(kind: Any) -> _Known:
    return _from_type(inspect.type_info(kind))


def _from_type(kind: inspect.Type) -> _Known:
    """Return the known fields of a type; None if it has no objects with named fields."""
    if isinstance(kind, inspect.Metadata):
        return _from_type(kind.type)
    if isinstance(kind, inspect.UnionType):
        return next((known for each in kind.types if (known := _from_type(each)) is not None), None)
    if isinstance(kind, inspect.StructType):
        return _Object({field.encode_name: _from_type(field.type) for field in kind.fields})
    if isinstance(kind, inspect.ListType):
        item = _from_type(kind.item_type)
        return None if item is None else _Items(item)
    return None


def unknown_fields(value: Any, kind: Any) -> list[str]:
    """Return the names of fields of decoded JSON that a type does not have, such as ``messages[].mood``.

    Empty values are passed over. At most ``MAX_NAMED`` names are returned, each once and with safe characters only.
    """
    found: dict[str, None] = {}
    _find(value, _known(kind), "", found)
    return list(found)


def _find(value: Any, known: _Known, path: str, found: dict[str, None]) -> None:
    if isinstance(known, _Object) and isinstance(value, dict):
        for name, child in value.items():
            if name in known.fields:
                below = known.fields[name]
                if below is not None:
                    _find(child, below, f"{path}{name}.", found)
            elif child not in EMPTY and len(found) < MAX_NAMED:
                found[UNSAFE.sub("?", path + name)[:MAX_NAME_CHARS]] = None
    elif isinstance(known, _Items) and isinstance(value, list):
        for item in value:
            _find(item, known.item, f"{path.removesuffix('.')}[].", found)


def decode(body: bytes, kind: Any) -> tuple[Any, list[str]]:
    """Return a body as a value of a type, and the names of its unknown fields; errors are those of ``decode_json``."""
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return decode_json(body, kind), []
    value = parse_json(body)
    return fit(value, kind), unknown_fields(value, kind)


class FieldCheck:
    """What a server does about unknown fields."""

    def __init__(self, *, strict: bool = False) -> None:
        """``strict``: whether they are refused."""
        self._strict = strict
        self._logged: set[tuple[str, str]] = set()

    def report(self, http: HttpRequest, route: str, names: list[str]) -> None:
        """Name the unknown fields of a request in a header of its response, and in the log if they are new.

        Raises:
            InvalidParameter: the server refuses unknown fields.
        """
        if not names:
            return
        if self._strict:
            raise InvalidParameter(names[0], "is not a field of this request, and the server refuses unknown fields")
        http.response_headers.append((HEADER, ", ".join(names).encode()))
        for name in names:
            if (route, name) not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add((route, name))
                shown = name if FIELD_NAME.fullmatch(name) else "(no plain name)"
                log.warning("unknown field ignored", extra={"id": http.id, "route": route, "field": shown})
