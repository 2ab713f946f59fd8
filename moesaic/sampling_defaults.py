"""Reads the sampling parameters that a checkpoint recommends in generation_config.json.

Programs write these values in several ways: a number as text, or a value outside the range of a parameter that means
"off". Each is read as it is meant. A value without a meaning is refused when the model is loaded; otherwise every
request that does not set the parameter would fail, and the client would be blamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.engine import Sampling
from moesaic.errors import ConfigError, InvalidParameter

OFF: Mapping[str, float | int] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
"""The sampling parameters that are read, and the value of each that changes nothing."""
OFF_IF_ZERO = ("top_k", "top_p", "typical_p", "repetition_penalty")
"""Parameters that other programs switch off with 0. It can mean nothing else: a real limit of 0 would allow no
token."""
FLAGS = {"true": True, "false": False, "1": True, "0": False}


def sampling_defaults(generation: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the sampling parameters in the content of a generation_config.json; null counts as absent.

    ``do_sample: false`` means temperature 0.

    Args:
        generation: the content of the file.
        file: the generation_config.json, for error messages.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message names the file and the key.
    """
    values: dict[str, Any] = {
        name: _number(name, generation[name], file) for name in OFF if generation.get(name) is not None
    }
    for name, value in values.items():
        if name in OFF_IF_ZERO and (value == 0 or (name == "top_k" and value == -1)):
            values[name] = OFF[name]
    if not _flag("do_sample", generation.get("do_sample"), file):
        values["temperature"] = 0.0
    try:
        Sampling(**values)
    except InvalidParameter as error:
        raise ConfigError(file, f"{error}; correct it in this file, or delete it there") from error
    return values


def _number(name: str, value: Any, file: Path) -> float | int:
    """Return the value of the parameter ``name`` as a number; it may be written as text.

    The value of an integer parameter may be written as 40.0.
    """
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise ConfigError(file, f"{name} is {value!r}, expected a number; correct it in this file, or delete it there")
    return int(number) if isinstance(OFF[name], int) and number.is_integer() else number


def _flag(name: str, value: Any, file: Path) -> bool:
    """Return ``value`` as true or false; it may be written as text or as a number, and None is true."""
    flag = True if value is None else FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise ConfigError(
            file, f"{name} is {value!r}, expected true or false; correct it in this file, or delete it there"
        )
    return flag
