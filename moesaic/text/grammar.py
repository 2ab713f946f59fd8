"""Grammars that hold an answer to a form: JSON of a schema, a regular expression, a choice, a Lark grammar.

Knows what a grammar is and how long it may be: whoever sends a request may write one. Does not know how
it is compiled nor what it costs then (``compiler``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from moesaic.errors import InvalidParameter

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

MAX_BYTES = 64 << 10  # of a schema, of all choices together, of a Lark grammar
MAX_DEPTH = 16
MAX_REGEX_BYTES = 4 << 10
MAX_CHOICES = 512

STYLE = {"whitespace_pattern": "[ ]?"}
"""One space may stand wherever JSON lets white space stand: with more, a model can write nothing else for ever."""


@dataclass(frozen=True)
class Grammar:
    """What an answer has to be.

    ``value`` is for json_schema the schema (a mapping, or its JSON text), for json_object nothing, for regex
    and lark the text (Rust's regex syntax; llguidance's Lark dialect), for choice a sequence of strings.
    ``param`` is what errors call it. ``parts`` are grammars that it was made of: where it is refused, the
    one among them that is at fault is named.

    Raises:
        InvalidParameter: an unknown kind, a value of the wrong kind, or one past the bounds above.
    """

    kind: Kind
    value: Any = None
    param: str = field(default="grammar", compare=False)
    parts: tuple[Grammar, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[Any], Any]] = {
            "json_schema": self._schema,
            "json_object": self._nothing,
            "regex": lambda value: self._text(value, MAX_REGEX_BYTES),
            "choice": self._choices,
            "lark": lambda value: self._text(value, MAX_BYTES),
        }
        if not isinstance(self.kind, str) or self.kind not in checks:
            raise self.error(f"has the kind {self.kind!r:.80}; there are {', '.join(get_args(Kind))}")
        object.__setattr__(self, "value", checks[self.kind](self.value))

    def error(self, message: str) -> InvalidParameter:
        """Return an error that names this grammar as its sender does."""
        return InvalidParameter(self.param, message)

    @property
    def source(self) -> str:
        """The grammar as text, which says all of it: equal sources, equal grammars."""
        return f"{self.kind}:{self.value if isinstance(self.value, str) else json.dumps(self.value)}"

    def _nothing(self, value: Any) -> None:
        if value not in (None, {}):
            raise self.error("of kind json_object takes no value")

    def _text(self, value: Any, most: int) -> str:
        if not isinstance(value, str) or not value:
            raise self.error(f"of kind {self.kind} must be a string that is not empty")
        if len(value.encode("utf-8", "surrogatepass")) > most:
            raise self.error(f"is longer than {most >> 10} KiB")
        return self._encodable(value)

    def _encodable(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"has half a surrogate at character {error.start}, which is no text") from error
        return text

    def _choices(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str | Mapping) or not hasattr(value, "__len__") or not 1 <= len(value) <= MAX_CHOICES:
            raise self.error(f"of kind choice must be a list of 1 to {MAX_CHOICES} strings")
        for place, text in enumerate(value):
            if not isinstance(text, str) or not text:
                raise self.error(f"[{place}] must be a string that is not empty")
            self._encodable(text)
        if sum(len(text.encode()) for text in value) > MAX_BYTES:
            raise self.error(f"is longer than {MAX_BYTES >> 10} KiB")
        return tuple(value)

    def _schema(self, value: Any) -> str:
        """Return the schema's JSON text, the properties in its own order, which is the order of the answer's."""
        try:
            if isinstance(value, str):
                value = json.loads(self._text(value, MAX_BYTES))
            text = json.dumps(value, allow_nan=False)
        except RecursionError as error:
            raise self.error(f"is nested deeper than {MAX_DEPTH}") from error
        except (ValueError, TypeError) as error:
            raise self.error(f"is no JSON: {error}") from error
        if not isinstance(value, Mapping):
            raise self.error("of kind json_schema must be a JSON object")
        if len(text) > MAX_BYTES:
            raise self.error(f"is longer than {MAX_BYTES >> 10} KiB")
        if (deep := too_deep(value, MAX_DEPTH)) is not None:
            raise self.error(f"is nested deeper than {MAX_DEPTH}, at {deep}")
        return self._encodable(text)


def too_deep(value: Any, most: int) -> str | None:
    """Return the JSON pointer of a part that lies deeper than ``most`` levels, if there is one."""
    level = [("#", value)]
    for _ in range(most):
        level = [
            (f"{path}/{key}", part)
            for path, whole in level
            for key, part in (whole.items() if isinstance(whole, Mapping) else enumerate(whole))
            if isinstance(part, Mapping | list | tuple)
        ]
        if not level:
            return None
    return level[0][0][:200]
