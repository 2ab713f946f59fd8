"""Quantized modules that consist of several tensors, such as ``NAME.qweight`` and ``NAME.scales``.

This Python module groups tensors by quantized module, and checks their dtypes and shapes and the values of settings. It
does not depend on the meaning of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.checkpoints._fields import REQUIRED, Fields
from moesaic.checkpoints._views import Shape, View, dtype_name
from moesaic.config_keys import whole
from moesaic.errors import CheckpointError


@dataclass(frozen=True)
class Module:
    """A quantized module of a checkpoint: its name and its tensors by the last parts of their names."""

    name: str
    tensors: Mapping[str, View]

    def error(self, part: str, problem: str) -> CheckpointError:
        """Return an error about the tensor ``part``, for the caller to raise."""
        file = self.tensors.get(part, next(iter(self.tensors.values()))).info.file
        return CheckpointError(file, f"{self.name}.{part} {problem}")

    def take(self, part: str, dtypes: Collection[torch.dtype], shape: Shape | None = None) -> View:
        """Return the tensor ``part``.

        Args:
            part: the last part of the tensor's name.
            dtypes: the dtypes that it may have.
            shape: the shape that it must have; None: any matrix with at least one entry.

        Raises:
            CheckpointError: the tensor is missing, or has another dtype or shape.
        """
        if part not in self.tensors:
            raise self.error(part, f"is missing: the module has only {', '.join(sorted(self.tensors))}")
        info = self.tensors[part].info
        if info.dtype not in dtypes:
            expected = ", ".join(map(dtype_name, dtypes))
            raise self.error(part, f"has the wrong dtype: expected {expected}, found {info.dtype}")
        if shape is None and (len(info.shape) != 2 or 0 in info.shape):
            raise self.error(part, f"has the wrong shape: expected a matrix, found {list(info.shape)}")
        if shape is not None and info.shape != shape:
            raise self.error(part, f"has the wrong shape: expected {list(shape)}, found {list(info.shape)}")
        return self.tensors[part]


def by_module(stored: Mapping[str, View], parts: Collection[str]) -> dict[str, dict[str, View]]:
    """Return, for each module, its tensors whose names end with one of ``parts``, by that part."""
    modules: dict[str, dict[str, View]] = {}
    for name, view in stored.items():
        module, _, part = name.rpartition(".")
        if part in parts:
            modules.setdefault(module, {})[part] = view
    return modules


def weights(stored: Mapping[str, View], parts: Collection[str], build: Callable[[Module], View]) -> dict[str, View]:
    """Return ``stored`` with one weight, ``NAME.weight``, in place of the tensors of each quantized module NAME.

    Args:
        stored: all tensors of a checkpoint.
        parts: the last parts of the names of the tensors of a quantized module.
        build: returns the weight of a module.

    Raises:
        CheckpointError: a module also has a plain weight, or ``build`` raises it.
    """
    modules = by_module(stored, parts)
    views: dict[str, View] = {}
    for name, view in stored.items():
        module, _, part = name.rpartition(".")
        if part not in parts:
            views[name] = view
        elif (weight := f"{module}.weight") in stored:
            raise CheckpointError(view.info.file, f"holds {name}, but {weight} exists as well; remove one of them")
        elif weight not in views:
            views[weight] = build(Module(module, modules[module]))
    return views


def choose(settings: Fields, name: str, supported: Collection[Any], default: Any = REQUIRED) -> Any:
    """Remove the key ``name`` from the settings and return its value; ``default`` if it is absent.

    Raises:
        ConfigError: the value is not one of ``supported``, or the key is absent and there is no ``default``.
    """
    value = whole(settings.take(name, default))
    if value not in supported:
        choices = ", ".join(map(str, supported))
        raise settings.error(f"quantization with {name} {value!r:.100} is not supported; supported: {choices}")
    return value


def group_size(settings: Fields, name: str = "group_size") -> int:
    """Remove the key ``name`` from the settings and return it: the columns in a group, or -1 for all columns.

    Raises:
        ConfigError: the value is neither -1 nor a whole number of at least 16, or the key is absent.
    """
    size = whole(settings.take(name))
    if type(size) is not int or not (size == -1 or size >= 16):
        problem = f"quantization with {name} {size!r:.100} is not supported; supported: -1, and 16 or more"
        raise settings.error(problem)
    return size
