"""Check of ``chat_template_kwargs``: variables that a request passes to the chat template."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Mapping
from typing import Any

from moesaic.errors import InvalidParameter
from moesaic.text.grammar import too_deep

log = logging.getLogger("moesaic.text")

FIELD = "chat_template_kwargs"
MAX_BYTES = 64 << 10
MAX_DEPTH = 16
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"}) | frozenset(
    {"bos_token", "eos_token", "raise_exception", "strftime_now", "namespace", "range", "dict", "self", "loop"}
)
"""Names that other fields of a request decide, or that the renderer defines."""
MAX_TOLD = 256
"""Maximum number of ignored names that are logged. Clients choose the names, so there may be any number."""

_told: set[tuple[str, str]] = set()
_telling = threading.Lock()


def check(kwargs: Mapping[str, Any] | None, chat_format: str, known: Collection[str]) -> Mapping[str, Any]:
    """Check the variables of a request and return them; None gives an empty mapping.

    A variable that the chat format does not use (that is not ``known``) is logged once. ``chat_format`` is the name of
    the format, for the log.

    Raises:
        InvalidParameter: the variables are not an object, are too large or nested too deep, or one has a name that is
            reserved or is not valid for a variable.
    """
    if not kwargs:
        return {}
    if not isinstance(kwargs, Mapping):
        raise InvalidParameter(FIELD, "must be an object with the template's variables")
    for name in kwargs:
        if not isinstance(name, str) or not name.isidentifier():
            raise InvalidParameter(FIELD, f"has the name {name!r:.60}, which is not a variable's name")
        if name in RESERVED:
            raise InvalidParameter(FIELD, f"must not set {name}: other fields of the request decide it")
    try:
        size = len(json.dumps(dict(kwargs), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidParameter(FIELD, "cannot be written as JSON") from error
    if size > MAX_BYTES:
        raise InvalidParameter(FIELD, f"is longer than {MAX_BYTES >> 10} KiB")
    if too_deep(kwargs, MAX_DEPTH) is not None:
        raise InvalidParameter(FIELD, f"has more than {MAX_DEPTH} nested levels")
    for name in kwargs.keys() - set(known):
        _tell(chat_format, name)
    return kwargs


def _tell(chat_format: str, name: str) -> None:
    with _telling:
        if (chat_format, name) in _told or len(_told) >= MAX_TOLD:
            return
        _told.add((chat_format, name))
    log.warning("ignored a variable that the chat format does not read: %.60s, %.60s", name, chat_format)
