"""Transformers on torch's CPU kernels, called step by step with its own cache.

The format ``bfloat16-NAME`` selects the implementation NAME of the experts; plain ``bfloat16`` uses the library's
default.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

LABEL = "transformers"
MODULES, PACKAGES = ("transformers", "torch"), ("transformers", "torch")
INSTALL = "pip install transformers torch"
READS_GGUF = False
FORMATS = ("bfloat16", "bfloat16-eager")


def make(source: Path, folder: Path, weight_format: str) -> Path:
    """Return ``source``: this engine loads the Hugging Face checkpoint as it is."""
    return source


class Peer:
    """The model, and the key/value cache of one prompt, which is copied for each sequence of a batch."""

    def __init__(self, path: Path, weight_format: str, threads: int, context: int, sequences: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        dtype, _, experts = weight_format.partition("-")
        options = {"experts_implementation": experts} if experts else {}
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options).eval()
        config = self._model.config
        self._prompt_cache: Any = None
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
        self._prompt_cache = self._run([prompts[0]], None).past_key_values

    def begin(self, batch: int, steps: int) -> None:
        self._cache = copy.deepcopy(self._prompt_cache)
        self._cache.batch_repeat_interleave(batch)

    def step(self, ids: list[int]) -> None:
        self._run([[token_id] for token_id in ids], self._cache)

    def end(self) -> None:
        self._cache = None

    def _run(self, ids: list[list[int]], cache: Any) -> Any:
        with self._torch.inference_mode():
            tokens = self._torch.tensor(ids)
            return self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
