"""The unquantized model, of which one layer at a time is in memory.

Legend: T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moesaic import checkpoints, formats, models
from moesaic.calibration._states import Chunk, attended, chunks, fed_forward
from moesaic.checkpoints import Checkpoint
from moesaic.models import Decoder
from moesaic.models._layers import Block


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


@dataclass(frozen=True)
class Expected:
    """What the unquantized model computes in a layer, by the name of the first weight of each stage.

    Attributes:
        inputs: inputs [T, columns] of the stage, for each chunk of the calibration tokens.
        hidden: hidden states [T, d] before the attention or the feed-forward network of the stage, for each chunk.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)


class PlainPass:
    """A forward pass of the unquantized model over the calibration tokens, layer by layer."""

    def __init__(self, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> None:
        self._checkpoint, self._model = checkpoint, plain_model(checkpoint)
        with loaded(self._model.embed, checkpoint):
            self._states = chunks(self._model, sequences)

    def layer(self, index: int) -> Expected:
        """Compute the next layer, which has this index."""
        block = self._model.blocks[index]
        assert isinstance(block, Block)
        expected = Expected()
        with loaded(block, self._checkpoint):
            self._part(block.attention.stages(), lambda state: attended(block, state), expected)
            self._part(block.mlp.stages(), lambda state: fed_forward(block, state), expected)  # type: ignore[operator]
        return expected

    def _part(self, stages: Sequence[Sequence[nn.Module]], run: Callable[[Chunk], Tensor], expected: Expected) -> None:
        """Add the outputs of an attention or a feed-forward network to the hidden states."""

        def record(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            expected.inputs.setdefault(str(layer.name), []).append(arguments[0])

        before = [state.hidden for state in self._states]
        expected.hidden.update({str(stage[0].name): before for stage in stages})
        handles = [stage[0].register_forward_pre_hook(record) for stage in stages]
        for state in self._states:
            state.hidden = state.hidden + run(state)
        for handle in handles:
            handle.remove()

    def head(self) -> list[Tensor]:
        """Return the inputs [T, d] of the head for each chunk, after the last layer."""
        with loaded(self._model.norm, self._checkpoint):
            return [self._model.norm(state.hidden) for state in self._states]
