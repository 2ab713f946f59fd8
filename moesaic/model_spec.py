"""Description of a model that is to be loaded: where it is, its configuration, and the formats of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moesaic import models
from moesaic.formats import WeightFormat
from moesaic.models import Decoder

PACKED = "packed"
"""Layout of folders of packed weights, which are not among the checkpoint layouts."""
FLOAT_TYPES = ("float64", "float32", "bfloat16", "float16")
"""Types of tensors on disk that are not quantized."""


@dataclass(frozen=True)
class ModelSpec:
    """Description from which a model is built: its configuration, dtype and weight formats.

    Attributes:
        path: folder or file of the checkpoint.
        layout: name of the checkpoint layout, or "packed".
        config: the model's configuration with the keys of config.json, whatever the layout.
        generation: content of generation_config.json; empty if there is none.
        dtype: dtype of activations and plain weights.
        formats: format of each role of weights, and of single tensors by name, as ``models.build`` takes them.
        stored: type of each tensor on disk, such as Q4_1 or bfloat16; empty if it is that of ``formats``.
    """

    path: Path
    layout: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    dtype: torch.dtype
    formats: Mapping[str, WeightFormat] = field(repr=False)
    stored: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def dtype_name(self) -> str:
        """Name of ``dtype``, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def quantized(self) -> bool:
        """Whether the weights have been rounded already, by the file or in a packed folder."""
        return any(name not in FLOAT_TYPES for name in self.stored.values()) or self.layout == PACKED

    def in_formats(self, text: str) -> ModelSpec:
        """Return this description with the formats of ``text``, as ``models.choose`` reads it."""
        return replace(self, formats=models.choose(text, self.dtype_name))

    def build(self, device: torch.device | str) -> Decoder:
        """Return the model with uninitialized weights on ``device``.

        Raises:
            ConfigError: the configuration is not understood.
        """
        return models.build(self.config, self.path, self.formats, dtype=self.dtype, device=device)
