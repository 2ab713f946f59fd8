"""Quantizes the weights of a model stage by stage, each on the inputs that the weights before it give.

The model that is written also computes the inputs: the linear layers of a stage have the same input, and when it is
known, their weights are read, corrected for the drift of their inputs, quantized and stored. The next stage then sees
what the quantized weights compute. At any time, one plain layer is in memory, or its inputs and one plain weight.

Legend: T tokens, d hidden size, f intermediate size, k experts per token.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic import checkpoints, ops
from moesaic.calibration import _hessians
from moesaic.calibration._drift import Correction, Inputs, Moments
from moesaic.calibration._plain import Expected
from moesaic.calibration._states import Chunk, attended, fed_forward, inputs
from moesaic.checkpoints import Checkpoint
from moesaic.formats import Packed, Slot
from moesaic.models import Decoder, Experts
from moesaic.models._layers import Block, Linear


class LayerQuantizer:
    """Fills the calibrated weights of a model from a checkpoint.

    Attributes:
        usage: number of tokens of each expert, in the layer that was quantized last; empty for a dense layer.
    """

    def __init__(self, model: Decoder, checkpoint: Checkpoint, on_weight: Callable[[], object]) -> None:
        """``model`` has memory for its weights; ``on_weight`` is called after each weight that is quantized."""
        self._checkpoint = checkpoint
        self._slots: Mapping[str, Slot] = {slot.name: slot for slot in model.slots()}
        self._on_weight = on_weight
        self.usage: list[int] = []

    def quantize_block(self, block: Block, states: Sequence[Chunk], expected: Expected) -> None:
        """Quantize the weights of a layer, and replace the hidden states by those after the layer."""
        self.usage = []
        self._stages(block.attention.stages(), lambda state: attended(block, state), states, expected)
        for state in states:
            state.hidden = state.hidden + attended(block, state)
        self._stages(block.mlp.stages(), lambda state: fed_forward(block, state), states, expected)  # type: ignore[operator]
        for state in states:
            state.hidden = state.hidden + fed_forward(block, state)

    def quantize_head(self, model: Decoder, states: Sequence[Chunk], expected: Sequence[Tensor]) -> None:
        """Quantize the weights of the head, given the hidden states after the last layer.

        Args:
            model: the model, whose layers are quantized.
            states: its hidden states after the last layer.
            expected: the normalized ones of the unquantized model [T, d], for each chunk.
        """
        found = (model.norm(state.hidden) for state in states)
        self._linears([model.head], (Inputs(*pair) for pair in zip(found, expected, strict=True)))

    def _stages(
        self,
        stages: Sequence[Sequence[Linear | Experts]],
        run: Callable[[Chunk], object],
        states: Sequence[Chunk],
        expected: Expected,
    ) -> None:
        """Quantize an attention or a feed-forward network; the outputs of its last stage go to the hidden states."""
        for stage in stages:
            first, last = stage[0], stage is stages[-1]
            chunks = zip(states, expected.inputs[first.name], expected.hidden[first.name], strict=True)
            if isinstance(first, Experts):
                self._experts(first, [(inputs(first, run, s), x, h - s.hidden) for s, x, h in chunks])
            else:
                parts = (Inputs(inputs(first, run, s)[0], x, h - s.hidden if last else None) for s, x, h in chunks)
                self._linears([layer for layer in stage if isinstance(layer, Linear)], parts)

    def _linears(self, stage: Sequence[Linear], parts: Iterable[Inputs]) -> None:
        """Quantize the weights of linear layers with the same inputs, which are computed only if they are needed."""
        pending = {f"{layer.name}.weight": _weight(layer) for layer in stage if self._is_pending(layer)}
        if pending:
            moments = Moments.of(parts)
            correction, factor = Correction(moments, moments.hessian), ops.feedback_factor(moments.hessian)
            for name, weight in pending.items():
                self._store(weight, name, correction, factor)

    def _is_pending(self, layer: Linear) -> bool:
        """Return whether a layer takes error feedback, and has a weight of its own: a tied head has the embedding's."""
        return ops.is_fed_back(_weight(layer).format) and f"{layer.name}.weight" in self._slots

    def _store(
        self, weight: Packed, name: str, correction: Correction, factor: Tensor, index: int | None = None
    ) -> None:
        ops.quantize_with_feedback(weight, correction.apply(self._plain(name)), factor, index)
        self._on_weight()

    def _plain(self, name: str) -> Tensor:
        """Return the unquantized weight of a name."""
        return checkpoints.read_plain(self._slots[name], self._checkpoint)

    def _experts(self, experts: Experts, chunks: Sequence[tuple[tuple[Tensor, ...], Tensor, Tensor]]) -> None:
        """Quantize the stacks of the experts.

        Args:
            experts: the experts of a layer.
            chunks: for each chunk, the inputs (x [T, d], ids [T, k], scores [T, k]) of the experts, those of the
                unquantized experts [T, d], and what the hidden states lack [T, d].
        """
        found, expected, missing = zip(*chunks, strict=True)
        x, ids, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        tokens = Routed(ids, scores)
        counts = Counter(ids.flatten().tolist())
        self.usage = [counts[e] for e in range(experts.experts)]
        plain, lack = torch.cat(expected), torch.cat(missing)

        def outer(e: int) -> Inputs:
            return Inputs(tokens.of(e, x), tokens.of(e, plain))

        def inner(e: int) -> Inputs:
            first = outer(e)
            stacks = (stack.dequantize(torch.float32, e) for stack in (experts.gate, experts.up))
            floats = (self._plain(f"{experts.name}.{e}.{part}.weight").float() for part in ("w1", "w3"))
            return Inputs(_swiglu(first.found, *stacks), _swiglu(first.expected, *floats), tokens.of(e, lack))

        self._stack(experts, {"w1": experts.gate, "w3": experts.up}, outer, tokens)
        self._stack(experts, {"w2": experts.down}, inner, tokens)

    def _stack(
        self,
        experts: Experts,
        stacks: Mapping[str, Packed],
        parts: Callable[[int], Inputs],
        tokens: Routed,
    ) -> None:
        """Quantize ``stacks``, by the name of their tensors, on the same inputs of each expert."""
        pending = {part: weight for part, weight in stacks.items() if ops.is_fed_back(weight.format)}
        if not pending:
            return

        @functools.cache
        def shared() -> Tensor:
            return _hessians.hessian(tokens.weighted(e, parts(e).found) for e in range(experts.experts))

        for e in range(experts.experts):
            moments = Moments.of([parts(e).weighted(tokens.probabilities(e))])
            floored = _hessians.with_floor(moments.hessian, tokens.weight(e), shared, tokens.total, tokens.mean)
            correction, factor = Correction(moments, floored), ops.feedback_factor(floored)
            for part, weight in pending.items():
                self._store(weight, f"{experts.name}.{e}.{part}.weight", correction, factor, e)


