"""Transformers on torch's CPU kernels, called step by step with its own cache.

Variants of ``bfloat16`` name another way to run the experts; without one it is the library's choice.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

LABEL = "transformers"
MODULES, PACKAGES = ("transformers", "torch"), ("transformers", "torch")
INSTALL = "pip install transformers torch"
FORMATS = ("bfloat16", "bfloat16-eager")


def make(source: Path, folder: Path, format: str) -> Path:
    """Return the checkpoint itself."""
    return source


class Peer:
    """The model and a cache that holds one prompt; a batch gets copies of it."""

    def __init__(self, path: Path, format: str, threads: int, context: int, sequences: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        dtype, _, experts = format.partition("-")
        how = {"experts_implementation": experts} if experts else {}
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **how).eval()
        config = self._model.config
        self._held: Any = None
        self._cache: Any = None
        self.about: dict[str, Any] = {
            "attention": config._attn_implementation,
            "experts": getattr(config, "_experts_implementation", None),
        }
        sizes = {name: parameter.nbytes for name, parameter in self._model.named_parameters()}
        experts_bytes = sum(size for name, size in sizes.items() if ".experts." in name)
        embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)
        self.weights = experts_bytes, sum(sizes.values()) - experts_bytes - embedding

    def prefill(self, ids: list[int]) -> None:
        self._run([ids], None)

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        return self._run([ids], None).logits[0, -1].topk(count).indices.tolist()  # type: ignore[no-any-return]

    def fill(self, prompts: list[list[int]]) -> None:
        self._held = self._run([prompts[0]], None).past_key_values

    def begin(self, batch: int, steps: int) -> None:
        self._cache = copy.deepcopy(self._held)
        self._cache.batch_repeat_interleave(batch)

    def step(self, ids: list[int]) -> None:
        self._run([[id] for id in ids], self._cache)

    def end(self) -> None:
        self._cache = None

    def _run(self, ids: list[list[int]], cache: Any) -> Any:
        with self._torch.inference_mode():
            tokens = self._torch.tensor(ids)
            return self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
