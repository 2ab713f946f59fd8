"""Validation of a request's parameters against its endpoint's definition; all problems are reported at once.

The error messages are those of the AIME API server, because client programs compare them. Four faults of that server
are corrected: ``min = 0`` is effective, the type ``str`` is supported, a boolean is not a number, and a text that is
too long is truncated rather than replaced by its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from moesaic.cluster.aime.settings import SUPPORTED_KINDS, Definition, Parameter
from moesaic.errors import InvalidRequest
from moesaic.serve.json_body import decode_json

COMMON_FIELDS = ("key", "client_session_auth_key", "wait_for_result")
"""Fields that every request may contain in addition to the endpoint's parameters."""
TYPES: Mapping[str, tuple[type, tuple[type, ...]]] = {
    "string": (str, (str,)),
    "text_context": (str, (str,)),
    "integer": (int, (int, float)),
    "float": (float, (int, float)),
    "bool": (bool, (bool,)),
    "json": (str, (str, list, dict)),
    "chat_context": (str, (str, list)),
}
"""For each kind of parameter: the Python type that error messages name, and the accepted types."""
MAX_SHOWN_CHARACTERS = 80
"""Maximum number of characters of a value in an error message."""


def check_parameters(fields: Mapping[str, Any], definition: Definition) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all parameters in a request's ``fields``, including defaults, and a list of error messages.

    The values must not be used if there are error messages. A null value is the same as a missing one.
    """
    names = {parameter.name for parameter in definition.inputs}
    present = {name: value for name, value in fields.items() if value is not None}
    problems = []
    if unknown := [name for name in fields if name not in names and name not in COMMON_FIELDS]:
        shown = ", ".join(name[:MAX_SHOWN_CHARACTERS] for name in unknown[:20])
        problems.append(f"Invalid input parameter(s): {shown}")
    if not isinstance(present.get("wait_for_result", True), bool):
        problems.append(_wrong_type("wait_for_result", present["wait_for_result"], bool))
    values = {}
    for parameter in definition.inputs:
        if parameter.name in present:
            try:
                values[parameter.name] = _value(parameter, present[parameter.name])
            except ValueError as error:
                problems.append(str(error))
        elif parameter.required:
            problems.append(f"Missing required argument: {parameter.name}")
        elif parameter.default is not None:
            values[parameter.name] = parameter.default
    return {name: value for name, value in values.items() if value != ""}, problems


def _value(parameter: Parameter, value: Any) -> Any:
    if parameter.kind not in SUPPORTED_KINDS:
        raise ValueError(f"Input parameter {parameter.name} of type {parameter.kind} is not served here")
    expected, accepted = TYPES.get(parameter.kind) or _selection_types(parameter)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(_wrong_type(parameter.name, value, expected))
    return CONVERTERS[parameter.kind](parameter, value)


def _selection_types(parameter: Parameter) -> tuple[type, tuple[type, ...]]:
    first = parameter.default if parameter.default is not None else next(iter(parameter.supported), "")
    return type(first), (type(first),)


def _wrong_type(name: str, value: Any, expected: type) -> str:
    return f"Invalid argument type {name}={_shown(value)}. Expected: {expected} but got {type(value)}!"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _text(parameter: Parameter, value: str) -> str:
    limit = parameter.max_length
    if limit is None or len(value) <= limit:
        return value
    if parameter.auto_convert:
        return value[:limit]
    raise ValueError(
        f"Length of parameter {parameter.name} is {len(value)}. "
        f"Maximum supported length for {parameter.name} on this endpoint is {limit}!"
    )


def _integer(parameter: Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(_wrong_type(parameter.name, value, int))
    return _in_range(parameter, int(value))


def _float(parameter: Parameter, value: float) -> float:
    try:
        return _in_range(parameter, float(value))
    except OverflowError:
        raise ValueError(_wrong_type(parameter.name, value, float)) from None


def _in_range(parameter: Parameter, value: float) -> float:
    name, low, high = parameter.name, parameter.low, parameter.high
    if parameter.auto_convert:
        value = value if low is None else max(low, value)
        value = value if high is None else min(high, value)
        return value if not parameter.align else type(value)(value // parameter.align * parameter.align)
    if low is not None and value < low:
        raise ValueError(_bound(name, value, "low", "Min", low))
    if high is not None and value > high:
        raise ValueError(_bound(name, value, "high", "Max", high))
    if parameter.align and value % parameter.align:
        raise ValueError(f"Parameter {name} = {value} is not a multiple of {parameter.align}!")
    return value


def _bound(name: str, value: float, which: str, end: str, bound: float) -> str:
    return (
        f"Parameter {name} = {_shown(value)} is too {which}. "
        f"{end} supported value for {name} on this endpoint is {bound}!"
    )


def _selection(parameter: Parameter, value: Any) -> Any:
    if value in parameter.supported:
        return value
    if parameter.auto_convert and parameter.default is not None:
        return parameter.default
    supported = ", ".join(str(option) for option in parameter.supported)
    raise ValueError(f"Parameter {parameter.name}={_shown(value)} is not supported. Supported values: {supported}")


def _json(parameter: Parameter, value: Any) -> Any:
    """Return the value of a JSON string, and "" for null. Return "" and values that are not strings unchanged."""
    if not isinstance(value, str) or value == "":
        return value
    try:
        decoded = decode_json(value.encode(), Any)
    except InvalidRequest:
        raise ValueError(f"Input parameter {parameter.name}=[{_shown(value)}] has invalid json format!") from None
    return "" if decoded is None else decoded


def _chat(parameter: Parameter, value: Any) -> Any:
    messages = _json(parameter, value)
    if messages != "" and not isinstance(messages, list):
        raise ValueError(_wrong_type(parameter.name, value, list))
    return messages


CONVERTERS: Mapping[str, Callable[[Parameter, Any], Any]] = {
    "string": _text,
    "text_context": _text,
    "integer": _integer,
    "float": _float,
    "bool": lambda _, value: value,
    "selection": _selection,
    "json": _json,
    "chat_context": _chat,
}
