"""Moesaic's whole engine, as users get it: ``LLM`` with its scheduler, sampler, streams and text.

The prefix cache keeps the prompts, each in blocks of its own. To decode, the prompts are submitted again, and only the
last block of each is computed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LABEL = "Moesaic, whole LLM"
MODULES, PACKAGES = ("moesaic", "torch"), ("torch",)
INSTALL = "pip install moesaic"
READS_GGUF = True
FORMATS = ("q8", "q4", "q2", "bfloat16")

MAX_DELAYED_STEPS = 4
"""Maximum number of steps by which a request of a batch starts later than the first request."""


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
    """An ``LLM`` and its running requests."""

    def __init__(self, path: Path, weight_format: str, threads: int, context: int, sequences: int) -> None:
        from moesaic.bench.peers import _ours
        from moesaic.engine import Sampling
        from moesaic.llm import LLM
        from moesaic.loading import torch_threads

        self._sampling = Sampling
        context += MAX_DELAYED_STEPS
        self._llm = LLM.load(path, context=context, cache_tokens=context * (sequences + 1))
        model: Any = self._llm.loaded.model
        _ours.set_up(threads, torch_threads(model))
        self._prompts: list[list[int]] = []
        self._replies: list[Any] = []
        self.about: dict[str, Any] = _ours.about(model) | {"sampling": "greedy"}
        self.weights = _ours.weights(model)

    def prefill(self, ids: list[int]) -> None:
        self._submit(ids, 1).answer  # noqa: B018

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        [token] = self._submit(ids, 1, logprobs=count).answer.tokens
        return [token_id for token_id, _ in token.top][:count]

    def fill(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        for ids in prompts:
            self.prefill(ids)

    def begin(self, batch: int, steps: int) -> None:
        replies = [self._submit(ids, steps + MAX_DELAYED_STEPS) for ids in self._prompts[:batch]]
        self._replies = [iter(reply) for reply in replies]

    def step(self, ids: list[int]) -> None:
        for reply in self._replies:
            next(reply)

    def end(self) -> None:
        for reply in self._replies:
            for _ in reply:
                pass

    def _submit(self, ids: list[int], tokens: int, **more: Any) -> Any:
        sampling = self._sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, speculation=False, **more)
        [reply] = self._llm.submit(ids, sampling)
        return reply
