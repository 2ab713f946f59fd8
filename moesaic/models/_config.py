"""Strict reader of a checkpoint's configuration: every key must be read or be known as harmless.

This module reads typed values from a ``config.json`` dictionary. It does not depend on their meaning. A key that was
not read and may change the computation is an error: if it were ignored, the model would run and give wrong answers.
``moesaic.config_keys`` lists the keys that change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic import config_keys
from moesaic.errors import ConfigError

_REQUIRED = object()


class Keys:
    """The keys of one config.json. A method that reads a key marks it as read; ``finish`` checks the unread keys."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = dict(raw)
        self._taken: set[str] = set()
        self.path = path

    def fail(self, message: str) -> ConfigError:
        """Return the error with ``message`` to raise about this configuration; it names the file."""
        return ConfigError(self.path, message)

    def has(self, name: str) -> bool:
        """Return whether the key ``name`` exists, even if it is null."""
        return name in self._raw

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of the key ``name`` unchanged; return ``default`` if the key is absent or null."""
        self._taken.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """Return the integer at the key ``name``, or ``default`` if the key is absent.

        The file may write it as 1024.0.

        Raises:
            ConfigError: the value is no integer or less than ``least``, or an absent key has no default.
        """
        value = config_keys.whole(self.get(name, default))
        if value is _REQUIRED:
            raise self.fail(f"the key {name!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f"{name} is {value!r}, expected a whole number of at least {least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Return the finite positive number at the key ``name``, or ``default`` if the key is absent.

        Raises:
            ConfigError: the value is no such number, or an absent key has no default.
        """
        value = self.get(name, default)
        if value is _REQUIRED:
            raise self.fail(f"the key {name!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(f"{name} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return the value of the key ``name``, which must be true or false, or ``default`` if the key is absent."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"{name} is {value!r}, expected true or false")
        return value

    def only(self, name: str, *supported: Any) -> Any:
        """Return the value of the key ``name``, or the first of ``supported`` if the key is absent.

        Raises:
            ConfigError: the value is not one of ``supported``.
        """
        value = self.get(name, supported[0])
        if value not in supported:
            names = ", ".join(repr(choice) for choice in supported)
            raise self.fail(f"{name} is {value!r}, which changes the computation; only {names} is supported")
        return value

    def finish(self) -> None:
        """Raise ConfigError if a key that no method has read may change the computation."""
        problem = config_keys.problem({name: self._raw[name] for name in self._raw.keys() - self._taken})
        if problem:
            raise self.fail(problem)
