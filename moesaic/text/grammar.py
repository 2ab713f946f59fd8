"""Grammars that constrain an answer: a JSON schema, a regular expression, a list of choices, or a Lark grammar.

Grammars come from requests, so this module limits their size and depth. ``compiler`` compiles them and limits what
they cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from moesaic.errors import InvalidParameter

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

MAX_BYTES = 64 << 10  # maximum size of a schema, of all choices together, and of a Lark grammar
MAX_DEPTH = 16
MAX_REGEX_BYTES = 4 << 10
MAX_CHOICES = 512

STYLE = {"whitespace_pattern": "[ ]?"}
"""Options of llguidance for JSON: at most one space where JSON allows white space. Without a limit, a model could write
white space without end."""


@dataclass(frozen=True)
class Grammar:
    """Grammar that an answer must match.

    The type of ``value`` depends on ``kind``. For json_schema it is the schema (a mapping, or its JSON text); for
    json_object None; for regex and lark a string (Rust's regex syntax; llguidance's Lark dialect); for choice a
    sequence of strings. ``param`` is the name of the request's field, which errors about the grammar state. ``parts``
    are the grammars that this one was made from; if it is rejected, the error names the part that causes it.

    Raises:
        InvalidParameter: the kind is unknown, the value has the wrong type, or it exceeds a limit.
    """

    kind: Kind
    value: Any = None
    param: str = field(default="grammar", compare=False)
    parts: tuple[Grammar, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[Any], Any]] = {
            "json_schema": self._schema,
            "json_object": self._no_value,
            "regex": lambda value: self._text(value, MAX_REGEX_BYTES),
            "choice": self._choices,
            "lark": lambda value: self._text(value, MAX_BYTES),
        }
        if not isinstance(self.kind, str) or self.kind not in checks:
            raise self.error(f"has the unknown kind {self.kind!r:.80}; available kinds: {', '.join(get_args(Kind))}")
        object.__setattr__(self, "value", checks[self.kind](self.value))

    def error(self, message: str) -> InvalidParameter:
        """Return an InvalidParameter error that names this grammar by ``param``."""
        return InvalidParameter(self.param, message)

    @property
    def source(self) -> str:
        """Kind and complete text of the grammar in one string; two grammars are equal if their sources are equal."""
        return f"{self.kind}:{self.value if isinstance(self.value, str) else json.dumps(self.value)}"

    def _no_value(self, value: Any) -> None:
        if value not in (None, {}):
            raise self.error("of kind json_object takes no value")

    def _text(self, value: Any, max_bytes: int) -> str:
        if not isinstance(value, str) or not value:
            raise self.error(f"of kind {self.kind} must be a non-empty string")
        if len(value.encode("utf-8", "surrogatepass")) > max_bytes:
            raise self.error(f"is longer than {max_bytes >> 10} KiB")
        return self._encodable(value)

    def _encodable(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(
                f"has an unpaired surrogate at character {error.start}, which is not valid text"
            ) from error
        return text

    def _choices(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str | Mapping) or not hasattr(value, "__len__") or not 1 <= len(value) <= MAX_CHOICES:
            raise self.error(f"of kind choice must be a list of 1 to {MAX_CHOICES} strings")
        for index, text in enumerate(value):
            if not isinstance(text, str) or not text:
                raise self.error(f"[{index}] must be a non-empty string")
            self._encodable(text)
        if sum(len(text.encode()) for text in value) > MAX_BYTES:
            raise self.error(f"is longer than {MAX_BYTES >> 10} KiB")
        return tuple(value)

    def _schema(self, value: Any) -> str:
        """Return the schema as JSON text. Its properties stay in order, because the answer must follow this order."""
        try:
            if isinstance(value, str):
                value = json.loads(self._text(value, MAX_BYTES))
            text = json.dumps(value, allow_nan=False)
        except RecursionError as error:
            raise self.error(f"has more than {MAX_DEPTH} nested levels") from error
        except (ValueError, TypeError) as error:
            raise self.error(f"is not valid JSON: {error}") from error
        if not isinstance(value, Mapping):
            raise self.error("of kind json_schema must be a JSON object")
        if len(text) > MAX_BYTES:
            raise self.error(f"is longer than {MAX_BYTES >> 10} KiB")
        if (pointer := too_deep(value, MAX_DEPTH)) is not None:
            raise self.error(f"has more than {MAX_DEPTH} nested levels at {pointer}")
        return self._encodable(text)


def too_deep(value: Any, max_depth: int) -> str | None:
    """Return the JSON pointer of an object or list in ``value`` that is nested deeper than ``max_depth``, or None."""
    level = [("#", value)]
    for _ in range(max_depth):
        level = [
            (f"{path}/{key}", part)
            for path, parent in level
            for key, part in (parent.items() if isinstance(parent, Mapping) else enumerate(parent))
            if isinstance(part, Mapping | list | tuple)
        ]
        if not level:
            return None
    return level[0][0][:200]
