"""Finds fields of a body that the endpoint does not know. The client is told their names, or the request is refused.

A misspelt or unsupported field would otherwise be ignored without a word. Fields of dictionaries without a type, such
as a JSON schema, are not checked. This module depends on the types of bodies only.
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
"""Largest number of unknown fields that are named to the client for one request."""
MAX_NAME_CHARS = 64
MAX_LOGGED = 1000
"""Largest number of unknown fields that a server logs, each once. It is limited since clients choose the names."""
UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
"""Characters that are replaced in the name of a field before a header or the log shows it."""
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]]{0,47}")
"""Form of names that programs give to fields. Other names are not logged: they may be text of a user."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that request nothing. An unknown field with one of them is not reported."""


@dataclass(frozen=True)
class _Object:
    """The fields that a JSON object may have, by name, each with the known fields of its value."""

    fields: Mapping[str, _Known]


@dataclass(frozen=True)
class _Items:
    """A JSON list, with the known fields of each of its items."""

    item: _Known


_Known = _Object | _Items | None


@cache
def _known(kind: Any) -> _Known:
    return _from_type(inspect.type_info(kind))


def _from_type(kind: inspect.Type) -> _Known:
    """Return the known fields of values of a type; None if such values contain no object with named fields."""
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
    """Return the names of fields in decoded JSON that the type ``kind`` does not have, such as ``messages[].mood``.

    Fields with an empty value are left out. At most ``MAX_NAMED`` names are returned, each once and with safe
    characters only.
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
    """Return a JSON body as a value of the type ``kind``, and the names of its unknown fields.

    Errors are those of ``decode_json``.
    """
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return decode_json(body, kind), []
    value = parse_json(body)
    return fit(value, kind), unknown_fields(value, kind)


class FieldCheck:
    """Handles unknown fields for a server: refuses the request, or tells the client their names."""

    def __init__(self, *, strict: bool = False) -> None:
        """Create the check. ``strict``: whether a request with unknown fields is refused."""
        self._strict = strict
        self._logged: set[tuple[str, str]] = set()

    def report(self, http: HttpRequest, route: str, names: list[str]) -> None:
        """Put the names of a request's unknown fields into a response header, and into the log if they are new.

        Raises:
            InvalidParameter: there are unknown fields, and the server refuses them.
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
