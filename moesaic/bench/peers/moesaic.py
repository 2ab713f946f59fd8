"""Moesaic's model alone, step by step: kernels and model without scheduler, sampler and text.

Prompts run in chunks of the size that Moesaic's engine computes at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LABEL = "Moesaic, model step"
MODULES, PACKAGES = ("moesaic", "torch"), ("torch",)
INSTALL = "pip install moesaic"
READS_GGUF = True
FORMATS = ("q8", "q4", "q2", "bfloat16")

BLOCK_SIZE = 16


def environment(python: Path) -> dict[str, str]:
    """Return environment variables with which ``python`` imports this source tree, if it is the current interpreter.

    Another interpreter has its own installation of Moesaic, so the result is empty for it.
    """
    return {"PYTHONPATH": str(Path(__file__).parents[3])} if python == Path(sys.executable) else {}


def make(source: Path, folder: Path, weight_format: str) -> Path:
    """Return the folder that ``Peer`` loads: ``source`` packed in the weight format, inside ``folder``.

    If the format is not quantized, return ``source`` itself.
    """
    from moesaic.bench.peers import _ours

    return _ours.packed_folder(source, folder, weight_format)


class Peer:
    """The model and its key/value cache, in which each sequence has a contiguous range of blocks."""

    def __init__(self, path: Path, weight_format: str, threads: int, context: int, sequences: int) -> None:
        import torch

        from moesaic.bench.peers import _ours
        from moesaic.engine import Limits
        from moesaic.loading import load_model, torch_threads
        from moesaic.ops import Cache
        from moesaic.plan import make_plan

        self._torch, self._chunk = torch, Limits().batch_tokens
        self._model = load_model(make_plan(path)).model
        _ours.set_up(threads, torch_threads(self._model))
        self._blocks = -(-context // BLOCK_SIZE)
        self._cache = Cache.zeros(self._model.cache_shapes, self._blocks * sequences, BLOCK_SIZE, self._model.dtype)
        self._length = self._position = 0
        self._graph: Any = None
        self.about: dict[str, Any] = _ours.about(self._model) | {"prompt_piece": self._chunk}
        self.weights = _ours.weights(self._model)

    def prefill(self, ids: list[int]) -> None:
        self._prompt(ids)

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        return self._prompt(ids).topk(count).indices.tolist()  # type: ignore[no-any-return]

    def fill(self, prompts: list[list[int]]) -> None:
        # Only one prompt is computed. The others are copies, which are fast to make and the same to read.
        self._prompt(prompts[0])
        for layer in self._cache.tensors():
            for sequence in range(1, len(prompts)):
                layer[sequence * self._blocks : (sequence + 1) * self._blocks] = layer[: self._blocks]
        self._length = len(prompts[0])

    def begin(self, batch: int, steps: int) -> None:
        self._position, self._graph = self._length, self._record(batch)

    def step(self, ids: list[int]) -> None:
        chunks = [[token_id] for token_id in ids]
        if self._graph is None:
            self._run(chunks, self._position)
        else:
            batch, graph = self._graph
            new = self._batch_of(chunks, self._position, self._blocks)
            for name in ("tokens", "positions", "slots"):
                getattr(batch, name).copy_(getattr(new, name))
            graph.replay()
        self._position += 1

    def _record(self, batch: int) -> Any:
        """Return a batch and the graph of a step on it, as the engine has them; None if it cannot be recorded."""
        from moesaic import ops
        from moesaic.engine.decode_graphs import compute

        inputs = self._batch_of([[0]] * batch, self._length, self._blocks)
        with self._torch.inference_mode():
            graph = ops.record(self._torch.device("cpu"), lambda: compute(self._model, inputs))
        return None if graph is None else (inputs, graph)

    def end(self) -> None:
        """Do nothing: the next measurement overwrites the tokens after the prompts."""

    def _prompt(self, ids: list[int]) -> Any:
        for start in range(0, len(ids), self._chunk):
            logits = self._run([ids[start : start + self._chunk]], start)
        return logits[0]

    def _run(self, chunks: list[list[int]], start: int) -> Any:
        """Compute one chunk of token ids for each sequence, from position ``start``.

        Return the logits of the last token of each chunk.
        """
        batch = self._batch_of(chunks, start, -(-(start + len(chunks[0])) // BLOCK_SIZE))
        with self._torch.inference_mode():
            return self._model.logits(self._model(batch)[batch.outputs])

    def _batch_of(self, chunks: list[list[int]], start: int, blocks: int) -> Any:
        """Return the batch of one chunk for each sequence, with the tables of its first ``blocks`` blocks."""
        from moesaic.ops import Batch

        torch, count = self._torch, len(chunks[0])
        positions = torch.arange(start, start + count)
        firsts = torch.arange(len(chunks)) * self._blocks
        starts = tuple(range(0, len(chunks) * count + 1, count))
        batch = Batch(
            tokens=torch.tensor(chunks).flatten(),
            positions=positions.repeat(len(chunks)),
            starts=starts,
            lengths=(start + count,) * len(chunks),
            slots=(firsts[:, None] * BLOCK_SIZE + positions).flatten(),
            tables=firsts[:, None] + torch.arange(blocks),
            outputs=torch.tensor(starts[1:]) - 1,
            cache=self._cache,
        )
        _ = batch.offsets  # makes the tensor before the step is recorded
        return batch
