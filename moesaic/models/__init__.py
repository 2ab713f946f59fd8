"""Definitions that read like the paper: one file = one architecture.

A file ``models/<name>.py`` defines

    MODEL_TYPES                              the ``model_type`` values of config.json it answers to
    configure(keys)                          Keys -> its frozen Config
    build(config, formats, group, dtype)     Config -> Decoder, weights unset

Knows which file a configuration belongs to. Does not read files and does not fill weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic import registry
from moesaic.errors import ConfigError
from moesaic.formats import Packed
from moesaic.models._config import Keys
from moesaic.models._layers import Decoder
from moesaic.ops import Group

__all__ = ["Decoder", "build", "types"]

ROLES = ("embedding", "attention", "mlp", "experts", "head")


def types() -> dict[str, str]:
    """Return every known ``model_type`` and the file that answers to it."""
    return {kind: name for name in registry.names("models") for kind in registry.load("models", name).MODEL_TYPES}


def build(
    raw: Mapping[str, Any],
    path: Path,
    format: type[Packed],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    group: Group | None = None,
) -> Decoder:
    """Return the model that a config.json dictionary describes, its weights unset.

    Args:
        raw: the configuration, in config.json's vocabulary.
        path: where it came from, for error messages.
        format: what the weights are made of; router and norms are float32 regardless.
        dtype: what activations are computed in.
        device: where the weights go; ``meta`` takes no memory.
        group: the ranks that share the model.

    Raises:
        ConfigError: a key is missing, wrong or not understood.
    """
    known = types()
    kind = raw.get("model_type")
    if kind not in known:
        raise ConfigError(path, f"model_type {kind!r} is not known; this build has {', '.join(sorted(known))}")
    module = registry.load("models", known[kind])
    keys = Keys(raw, path)
    config = module.configure(keys)
    keys.finish()
    with torch.device(device):
        model: Decoder = module.build(config, dict.fromkeys(ROLES, format), group or Group(), dtype)
    return model.eval()
