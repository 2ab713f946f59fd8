"""Adds adapters to the weights of a checkpoint, while they are read.

Legend: r rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.adapters import by_weight, peft
from moesaic.checkpoints import Checkpoint
from moesaic.checkpoints._views import CodedView, Index, TensorInfo, View, bounds
from moesaic.errors import CheckpointError, InvalidParameter


@dataclass(frozen=True)
class Merged:
    """View of a weight W with an adapter added: W + scale B A, in W's dtype; of quantized weights in float32."""

    base: View
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    @property
    def info(self) -> TensorInfo:
        info = self.base.info
        return replace(info, dtype=torch.float32) if isinstance(self.base, CodedView) else info

    def read(self, index: Index | None = None) -> Tensor:
        rows, columns = bounds(index, self.info.shape)
        change = self.scale * (self.b[rows] @ self.a[:, columns])
        return (self.base.read((rows, columns)).float() + change).to(self.info.dtype)


def merged(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return ``checkpoint`` with the adapter in ``folder`` added to its weights; they share the open files.

    Raises:
        NotFound: the folder or a file of it is missing.
        CheckpointError: a file is damaged, or the adapter has a part that is not supported.
        InvalidParameter: the adapter does not fit the model.
    """
    config = checkpoint.config
    experts, size = int(config.get("num_local_experts") or 0), int(config.get("hidden_size") or 0)
    adapter = peft.read(folder, experts, size)
    views = {name: checkpoint.view(name) for name in checkpoint.tensors}
    for weight, (a, b) in by_weight(adapter.tensors).items():
        name = f"{weight}.weight"
        if name not in views:
            raise InvalidParameter("adapter", f"{folder} does not fit the model, which has no {name}")
        expected = (b.shape[0], a.shape[1])
        if tuple(views[name].info.shape) != expected:
            found = tuple(views[name].info.shape)
            raise InvalidParameter("adapter", f"{folder} does not fit the model: {name} is {found}, not {expected}")
        views[name] = Merged(views[name], a, b, adapter.config.scale)
    if not all(torch.isfinite(tensor).all() for tensor in adapter.tensors.values()):
        raise CheckpointError(folder / peft.WEIGHTS, "it has NaN or infinity")
    return Checkpoint(
        checkpoint.layout,
        checkpoint.path,
        config,
        checkpoint.generation,
        views,
        checkpoint.close,
        checkpoint.preferred_dtype,
    )
