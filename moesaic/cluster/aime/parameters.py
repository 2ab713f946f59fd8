"""What a request for an endpoint carries: checked against its definition, with all that is wrong with it at once.

The texts are those that AIME's server answers with, for programs look for them; its faults are mended: ``min = 0``
counts, ``str`` is passed on, a boolean is no number, and what is too long is cut rather than replaced by its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from moesaic.cluster.aime.settings import SERVED, Definition, Parameter
from moesaic.errors import InvalidRequest
from moesaic.serve.json_body import decode_json

IMPLIED = ("key", "client_session_auth_key", "wait_for_result")
"""What every request may carry besides."""
TYPES: Mapping[str, tuple[type, tuple[type, ...]]] = {
    "string": (str, (str,)),
    "text_context": (str, (str,)),
    "integer": (int, (int, float)),
    "float": (float, (int, float)),
    "bool": (bool, (bool,)),
    "json": (str, (str, list, dict)),
    "chat_context": (str, (str, list)),
}
"""Of each kind: the type that is demanded by name, and those that do."""
SHOWN = 80
"""Characters of a value that are shown to whoever sent it."""


def checked(given: Mapping[str, Any], definition: Definition) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all parameters, defaults among them, and what is wrong; with anything wrong, they are void.

    A value of null stands for none.
    """
    known = {each.name for each in definition.inputs}
    present = {name: value for name, value in given.items() if value is not None}
    problems = []
    if strange := [name for name in given if name not in known and name not in IMPLIED]:
        problems.append(f"Invalid input parameter(s): {', '.join(each[:SHOWN] for each in strange[:20])}")
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
    if parameter.kind not in SERVED:
        raise ValueError(f"Input parameter {parameter.name} of type {parameter.kind} is not served here")
    demanded, able = TYPES.get(parameter.kind) or _of_selection(parameter)
    if not isinstance(value, able) or (isinstance(value, bool) and demanded is not bool):
        raise ValueError(_wrong_type(parameter.name, value, demanded))
    return KINDS[parameter.kind](parameter, value)


def _of_selection(parameter: Parameter) -> tuple[type, tuple[type, ...]]:
    first = parameter.default if parameter.default is not None else next(iter(parameter.supported), "")
    return type(first), (type(first),)


def _wrong_type(name: str, value: Any, demanded: type) -> str:
    return f"Invalid argument type {name}={_shown(value)}. Expected: {demanded} but got {type(value)}!"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _text(parameter: Parameter, value: str) -> str:
    most = parameter.max_length
    if most is None or len(value) <= most:
        return value
    if parameter.auto_convert:
        return value[:most]
    raise ValueError(
        f"Length of parameter {parameter.name} is {len(value)}. "
        f"Maximum supported length for {parameter.name} on this endpoint is {most}!"
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
    able = ", ".join(str(each) for each in parameter.supported)
    raise ValueError(f"Parameter {parameter.name}={_shown(value)} is not supported. Supported values: {able}")


def _json(parameter: Parameter, value: Any) -> Any:
    """Return JSON in a string as what it says; an empty string says nothing. What is no string is taken as it is."""
    if not isinstance(value, str) or value == "":
        return value
    try:
        found = decode_json(value.encode(), Any)
    except InvalidRequest:
        raise ValueError(f"Input parameter {parameter.name}=[{_shown(value)}] has invalid json format!") from None
    return "" if found is None else found


def _chat(parameter: Parameter, value: Any) -> Any:
    found = _json(parameter, value)
    if found != "" and not isinstance(found, list):
        raise ValueError(_wrong_type(parameter.name, value, list))
    return found


KINDS: Mapping[str, Callable[[Parameter, Any], Any]] = {
    "string": _text,
    "text_context": _text,
    "integer": _integer,
    "float": _float,
    "bool": lambda _, value: value,
    "selection": _selection,
    "json": _json,
    "chat_context": _chat,
}
