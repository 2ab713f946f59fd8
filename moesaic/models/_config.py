"""Reads a checkpoint's configuration by allow-list.

Knows how to take typed values out of a ``config.json`` dictionary and to refuse what is left
over. Does not know what any value is for. A key that nobody took and that asks for something
(it is not null, false or empty) may change the computation, so it is refused by name: a wrong
guess would run, and answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError

_REQUIRED = object()

# Keys that describe training, bookkeeping, or what the engine and text layers read for themselves.
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
    """The keys of one configuration, each taken at most by its name and kind."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = dict(raw)
        self._taken: set[str] = set()
        self.path = path

    def fail(self, message: str) -> ConfigError:
        """Return the error to raise about this configuration."""
        return ConfigError(self.path, message)

    def has(self, name: str) -> bool:
        """Return whether ``name`` is there, null or not."""
        return name in self._raw

    def get(self, name: str, default: Any = None) -> Any:
        """Take ``name`` as it is; null counts as absent."""
        self._taken.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """Take a whole number of at least ``least``; ``default`` where it is absent."""
        value = self.get(name, default)
        if value is _REQUIRED:
            raise self.fail(f"the key {name!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f"{name} is {value!r}, expected a whole number of at least {least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """Take a finite positive number; ``default`` where it is absent."""
        value = self.get(name, default)
        if value is _REQUIRED:
            raise self.fail(f"the key {name!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(f"{name} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Take true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"{name} is {value!r}, expected true or false")
        return value

    def only(self, name: str, *known: Any) -> Any:
        """Take a value that must be absent or one of ``known``, the first being the default."""
        value = self.get(name, known[0])
        if value not in known:
            names = ", ".join(repr(each) for each in known)
            raise self.fail(f"{name} is {value!r}, which changes the computation; only {names} is supported")
        return value

    def finish(self) -> None:
        """Refuse what nobody took, unless it is harmless or asks for nothing."""
        left = self._raw.keys() - self._taken - HARMLESS
        asking = sorted(name for name in left if self._raw[name] not in (None, False, "", [], {}))
        if asking:
            raise self.fail(f"the key {asking[0]!r} is not known and may change the computation")
