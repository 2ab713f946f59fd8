"""Chooses the method of quantization that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.checkpoints import _bitsandbytes, _compressed
from moesaic.checkpoints._views import View

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that describe quantized weights; the second is an older name."""
METHODS = {"bitsandbytes": _bitsandbytes.weight_views, "compressed-tensors": _compressed.weight_views}


def plain_views(
    stored: Mapping[str, View], config: Mapping[str, Any], path: Path
) -> tuple[Mapping[str, View], Mapping[str, Any]]:
    """Return the tensors and the configuration of a checkpoint as if its weights were plain.

    Both are unchanged if the configuration names no method that is supported.
    """
    for key in KEYS:
        settings = config.get(key)
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if isinstance(settings, Mapping) and isinstance(method, str) and method in METHODS:
            rest = {name: value for name, value in config.items() if name != key}
            return METHODS[method](stored, settings, path / "config.json"), rest
    return stored, config
