"""Takes values out of a JSON object one by one, and refuses what is left over by name.

Knows kinds and defaults. Does not know what any key means: the caller says which keys there are
and which do not matter. A key that nobody took could change the computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError

REQUIRED = object()


class Fields:
    """The keys of one object; null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._left = {key: value for key, value in raw.items() if value is not None}
        self.path = path

    def fail(self, message: str) -> ConfigError:
        """Return the error to raise about this object."""
        return ConfigError(self.path, message)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Take ``name`` as it is; without a default it must be there."""
        value = self._left.pop(name, default)
        if value is REQUIRED:
            raise self.fail(f"does not say {name!r}, which this layout needs")
        return value

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """Take a positive whole number, which some files write as a string, or the default."""
        value = self.take(name, default)
        if value is default:
            return value
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if type(value) is not int or value < 1:
            raise self.fail(f"{name} is {value!r}, expected a positive whole number")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """Take a positive finite number as a float, or the default."""
        value = self.take(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fail(f"{name} is {value!r}, expected a positive number")
        return float(value)

    def only(self, name: str, *known: Any) -> None:
        """Take a value that must be absent or one of ``known``."""
        value = self.take(name, None)
        if value is not None and value not in known:
            raise self.fail(f"{name} is {value!r}, which cannot be carried over; only {known[0]!r} can")

    def nested(self, name: str) -> Fields | None:
        """Take an object, or None where there is none."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(f"{name} is {value!r}, expected an object")
        return Fields(value, self.path)

    def has(self, name: str) -> bool:
        """Return whether ``name`` is there and not yet taken."""
        return name in self._left

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse what nobody took, but for ``harmless`` keys and values that ask for nothing."""
        left = sorted(key for key in self._left.keys() - set(harmless) if self._left[key] not in (False, "", [], {}))
        if left:
            raise self.fail(f"the key {left[0]!r} is not known here and may change the computation")
