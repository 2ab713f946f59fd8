"""Model definitions: each file is one architecture, written like the paper.

A file ``models/<name>.py`` defines

    MODEL_TYPES                              the ``model_type`` values of config.json that it implements
    configure(keys)                          Keys -> its frozen Config
    build(config, formats, group, dtype)     Config -> Decoder with uninitialized weights

This module finds the file for a configuration. It does not read files or load weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic import formats, registry
from moesaic.errors import ConfigError, InvalidParameter
from moesaic.formats import Packed, WeightFormat
from moesaic.models._config import Keys
from moesaic.models._layers import Decoder, Experts, Formats, Shape
from moesaic.ops import Group

__all__ = ["Decoder", "Experts", "Formats", "Shape", "build", "choose", "named", "parameters", "role", "types"]

ROLES = ("embedding", "attention", "mlp", "experts", "head")
QUANTIZED = ROLES[1:]
"""Roles whose format can be chosen; an embedding is looked up, not multiplied, and stays unquantized."""

_NAMES = (
    ("experts", re.compile(r"\.experts\.")),
    ("attention", re.compile(r"\.self_attn\.")),
    ("mlp", re.compile(r"\.mlp\.")),
    ("embedding", re.compile(r"\.embed_tokens\.")),
    ("head", re.compile(r"lm_head|score")),
)
"""What the names of each role's tensors contain."""

PRESETS = {
    "q8": dict.fromkeys(QUANTIZED, "int8"),
    "q4": dict.fromkeys(QUANTIZED, "int4") | {"head": "int8"},
    "q3": {"attention": "int4", "mlp": "int3", "experts": "int3", "head": "int8"},
    "q2": {"attention": "int4", "mlp": "int2", "experts": "int2", "head": "int8"},
}
"""Named combinations of formats: small weights that every token reads keep more bits than large ones."""


def choose(text: str, plain: str) -> dict[str, WeightFormat]:
    """Return the format of each role of weights (embedding, attention, mlp, experts, head).

    Args:
        text: formats, as ``named`` reads them.
        plain: name of the format of the roles that ``text`` does not name.

    Raises:
        InvalidParameter: an item of ``text`` is unknown.
    """
    return {role: formats.load(name) for role, name in (dict.fromkeys(ROLES, plain) | named(text)).items()}


def named(text: str) -> dict[str, str]:
    """Return the name of the format of each role that ``text`` names; it cannot name the embedding.

    Args:
        text: items separated by commas: a preset, a format for all roles, or role=format. Later items override
            earlier ones.

    Raises:
        InvalidParameter: an item is none of these.
    """
    chosen: dict[str, str] = {}
    available = registry.names("formats")
    for part in text.split(","):
        role, _, name = part.strip().rpartition("=")
        if role and role not in QUANTIZED:
            raise InvalidParameter("format", f"has no role {role!r}; roles of weights: {', '.join(QUANTIZED)}")
        if name in PRESETS and not role:
            chosen |= PRESETS[name]
        elif name in available:
            chosen |= dict.fromkeys([role] if role else QUANTIZED, name)
        else:
            choices = ", ".join((*(() if role else PRESETS), *available))
            raise InvalidParameter("format", f"{name!r} is unknown; available: {choices}")
    return chosen


def role(name: str) -> str | None:
    """Return the role of the weight with this tensor name, one of ``ROLES``; None for norms, routers and others."""
    return next((found for found, pattern in _NAMES if pattern.search(name)), None)


def types() -> dict[str, str]:
    """Return, for each supported ``model_type`` of config.json, the name of its file in ``moesaic/models``."""
    return {kind: name for name in registry.names("models") for kind in registry.load("models", name).MODEL_TYPES}


def build(
    raw: Mapping[str, Any],
    path: Path,
    weight_format: WeightFormat | Mapping[str, WeightFormat] | Formats,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    group: Group | None = None,
) -> Decoder:
    """Return the model that a config.json dictionary describes, with uninitialized weights.

    Args:
        raw: the configuration, with the keys of config.json.
        path: where the configuration comes from, for error messages.
        weight_format: format of all weights, or of the weights of each role and of single weights by the names of their
            tensors, or a function that returns the format of each weight; router and norms are always float32.
        dtype: dtype of the activations.
        device: device of the weights; ``meta`` takes no memory.
        group: the ranks that share the model.

    Raises:
        ConfigError: a key is missing, wrong or unknown.
    """
    files = types()
    kind = raw.get("model_type")
    if kind not in files:
        raise ConfigError(path, f"model_type {kind!r} is not supported; supported: {', '.join(sorted(files))}")
    module = registry.load("models", files[kind])
    keys = Keys(raw, path)
    config = module.configure(keys)
    keys.finish()
    with torch.device(device):
        model: Decoder = module.build(config, _by_weight(weight_format), group or Group(), dtype)
    return model.eval()


def _by_weight(chosen: WeightFormat | Mapping[str, WeightFormat] | Formats) -> Formats:
    if isinstance(chosen, WeightFormat):
        return lambda _role, _name: chosen
    if isinstance(chosen, Mapping):
        return lambda role, name: chosen.get(name) or chosen[role]
    return chosen


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of ``model``, counted as before quantization."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    inside = {id(part) for weight in packed for part in weight.parts().values()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return others + sum(math.prod(weight.shape) for weight in packed)
