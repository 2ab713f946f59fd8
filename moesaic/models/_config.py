"""Strict reader of a checkpoint's configuration: every key must be read or be known as harmless.

This module reads typed values from a ``config.json`` dictionary. It does not depend on their meaning. A key that was
not read and is not null, false or empty may change the computation, so it is an error: if it were ignored, the model
would run and give wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError

_REQUIRED = object()

# Keys that describe training or bookkeeping, or that the engine and text layers read themselves.
HARMLESS = frozenset(
    {
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "pretraining_tp",
        "id2label",
        "label2id",
        "problem_type",
        "num_labels",
        "classifier_dropout",
        "return_dict",
        "use_return_dict",
        "max_length",
        "unsloth_version",
    }
)


class Keys:
    """The keys of one configuration. A method that reads a key marks it as read."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = dict(raw)
        self._taken: set[str] = set()
        self.path = path

    def fail(self, message: str) -> ConfigError:
        """Return the error to raise about this configuration."""
        return ConfigError(self.path, message)

    def has(self, name: str) -> bool:
        """Return whether the key ``name`` exists, even if it is null."""
        return name in self._raw

    def get(self, name: str, default: Any = None) -> Any:
        """Read ``name`` without conversion; null counts as absent."""
        self._taken.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """Read an integer of at least ``least``; return ``default`` if it is absent."""
        value = self.get(name, default)
        if value is _REQUIRED:
            raise self.fail(f"the key {name!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f"{name} is {value!r}, expected a whole number of at least {least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Read a finite positive number; return ``default`` if it is absent."""
        value = self.get(name, default)
        if value is _REQUIRED:
            raise self.fail(f"the key {name!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(f"{name} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Read true or false; return ``default`` if it is absent."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"{name} is {value!r}, expected true or false")
        return value

    def only(self, name: str, *supported: Any) -> Any:
        """Read a value that must be one of ``supported``; return the first of them if it is absent."""
        value = self.get(name, supported[0])
        if value not in supported:
            names = ", ".join(repr(choice) for choice in supported)
            raise self.fail(f"{name} is {value!r}, which changes the computation; only {names} is supported")
        return value

    def finish(self) -> None:
        """Raise ConfigError if an unread key may change the computation."""
        left = self._raw.keys() - self._taken - HARMLESS
        unknown = sorted(name for name in left if self._raw[name] not in (None, False, "", [], {}))
        if unknown:
            raise self.fail(f"the key {unknown[0]!r} is not known and may change the computation")
