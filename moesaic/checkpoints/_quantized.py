"""Checkpoints in the hf layout whose weights are quantized: finds the settings, and chooses the method that reads them.

config.json describes the quantization under one of ``KEYS``; older programs wrote it into a separate file. Each method
has a module with a function

    weight_views(stored, settings, path) -> views

that replaces the tensors of each quantized module by a view of its weight, under the name of the plain weight. The
arguments are the tensors by their names on disk, the value of ``quantization_config``, and the file that holds it. The
view is a ``CodedView``: ``read`` returns floats, and if the format ``grouped`` can keep the numbers of the file,
``codes`` returns them. Which modules are quantized follows from the tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesaic.checkpoints import _awq, _bitsandbytes, _compressed, _gptq
from moesaic.checkpoints._json import read_json
from moesaic.checkpoints._views import View
from moesaic.errors import ConfigError

log = logging.getLogger("moesaic.checkpoints")

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that describe quantized weights; the second is an older name."""
WeightViews = Callable[[Mapping[str, View], Mapping[str, Any], Path], dict[str, View]]
METHODS: Mapping[str, WeightViews] = {
    "awq": _awq.weight_views,
    "bitsandbytes": _bitsandbytes.weight_views,
    "compressed-tensors": _compressed.weight_views,
    "gptq": _gptq.weight_views,
}
"""The methods by their names, ``quant_method`` in the settings."""
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of settings that older programs wrote, and their method."""
_ROUTER = re.compile(r"model\.layers\.\d+\.(?:block_sparse_moe|mlp)\.gate\.weight")


def dequantized(
    stored: Mapping[str, View], config: Mapping[str, Any], folder: Path
) -> tuple[Mapping[str, View], Mapping[str, Any]]:
    """Return the tensors, quantized weights as views of floats, and the configuration without the quantization.

    Both are returned unchanged if the checkpoint is not quantized.

    Args:
        stored: the tensors by their names on disk.
        config: the content of config.json.
        folder: the folder of the checkpoint.

    Raises:
        ConfigError: the method or one of its settings is not supported.
        CheckpointError: a tensor is missing, or has the wrong dtype or shape.
    """
    found = _settings(stored, config, folder)
    if found is None:
        return stored, config
    settings, file = found
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        problem = f"quantization with quant_method {method!r:.100} is not supported; supported: {', '.join(METHODS)}"
        raise ConfigError(file, problem)
    views = METHODS[method](stored, settings, file)
    quantized = [name for name, view in views.items() if view is not stored.get(name)]
    if not quantized:
        raise ConfigError(file, f"describes weights quantized by {method}, but there are none; remove these settings")
    if routers := sorted(name for name in quantized if _ROUTER.fullmatch(name)):
        log.warning("%s: the router is quantized (%s), which makes answers much worse", folder.name, routers[0])
    return views, {name: value for name, value in config.items() if name not in KEYS}


def _settings(
    stored: Mapping[str, View], config: Mapping[str, Any], folder: Path
) -> tuple[Mapping[str, Any], Path] | None:
    """Return the settings of the quantization, and the file that holds them; None if there is no quantization."""
    for key in KEYS:
        if settings := config.get(key):
            if not isinstance(settings, Mapping):
                raise ConfigError(folder / "config.json", f"{key} is {settings!r:.100}, expected an object")
            return settings, folder / "config.json"
    if any(name.endswith(".qweight") for name in stored):
        for name, method in _FILES.items():
            if (folder / name).is_file():
                return {"quant_method": method} | read_json(folder / name), folder / name
    return None
