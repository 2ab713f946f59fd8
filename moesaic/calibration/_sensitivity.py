"""Measures how much the divergence of a model's predictions grows when one of its weights is rounded.

A small change of the logits changes the predictions by half of its square in the Fisher metric (Amari, 1998,
doi:10.1162/089976698300017746): KL = E[(g . dy)^2] / 2. Here dy is the change of a linear layer's output, and g is the
gradient of -log p of a token that is drawn from the model itself. So one pass forward and one backward measure all
weights, with the true rounding error of each. Changes at different tokens count as independent, so
attention's values are measured up to half too low. A change of the experts that a router chooses has no gradient and is
not counted.

The passes take one plain layer at a time. Memory holds the hidden states before each layer, and each layer is read
twice. The gradient is written after each layer, so that a run that was stopped continues there.

Legend: T tokens, d hidden size.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic import checkpoints, formats, ops
from moesaic.calibration import _hessians
from moesaic.calibration._choice import MEASURED, Sensitivity
from moesaic.calibration._plain import loaded, plain_model
from moesaic.calibration._states import Chunk, chunks
from moesaic.checkpoints import Checkpoint, _write
from moesaic.models import Experts
from moesaic.models._layers import Block, Linear

TOKENS = 4096
"""Calibration tokens that are measured, at most; whole sequences, but at least one."""
LOGIT_ROWS = 256
"""Rows whose logits exist at once."""
SEED = 0


@dataclass
class Use:
    """One use of a weight: its inputs [n, columns] and outputs [n, rows].

    Attributes:
        expert: place of the weight in its stack; 0 without a stack.
        factors: what an input counts in the Hessian [n], such as the routing probabilities of an expert; None: 1.
    """

    inputs: Tensor
    outputs: Tensor
    expert: int = 0
    factors: Tensor | None = None

    def weighted(self) -> Tensor:
        """Return the inputs times their factors."""
        return self.inputs if self.factors is None else self.inputs * self.factors[:, None]

    def weight(self) -> float:
        """Return the sum of the squared factors."""
        return float(len(self.inputs) if self.factors is None else self.factors.double().square().sum())


class Measurement:
    """A measurement of all weights of a model that are quantized.

    Attributes:
        found: the weights that are measured, by the names of their tensors; the first expert's stands for a stack.
    """

    def __init__(self, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], file: Path) -> None:
        """``file`` has the results so far and the gradient before the layer measured last, if a run was stopped."""
        self._checkpoint, self._file = checkpoint, file
        self.found: dict[str, Sensitivity] = {}
        self._model = plain_model(checkpoint)
        self._slots = {slot.name: slot for slot in self._model.slots()}
        self._sequences = _first(sequences, TOKENS)
        self._tokens = sum(map(len, self._sequences))

    def run(self, progress: Callable[[int, int], object] | None) -> None:
        """Measure the weights that no earlier run has measured.

        Args:
            progress: called with the layers that are measured, and their number.
        """
        before = self._forward()
        blocks = list(self._model.blocks)
        done, gradients = self._read() if self._file.exists() else (0, self._head(before[-1]))
        for index in reversed(range(len(blocks) - done)):
            block = blocks[index]
            assert isinstance(block, Block)
            with loaded(block, self._checkpoint):
                gradients = self._block(block, before[index], gradients)
            self._write(len(blocks) - index, gradients)
            if progress is not None:
                progress(len(blocks) - index, len(blocks))
        self._file.unlink()

    def _read(self) -> tuple[int, list[Tensor]]:
        """Return the layers that an earlier run has measured, and the gradients before the last of them."""
        with safe_open(self._file, "pt") as file:
            content = json.loads(file.metadata()["moesaic"])
            gradients = [file.get_tensor(str(index)) for index in range(content["chunks"])]
        self.found = {name: Sensitivity(tuple(shape), growth) for name, (shape, growth) in content["found"].items()}
        return content["done"], gradients

    def _write(self, done: int, gradients: list[Tensor]) -> None:
        new = self._file.with_name(f"{self._file.name}.new")
        found = {name: (list(weight.shape), weight.growth) for name, weight in self.found.items()}
        content = json.dumps({"done": done, "chunks": len(gradients), "found": found})
        save_file({str(index): part for index, part in enumerate(gradients)}, new, {"moesaic": content})
        _write.sync(new)
        new.replace(self._file)

    @torch.no_grad()
    def _forward(self) -> list[list[Chunk]]:
        """Return the hidden states before each layer, and after the last one."""
        with loaded(self._model.embed, self._checkpoint):
            states = [chunks(self._model, self._sequences)]
        for block in self._model.blocks:
            with loaded(block, self._checkpoint):
                after = [block(state.hidden, state.cos, state.sin, state.batch) for state in states[-1]]
            states.append([replace(s, hidden=hidden) for s, hidden in zip(states[-1], after, strict=True)])
        return states

    def _head(self, states: Sequence[Chunk]) -> list[Tensor]:
        """Measure the head unless it is the embedding; return the gradients [T, d] of each chunk's hidden states."""
        generator = torch.Generator().manual_seed(SEED)
        model, head, name = self._model, self._model.head, f"{self._model.head.name}.weight"
        with loaded(model.norm, self._checkpoint), loaded(model.embed, self._checkpoint), ExitStack() as stack:
            change: Tensor | None = None
            if name in self._slots:
                stack.enter_context(loaded(head, self._checkpoint))
                with torch.no_grad():
                    change = self._change(name, _hessians.hessian(model.norm(state.hidden) for state in states))
            gradients, growth = [], 0.0
            for state in states:
                hidden = state.hidden.detach().requires_grad_()
                for rows in hidden.split(LOGIT_ROWS):
                    normed = model.norm(rows)
                    logits = model.logits(normed)
                    probabilities = logits.detach().softmax(1)
                    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                    F.cross_entropy(logits, drawn, reduction="sum").backward()
                    if change is not None:
                        gradient = probabilities - F.one_hot(drawn, probabilities.shape[1])
                        growth += _growth(normed.detach(), change, gradient)
                gradients.append(_gradient(hidden))
        if change is not None:
            self.found[name] = Sensitivity(tuple(change.shape), growth / self._tokens)
        return gradients

    def _block(self, block: Block, states: Sequence[Chunk], after: Sequence[Tensor]) -> list[Tensor]:
        """Measure the weights of a layer, and return the gradients before it, given those after it."""
        uses: dict[str, list[Use]] = {}
        gradients = []
        with _recorded(block, uses):
            for state, gradient in zip(states, after, strict=True):
                hidden = state.hidden.detach().requires_grad_()
                block(hidden, state.cos, state.sin, state.batch).backward(gradient)
                gradients.append(_gradient(hidden))
        for name, parts in uses.items():
            self._measure(name, parts)
        return gradients

    def _measure(self, name: str, uses: Sequence[Use]) -> None:
        """Measure a weight or a stack, which has the name of its first expert's tensor, from all of its uses."""

        @functools.cache
        def shared() -> Tensor:
            return _hessians.hessian(use.weighted() for use in uses)

        total, count = sum(use.weight() for use in uses), sum(len(use.inputs) for use in uses)
        growth = 0.0
        for expert in sorted({use.expert for use in uses}):
            own = [use for use in uses if use.expert == expert]
            hessian = _hessians.hessian(use.weighted() for use in own)
            weight = sum(use.weight() for use in own)
            floored = _hessians.with_floor(hessian, weight, shared, total, total / count)
            change = self._change(name.replace(".experts.0.", f".experts.{expert}."), floored)
            growth += sum(_growth(use.inputs, change, _gradient(use.outputs)) for use in own)
        stack = self._slots[name].weight
        assert stack is not None
        self.found[name] = Sensitivity(tuple(stack.shape), growth / self._tokens)

    def _change(self, name: str, hessian: Tensor) -> Tensor:
        """Return the change of a weight [rows, columns] that is rounded, given the Hessian of its inputs."""
        plain = checkpoints.read_plain(self._slots[name], self._checkpoint).float()
        rounded = formats.load(MEASURED).empty(tuple(plain.shape))
        ops.quantize_with_feedback(rounded, plain, ops.feedback_factor(hessian))
        return rounded.dequantize() - plain


