"""Our model, step by step: what the kernels and the model take, without scheduler, sampler and text.

Prompts run in pieces of as many tokens as the engine computes at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LABEL = "Moesaic, model step"
MODULES, PACKAGES = ("moesaic", "torch"), ("torch",)
INSTALL = "pip install moesaic"
FORMATS = ("q8", "q4", "q2", "bfloat16")

BLOCK = 16


def environment(python: Path) -> dict[str, str]:
    """Let our own interpreter find the very source that runs now; another one has its own."""
    return {"PYTHONPATH": str(Path(__file__).parents[3])} if python == Path(sys.executable) else {}


def make(source: Path, folder: Path, format: str) -> Path:
    """Return the packed folder; plain weights are loaded as they are."""
    from moesaic.bench.peers import _ours

    return _ours.packed_folder(source, folder, format)


class Peer:
    """The model and its cache, in which sequence s owns the s-th run of blocks."""

    def __init__(self, path: Path, format: str, threads: int, context: int, sequences: int) -> None:
        import torch

        from moesaic.bench.peers import _ours
        from moesaic.engine import Limits
        from moesaic.loading import load_model, torch_threads
        from moesaic.ops import Cache

        self._torch, self._chunk = torch, Limits().batch_tokens
        self._model = load_model(path).model
        _ours.use_threads(threads, torch_threads(self._model))
        self._blocks = -(-context // BLOCK)
        self._cache = Cache.zeros(self._model.cache_shapes, self._blocks * sequences, BLOCK, self._model.dtype)
        self._length = self._batch = self._at = 0
        self.about: dict[str, Any] = _ours.about(self._model) | {"prompt_piece": self._chunk}
        self.weights = _ours.weights(self._model)

    def prefill(self, ids: list[int]) -> None:
        self._prompt(ids)

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        return self._prompt(ids).topk(count).indices.tolist()  # type: ignore[no-any-return]

    def fill(self, prompts: list[list[int]]) -> None:
        # One is computed; the others are copies of it, which read the same and come quickly.
        self._prompt(prompts[0])
        for layer in self._cache.tensors():
            for place in range(1, len(prompts)):
                layer[place * self._blocks : (place + 1) * self._blocks] = layer[: self._blocks]
        self._length = len(prompts[0])

    def begin(self, batch: int, steps: int) -> None:
        self._batch, self._at = batch, self._length

    def step(self, ids: list[int]) -> None:
        self._run([[id] for id in ids], self._at)
        self._at += 1

    def end(self) -> None:
        """Nothing: what was written behind the prompts is overwritten the next time."""

    def _prompt(self, ids: list[int]) -> Any:
        for begin in range(0, len(ids), self._chunk):
            logits = self._run([ids[begin : begin + self._chunk]], begin)
        return logits[0]

    def _run(self, pieces: list[list[int]], begin: int) -> Any:
        """Run a piece of each sequence from place ``begin`` on; return the logits of the last tokens."""
        from moesaic.ops import Batch

        torch, count = self._torch, len(pieces[0])
        places = torch.arange(begin, begin + count)
        firsts = torch.arange(len(pieces)) * self._blocks
        starts = tuple(range(0, len(pieces) * count + 1, count))
        batch = Batch(
            tokens=torch.tensor(pieces).flatten(),
            positions=places.repeat(len(pieces)),
            starts=starts,
            lengths=(begin + count,) * len(pieces),
            slots=(firsts[:, None] * BLOCK + places).flatten(),
            tables=firsts[:, None] + torch.arange(-(-(begin + count) // BLOCK)),
            outputs=torch.tensor(starts[1:]) - 1,
            cache=self._cache,
        )
        with torch.inference_mode():
            return self._model.logits(self._model(batch)[batch.outputs])
