"""Definitions that read like the paper: one file = one architecture.

A file ``models/<name>.py`` defines

    MODEL_TYPES                              the ``model_type`` values of config.json it answers to
    configure(keys)                          Keys -> its frozen Config
    build(config, formats, group, dtype)     Config -> Decoder, weights unset

Knows which file a configuration belongs to. Does not read files and does not fill weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic import formats, registry
from moesaic.errors import ConfigError, InvalidParameter
from moesaic.formats import Packed
from moesaic.models._config import Keys
from moesaic.models._layers import Decoder, Experts
from moesaic.ops import Group

__all__ = ["Decoder", "Experts", "build", "choose", "parameters", "types"]

ROLES = ("embedding", "attention", "mlp", "experts", "head")
QUANTIZED = ROLES[1:]
"""Roles that a format may be chosen for; an embedding is looked up, not multiplied, and stays plain."""

PRESETS = {
    "q8": dict.fromkeys(QUANTIZED, "int8"),
    "q4": dict.fromkeys(QUANTIZED, "int4") | {"head": "int8"},
    "q3": {"attention": "int4", "mlp": "int3", "experts": "int3", "head": "int8"},
    "q2": {"attention": "int4", "mlp": "int2", "experts": "int2", "head": "int8"},
}
"""Choices that fit together: what is small and always read keeps more bits than what is large."""


def choose(text: str, plain: str) -> dict[str, type[Packed]]:
    """Return the format of each role that ``text`` asks for; the later part of it wins.

    Args:
        text: parts with commas between them: a preset, a format for all roles, or role=format.
        plain: the format of what is not named.

    Raises:
        InvalidParameter: a part is none of these.
    """
    chosen, known = dict.fromkeys(ROLES, plain), registry.names("formats")
    for part in text.split(","):
        role, _, name = part.strip().rpartition("=")
        if role and role not in QUANTIZED:
            raise InvalidParameter("format", f"has no part {role!r}: there are {', '.join(QUANTIZED)}")
        if name in PRESETS and not role:
            chosen |= PRESETS[name]
        elif name in known:
            chosen |= dict.fromkeys([role] if role else QUANTIZED, name)
        else:
            choices = ", ".join((*(() if role else PRESETS), *known))
            raise InvalidParameter("format", f"{name!r} is unknown: there are {choices}")
    return {role: formats.load(name) for role, name in chosen.items()}


def types() -> dict[str, str]:
    """Return every known ``model_type`` and the file that answers to it."""
    return {kind: name for name in registry.names("models") for kind in registry.load("models", name).MODEL_TYPES}


def build(
    raw: Mapping[str, Any],
    path: Path,
    format: type[Packed] | Mapping[str, type[Packed]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    group: Group | None = None,
) -> Decoder:
    """Return the model that a config.json dictionary describes, its weights unset.

    Args:
        raw: the configuration, in config.json's vocabulary.
        path: where it came from, for error messages.
        format: what the weights are made of, for all or by role; router and norms are float32 regardless.
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
        roles = format if isinstance(format, Mapping) else dict.fromkeys(ROLES, format)
        model: Decoder = module.build(config, roles, group or Group(), dtype)
    return model.eval()


def parameters(model: nn.Module) -> int:
    """Return how many numbers the weights of ``model`` stand for, whatever they are stored in."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    inside = {id(part) for weight in packed for part in weight.parts().values()}
    others = sum(each.numel() for each in model.parameters() if id(each) not in inside)
    return others + sum(math.prod(weight.shape) for weight in packed)