def _first(sequences: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """Return as many of the first sequences as have at most this number of tokens, but at least one."""
    found: list[Sequence[int]] = []
    for ids in sequences:
        if found and sum(map(len, found)) + len(ids) > tokens:
            break
        found.append(ids)
    return found


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _growth(inputs: Tensor, change: Tensor, gradients: Tensor) -> float:
    """Return the divergence that a change of a weight adds, summed over the tokens."""
    return float((F.linear(inputs, change) * gradients).sum(1).square().sum()) / 2


@contextmanager
def _recorded(block: Block, uses: dict[str, list[Use]]) -> Iterator[None]:
    """Record each use of a weight of a layer, by the weight's name, until the block ends."""

    def linear(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        assert isinstance(layer, Linear)
        outputs.retain_grad()
        uses.setdefault(f"{layer.name}.weight", []).append(Use(inputs[0].detach(), outputs))

    def experts(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        assert isinstance(layer, Experts)
        x, ids, scores = inputs
        return _experts(layer, x, ids, scores, uses)

    handles = [m.register_forward_hook(linear) for m in block.modules() if isinstance(m, Linear)]
    handles += [m.register_forward_hook(experts) for m in block.modules() if isinstance(m, Experts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _experts(layer: Experts, x: Tensor, ids: Tensor, scores: Tensor, uses: dict[str, list[Use]]) -> Tensor:
    """Return the outputs [T, d] of the experts, and record the uses of their weights."""
    total = torch.zeros_like(x)
    for expert in range(layer.experts):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate, up, down = (stack.dequantize(torch.float32, expert) for stack in (layer.gate, layer.up, layer.down))
        rows, p = x[tokens], scores[tokens, places]
        first = {"w1": F.linear(rows, gate), "w3": F.linear(rows, up)}
        inner = F.silu(first["w1"]) * first["w3"]
        last = F.linear(inner, down)
        for part, inputs, outputs in (*((part, rows, y) for part, y in first.items()), ("w2", inner, last)):
            outputs.retain_grad()
            use = Use(inputs.detach(), outputs, expert, p.detach())
            uses.setdefault(f"{layer.name}.0.{part}.weight", []).append(use)
        total = total.index_add(0, tokens, last * p[:, None])
    return total