class Routed:
    """The tokens of a mixture of experts: the experts ids [T, k] of each, and their probabilities scores [T, k]."""

    def __init__(self, ids: Tensor, scores: Tensor) -> None:
        self._ids, self._scores = ids, scores
        self.total = float(scores.double().square().sum())
        """Sum of p^2 over the tokens of all experts."""
        self.mean = self.total / max(1, scores.numel())
        """Mean of p^2 over the tokens of all experts."""

    def of(self, expert: int, x: Tensor) -> Tensor:
        """Return the rows of ``x`` [T, columns] that belong to the tokens of an expert, as float32."""
        return x[(self._ids == expert).any(1)].float()

    def weighted(self, expert: int, x: Tensor) -> Tensor:
        """Return inputs [tokens, columns] of an expert times the probability p of each token."""
        return x * self.probabilities(expert)[:, None]

    def weight(self, expert: int) -> float:
        """Return the sum of p^2 over the tokens of an expert."""
        return float(self.probabilities(expert).double().square().sum())

    def probabilities(self, expert: int) -> Tensor:
        """Return the probability p of each token of an expert."""
        return self._scores[self._ids == expert]  # in the order of tokens: an expert appears once in a row


def _weight(layer: Linear) -> Packed:
    assert isinstance(layer.weight, Packed)
    return layer.weight


def _swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return the inputs [tokens, f] of an expert's down projection, given those of the expert."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)
