"""The unquantized model, of which one layer at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moesaic import checkpoints, formats, models
from moesaic.checkpoints import Checkpoint
from moesaic.models import Decoder


def plain_model(checkpoint: Checkpoint) -> Decoder:
    """Return the model of a checkpoint with float32 weights on the meta device."""
    plain = formats.load("float32")
    return models.build(dict(checkpoint.config), checkpoint.path, plain, dtype=torch.float32, device="meta")


@contextmanager
def loaded(module: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Give the weights of a module on the meta device memory and their plain values, until the block ends."""
    module.to_empty(device="cpu")
    try:
        for slot in module.slots():  # type: ignore[operator]
            slot.store(checkpoints.read_plain(slot, checkpoint))
        yield
    finally:
        module.to_empty(device="meta")
