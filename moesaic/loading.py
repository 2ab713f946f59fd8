"""Loads a model as a plan says.

This module depends on plans, checkpoints, models and weight formats. It does not depend on text or the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic import checkpoints, config_keys, ops, packed
from moesaic.formats import Packed, _threads
from moesaic.model_spec import PACKED
from moesaic.models import Decoder
from moesaic.ops import native
from moesaic.plan import Plan
from moesaic.weight_report import WeightGroup, measure_errors

SMALL_MODEL = 100_000_000
"""Number of parameters below which starting torch's threads costs more time than they save."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Loaded:
    """A model with its weights.

    Attributes:
        plan: the plan that the model was loaded by.
        model: the model.
        weights: what loading did with the weights; empty for weights that were packed before.
    """

    plan: Plan
    model: Decoder
    weights: tuple[WeightGroup, ...] = ()

    @property
    def path(self) -> Path:
        """Folder or file of the checkpoint."""
        return self.plan.spec.path

    @property
    def layout(self) -> str:
        """Name of the checkpoint layout, or "packed"."""
        return self.plan.spec.layout

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration with the keys of config.json, whatever the layout."""
        return self.plan.spec.config

    @property
    def generation(self) -> Mapping[str, Any]:
        """Content of generation_config.json; empty if there is none."""
        return self.plan.spec.generation

    @property
    def generation_file(self) -> Path:
        """The file that ``generation`` was read from."""
        if self.layout == "gguf":
            return self.path
        return self.path / (packed.MANIFEST if self.layout == PACKED else "generation_config.json")

    @property
    def eos_ids(self) -> frozenset[int]:
        """All end-of-sequence token ids in the configurations; Llama 3 has more than one."""
        values = [self.generation.get("eos_token_id"), self.config.get("eos_token_id")]
        token_ids = [_token_id(item) for value in values for item in (value if isinstance(value, list) else [value])]
        return frozenset(item for item in token_ids if item is not None and 0 <= item < self.model.vocab_size)


def _token_id(value: Any) -> int | None:
    """Return ``value`` as a token id, also if it is written as text or as 2.0; return None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    value = config_keys.whole(value)
    return value if isinstance(value, int) else None


def load_model(plan: Plan, *, progress: Progress | None = None) -> Loaded:
    """Load the model of ``plan`` in its formats, to its device.

    ``progress`` is called with the bytes read so far and in total.

    Raises:
        NotFound: the folder does not exist any more.
        CheckpointError: the checkpoint is damaged, or not the one that was planned.
    """
    spec = plan.spec
    if spec.layout == PACKED:
        model = spec.build("meta")
        packed.map_weights(model, spec.path)
        return Loaded(plan, model if plan.mapped else model.to(plan.device))
    with checkpoints.open_checkpoint(spec.path) as checkpoint:
        model = spec.build(plan.device)
        if plan.device.type == "cpu":
            for parameter in model.parameters():
                native.huge_pages(parameter)  # before it is filled: pages that are written already stay small
        checkpoints.load_weights(model.slots(), checkpoint, progress=progress)
        return Loaded(plan, model, measure_errors(plan.weights, model.slots(), spec.stored, checkpoint))


def torch_threads(model: Decoder) -> int | None:
    """Return the number of threads that torch should use for this model; None: torch's default.

    In a small model, waking threads a hundred times in each step costs more than they save. Beside Moesaic's own
    kernels, torch's threads would compete for the cores. One thread is best in both cases.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        return 1
    device = next(model.parameters()).device.type
    names = {weight.name for weight in model.blocks.modules() if isinstance(weight, Packed)}
    return 1 if all(ops.chosen("linear", device, name) != "reference" for name in names) else None


def limited_torch_threads(model: Decoder) -> AbstractContextManager[None]:
    """Return a context in which torch uses ``torch_threads`` of a model in the calling thread."""
    return _threads.torch_threads(torch_threads(model))
