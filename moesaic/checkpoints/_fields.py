"""Strict reader for JSON objects: the caller takes (removes) the keys that it knows, and other keys are refused.

A key that was not taken could change the computation. This module checks types and fills in defaults. It does not
depend on the meaning of keys: the caller names the keys that exist and those to ignore.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic.config_keys import whole
from moesaic.errors import ConfigError

REQUIRED = object()


class Fields:
    """A JSON object from which the caller takes (removes) keys; a key with the value null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._left = {key: value for key, value in raw.items() if value is not None}
        self.path = path

    def error(self, message: str) -> ConfigError:
        """Return an error about this object, for the caller to raise."""
        return ConfigError(self.path, message)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Remove the key ``name`` and return its value unchanged, or ``default`` if it is absent.

        Raises:
            ConfigError: the key is absent, and there is no ``default``.
        """
        value = self._left.pop(name, default)
        if value is REQUIRED:
            raise self.error(f"has no {name!r}, which this layout requires")
        return value

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """Remove the key ``name`` and return its value, a positive integer; ``default`` if it is absent.

        The file may write the integer as a string or as 1024.0.

        Raises:
            ConfigError: the value is not a positive integer, or the key is absent and there is no ``default``.
        """
        value = whole(self.take(name, default))
        if value is default:
            return value
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if type(value) is not int or value < 1:
            raise self.error(f"{name} is {value!r}, expected a positive integer")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """Remove the key ``name`` and return its value, a positive finite float; ``default`` if it is absent.

        Raises:
            ConfigError: the value is not such a number, or the key is absent and there is no ``default``.
        """
        value = self.take(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(f"{name} is {value!r}, expected a positive number")
        return float(value)

    def allow(self, name: str, *values: Any) -> None:
        """Remove the key ``name``; raise ConfigError if it is present with a value that is not one of ``values``."""
        value = self.take(name, None)
        if value is not None and value not in values:
            raise self.error(f"{name} is {value!r}, which is not supported here; only {values[0]!r} is")

    def nested(self, name: str) -> Fields | None:
        """Remove the key ``name`` and return its value, a JSON object, as ``Fields``; None if the key is absent."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"{name} is {value!r}, expected an object")
        return Fields(value, self.path)

    def has(self, name: str) -> bool:
        """Return whether the key ``name`` is present and was not taken."""
        return name in self._left

    @property
    def left(self) -> Mapping[str, Any]:
        """The keys that were not taken, and their values."""
        return self._left

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise ConfigError if a key was not taken, unless it is ``ignored`` or its value is false or empty."""
        left = sorted(key for key in self._left.keys() - set(ignored) if self._left[key] not in (False, "", [], {}))
        if left:
            raise self.error(f"the key {left[0]!r} is unknown and may change the computation")
