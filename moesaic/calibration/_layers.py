"""Quantizes the weights of a model stage by stage, each on the inputs that the weights before it give.

The model that is written also computes the inputs: the linear layers of a stage have the same input, and when it is
known, their weights are read, quantized and stored. The next stage then sees what the quantized weights compute. At any
time, one plain weight is in memory, and the hidden states of the calibration tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic import checkpoints, ops
from moesaic.calibration import _hessians
from moesaic.checkpoints import Checkpoint
from moesaic.formats import Packed, Slot
from moesaic.models import Decoder, Experts
from moesaic.models._layers import Block, Linear
from moesaic.ops import Batch

CHUNK_TOKENS = 2048
"""Tokens that a layer computes at once, but at least one sequence."""


class _InputReached(Exception):
    """Ends a forward pass when the input of a module is known."""


@dataclass
class Chunk:
    """Some sequences of the calibration tokens, and their hidden states [T, d] before the next layer."""

    batch: Batch
    cos: Tensor
    sin: Tensor
    hidden: Tensor


def chunks(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[Chunk]:
    """Return the sequences in chunks, with the embeddings of their tokens as float32 hidden states."""
    groups: list[list[Sequence[int]]] = []
    for ids in sequences:
        if not groups or sum(map(len, groups[-1])) + len(ids) > CHUNK_TOKENS:
            groups.append([])
        groups[-1].append(ids)
    batches = [Batch.whole(group) for group in groups]
    return [Chunk(batch, *model.rotary_tables(batch.positions), model.embed(batch.tokens).float()) for batch in batches]


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

    def quantize_block(self, block: Block, states: Sequence[Chunk]) -> None:
        """Quantize the weights of a layer, and replace the hidden states by those after the layer."""
        self.usage = []
        self._stages(block.attention.stages(), lambda state: attended(block, state), states)
        for state in states:
            state.hidden = state.hidden + attended(block, state)
        self._stages(block.mlp.stages(), lambda state: fed_forward(block, state), states)  # type: ignore[operator]
        for state in states:
            state.hidden = state.hidden + fed_forward(block, state)

    def quantize_head(self, model: Decoder, states: Sequence[Chunk]) -> None:
        """Quantize the weights of the head, given the hidden states after the last layer."""
        self._stages(((model.head,),), lambda state: model.logits(model.norm(state.hidden)), states)

    def _stages(
        self,
        stages: Sequence[Sequence[Linear | Experts]],
        run: Callable[[Chunk], object],
        states: Sequence[Chunk],
    ) -> None:
        for stage in stages:
            first = stage[0]
            if isinstance(first, Experts):
                self._experts(first, [_inputs(first, run, state) for state in states])
            else:
                inputs = (_inputs(first, run, state)[0] for state in states)
                self._linears([layer for layer in stage if isinstance(layer, Linear)], inputs)

    def _linears(self, stage: Sequence[Linear], inputs: Iterable[Tensor]) -> None:
        """Quantize the weights of linear layers with the same ``inputs``, which are read only if they are needed."""
        pending = {f"{layer.name}.weight": _weight(layer) for layer in stage if self._is_pending(layer)}
        if pending:
            factor = ops.feedback_factor(_hessians.hessian(inputs))
            for name, weight in pending.items():
                self._store(weight, name, factor)

    def _is_pending(self, layer: Linear) -> bool:
        """Return whether a layer takes error feedback, and has a weight of its own: a tied head has the embedding's."""
        return ops.is_fed_back(_weight(layer).format) and f"{layer.name}.weight" in self._slots

    def _store(self, weight: Packed, name: str, factor: Tensor, index: int | None = None) -> None:
        plain = checkpoints.read_plain(self._slots[name], self._checkpoint)
        ops.quantize_with_feedback(weight, plain, factor, index)
        self._on_weight()

    def _experts(self, experts: Experts, inputs: Sequence[tuple[Tensor, ...]]) -> None:
        """Quantize the stacks of the experts, given the inputs (x [T, d], ids [T, k], scores [T, k]) of all chunks."""
        x, ids, scores = (torch.cat(parts) for parts in zip(*inputs, strict=True))
        tokens = Routed(x, ids, scores)
        counts = Counter(ids.flatten().tolist())
        self.usage = [counts[e] for e in range(experts.experts)]
        self._stack(experts, {"w1": experts.gate, "w3": experts.up}, tokens.inputs, tokens)
        self._stack(experts, {"w2": experts.down}, lambda e: _inner(experts, e, tokens.inputs(e)), tokens)

    def _stack(
        self,
        experts: Experts,
        stacks: Mapping[str, Packed],
        inputs: Callable[[int], Tensor],
        tokens: Routed,
    ) -> None:
        """Quantize ``stacks``, by the name of their tensors, on the same inputs [tokens, columns] of each expert."""
        pending = {part: weight for part, weight in stacks.items() if ops.is_fed_back(weight.format)}
        if not pending:
            return
        shared = _hessians.hessian(tokens.weighted(e, inputs(e)) for e in range(experts.experts))
        for e in range(experts.experts):
            own = _hessians.hessian([tokens.weighted(e, inputs(e))])
            floored = _hessians.with_floor(own, tokens.weight(e), shared, tokens.total, tokens.mean)
            factor = ops.feedback_factor(floored)
            for part, weight in pending.items():
                self._store(weight, f"{experts.name}.{e}.{part}.weight", factor, e)


