"""Groups the weights of a model by role, type on disk and format in memory, and measures the error that loading added.

A plan has the groups before a model is loaded, and the loaded model has them with their errors. To measure an error,
this module reads no more than a few rows of each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moesaic import models, ops
from moesaic.checkpoints import Checkpoint
from moesaic.formats import Slot

SAMPLE_ROWS = 64
"""Rows of one tensor of a group from which the error is measured."""


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one role with the same type on disk and the same format in memory.

    Attributes:
        role: embedding, attention, mlp, experts or head.
        stored: type on disk, as the file names it, such as Q4_1 or bfloat16.
        format: name of the format in memory, with its parameters.
        kernel: the backend that multiplies these weights.
        weights: number of weights.
        nbytes: bytes in memory.
        error: relative error |w' - w| / |w| that loading added, measured on the first tensor; 0 if the weights in
            memory are exactly those of the file; None before the model is loaded.
    """

    role: str
    stored: str
    format: str
    kernel: str
    weights: int
    nbytes: int
    error: float | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f", error {self.error:.2%}" if self.error else ", exact"
        size = f"{self.weights / 1e6:,.1f}M weights, {self.nbytes / 1e6:,.1f} MB"
        return f"{self.role:<10}{self.stored} -> {self.format}, {self.kernel} kernel{error}, {size}"


def weight_groups(slots: Iterable[Slot], stored: Mapping[str, str], device: str) -> tuple[WeightGroup, ...]:
    """Return the groups of a model's weights, the largest first. Router and norms, which stay float32, are left out.

    Args:
        slots: the slots of the model.
        stored: type of each tensor on disk; that of a tensor that is not in it is the format in memory.
        device: type of the device that holds the weights.
    """
    found = [_group(*key, members, device) for key, members in _members(slots, stored).items()]
    return tuple(sorted(found, key=lambda group: -group.weights))


def measure_errors(
    groups: Sequence[WeightGroup], slots: Iterable[Slot], stored: Mapping[str, str], checkpoint: Checkpoint
) -> tuple[WeightGroup, ...]:
    """Return ``groups``, a result of ``weight_groups`` for these slots, with the error of each.

    ``checkpoint`` is the open checkpoint that the model was loaded from.
    """
    members = _members(slots, stored)
    firsts = [members[group.role, group.stored, group.format][0] for group in groups]
    return tuple(replace(group, error=_error(slot, checkpoint)) for group, slot in zip(groups, firsts, strict=True))


def _members(slots: Iterable[Slot], stored: Mapping[str, str]) -> dict[tuple[str, str, str], list[Slot]]:
    """Return the slots of each group, by role, type on disk and format in memory."""
    found: dict[tuple[str, str, str], list[Slot]] = {}
    for slot in slots:
        role = models.role(slot.name)
        if slot.format is not None and role is not None:
            name = str(slot.format)
            found.setdefault((role, stored.get(slot.name, name), name), []).append(slot)
    return found


def _group(role: str, stored: str, name: str, slots: Sequence[Slot], device: str) -> WeightGroup:
    kernel = ops.chosen("experts" if role == "experts" else "linear", device, name)
    counts = [math.prod(slot.shape) for slot in slots]
    nbytes = sum(slot.format.nbytes(slot.shape) for slot in slots if slot.format is not None)
    return WeightGroup(role, stored, name, kernel, sum(counts), nbytes)


def _error(slot: Slot, checkpoint: Checkpoint) -> float:
    """Return the relative error of the first rows of the weight in a slot; 0 if it keeps the codes of the file."""
    assert slot.format is not None
    if checkpoint.keeps(slot.name, slot.format):
        return 0.0
    weight = checkpoint.read(slot.name, (slice(0, SAMPLE_ROWS),)).float()
    difference = slot.format.pack(weight).dequantize(torch.float32) - weight
    return float(difference.norm() / weight.norm()) if difference.any() else 0.0