class Routed:
    """The inputs of a mixture of experts: x [T, d], the experts ids [T, k] and their probabilities scores [T, k]."""

    def __init__(self, x: Tensor, ids: Tensor, scores: Tensor) -> None:
        self._x, self._ids, self._scores = x, ids, scores
        self.total = float(scores.double().square().sum())
        """Sum of p^2 over the tokens of all experts."""
        self.mean = self.total / max(1, scores.numel())
        """Mean of p^2 over the tokens of all experts."""

    def inputs(self, expert: int) -> Tensor:
        """Return the inputs [tokens, d] of an expert."""
        return self._x[(self._ids == expert).any(1)]

    def weighted(self, expert: int, inputs: Tensor) -> Tensor:
        """Return ``inputs`` [tokens, columns] of an expert times the probability p of each token."""
        return inputs.float() * self._probabilities(expert)[:, None]

    def weight(self, expert: int) -> float:
        """Return the sum of p^2 over the tokens of an expert."""
        return float(self._probabilities(expert).double().square().sum())

    def _probabilities(self, expert: int) -> Tensor:
        return self._scores[self._ids == expert]  # in the order of tokens: an expert appears once in a row


def _weight(layer: Linear) -> Packed:
    assert isinstance(layer.weight, Packed)
    return layer.weight


def _inner(experts: Experts, expert: int, x: Tensor) -> Tensor:
    """Return the inputs [tokens, f] of an expert's down projection, given those of the expert."""
    gate, up = (stack.dequantize(torch.float32, expert) for stack in (experts.gate, experts.up))
    return F.silu(F.linear(x.float(), gate)) * F.linear(x.float(), up)


def _inputs(module: nn.Module, run: Callable[[Chunk], object], state: Chunk) -> tuple[Tensor, ...]:
    """Return the arguments with which ``run`` calls ``module``; what follows this call is not computed."""
    found: list[tuple[Tensor, ...]] = []

    def stop(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments)
        raise _InputReached

    handle = module.register_forward_pre_hook(stop)
    try:
        run(state)
    except _InputReached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("the module was not called")


def attended(block: Block, state: Chunk) -> Tensor:
    """Return what the attention of a layer adds to the hidden states."""
    return block.attention(block.attention_norm(state.hidden), state.cos, state.sin, state.batch)  # type: ignore[no-any-return]


def fed_forward(block: Block, state: Chunk) -> Tensor:
    """Return what the feed-forward network of a layer adds to the hidden states."""
    return block.mlp(block.mlp_norm(state.hidden))  # type: ignore[no-any-return]


def advance(block: Block, states: Sequence[Chunk]) -> None:
    """Replace the hidden states by those after a layer whose weights are all quantized."""
    for state in states:
        state.hidden = state.hidden + attended(block, state)
        state.hidden = state.hidden + fed_forward(block, state)
