"""Compare the predictions of a GGUF file in Moesaic and in llama.cpp.

- The perplexity of both, on the first documents of a text, in the same windows.
- The Kullback-Leibler divergence per token from the logits of transformers, which computes with the decoded weights in
  float32, and how often both find the same token likeliest.
- The likeliest answers to a question, and the five likeliest first tokens with their logits.

llama.cpp computes with its default settings, and so does Moesaic. llama-cpp-python must be installed in the interpreter
--python; docs/how-to/benchmark.md says how.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from moesaic.bench import provenance, quality
from moesaic.bench.divergence import kl_divergence
from moesaic.bench.windows import document
from moesaic.convert import convert
from moesaic.llm import LLM
from moesaic.ops import Batch

HERE = Path(__file__).parent
TEXTS = HERE.parent / "recipes/tales/tales.valid.jsonl.xz"
EXAMPLE = """example:
  python -m benchmarks.gguf_quality model.gguf --python llama/bin/python --out docs/results/gguf-quality.json
"""
QUESTION = "What is the capital of France?"
LIKELIEST = 5
ROWS = 128
"""Rows whose probabilities exist at once."""


@dataclass(frozen=True)
class Setup:
    """The files and sizes of a comparison."""

    model: Path
    python: Path
    texts: Path
    documents: int
    length: int
    kl_tokens: int
    answer_tokens: int


def ask_llama_cpp(python: Path, folder: Path, **request: Any) -> dict[str, Any]:
    """Return the result of a request to ``llama_cpp_reference.py``."""
    file = folder / "request.json"
    file.write_text(json.dumps(request))
    command = [str(python), str(HERE / "llama_cpp_reference.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [result] = json.loads(done.stdout.splitlines()[-1])
    return dict(result)


@torch.inference_mode()
def our_logits(llm: LLM, sequences: Sequence[list[int]]) -> Tensor:
    """Return the logits [tokens, vocabulary] of the sequences, from Moesaic's model."""
    model = llm.loaded.model
    return torch.cat([model.logits(model(Batch.whole([ids]))).float() for ids in sequences])


@torch.inference_mode()
def reference_logits(path: Path, folder: Path, sequences: Sequence[list[int]]) -> Tensor:
    """Return the logits [tokens, vocabulary] that transformers computes with the decoded weights in float32."""
    import transformers

    convert(path, folder / "decoded", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "decoded", dtype=torch.float32).eval()
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])


def divergence(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Return the divergence of ``found`` from ``expected``, logits [tokens, vocabulary], in nats per token."""
    parts = []
    for p, q in zip(expected.split(ROWS), found.split(ROWS), strict=True):
        parts.append(kl_divergence(p.double().log_softmax(1), q.double().log_softmax(1)))
    nats = torch.cat(parts)
    return {
        "mean": float(nats.mean()),
        "99_percent": float(nats.quantile(0.99)),
        "maximum": float(nats.max()),
        "same_likeliest_token": float((expected.argmax(1) == found.argmax(1)).double().mean()),
    }


def perplexities(setup: Setup, llm: LLM, folder: Path) -> dict[str, Any]:
    """Return the perplexity of the documents in both engines, in the same windows."""
    texts = quality.read_texts(setup.texts)[: setup.documents]
    loaded, tokenizer = llm.loaded, llm.tokenizer
    measured = quality.perplexity(loaded, tokenizer, texts, setup.length)
    windows = quality.prepare(loaded, tokenizer, texts, setup.length, "documents").windows
    result = ask_llama_cpp(setup.python, folder, model=str(setup.model), windows=windows)
    theirs = math.exp(sum(result["nats"]) / measured.tokens)
    return {
        "documents": measured.documents,
        "tokens": measured.tokens,
        "length": setup.length,
        "moesaic": measured.perplexity,
        "llama.cpp": theirs,
        "difference": measured.perplexity / theirs - 1,
    }


def divergences(setup: Setup, llm: LLM, folder: Path) -> dict[str, Any]:
    """Return the divergence of both engines from transformers, and the five likeliest tokens after a question."""
    prompt = llm.encode_chat([{"role": "user", "content": QUESTION}])
    sequences, missing = [prompt], setup.kl_tokens
    for text in quality.read_texts(setup.texts):
        ids = document(llm.tokenizer, text, llm.loaded.model.vocab_size)[: min(setup.length, missing)]
        sequences.append(ids)
        missing -= len(ids)
        if not missing:
            break
    file = folder / "logits.npy"
    request = {"model": str(setup.model), "sequences": sequences, "logits": str(file), "prompts": [prompt]}
    result = ask_llama_cpp(setup.python, folder, **request, max_tokens=setup.answer_tokens)
    logits = {
        "transformers, float32": reference_logits(setup.model, folder, sequences),
        "moesaic": our_logits(llm, sequences),
        "llama.cpp": torch.from_numpy(numpy.load(file)),
    }
    expected = logits["transformers, float32"][len(prompt) :]
    own = llm.chat([{"role": "user", "content": QUESTION}], temperature=0, max_tokens=setup.answer_tokens)
    return {
        "tokens": len(expected),
        "divergence": {name: divergence(expected, logits[name][len(prompt) :]) for name in ("moesaic", "llama.cpp")},
        "question": QUESTION,
        "answers": {"moesaic": own.text, "llama.cpp": llm.tokenizer.decode(result["answers"][0])},
        "first_token": {name: _likeliest(llm, found[len(prompt) - 1]) for name, found in logits.items()},
        "llama_cpp_python": result["version"],
    }


def _likeliest(llm: LLM, logits: Tensor) -> dict[str, float]:
    values, ids = logits.topk(LIKELIEST)
    return {llm.tokenizer.piece(int(i)): round(float(v), 4) for v, i in zip(values, ids, strict=True)}


def measure(setup: Setup) -> dict[str, Any]:
    """Return all figures of a comparison."""
    with tempfile.TemporaryDirectory() as folder, LLM.load(setup.model, context=setup.length) as llm:
        return {
            "model": setup.model.name,
            "dtype": str(llm.loaded.model.dtype).removeprefix("torch."),
            "perplexity": perplexities(setup, llm, Path(folder)),
            **divergences(setup, llm, Path(folder)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--python", type=Path, required=True, help="interpreter that has llama-cpp-python")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="file with a text on each line; default: tales")
    parser.add_argument("--documents", type=int, default=50, help="documents to read (default 50)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--kl-tokens", type=int, default=1024, help="tokens to compare all logits of (default 1024)")
    parser.add_argument("--answer-tokens", type=int, default=40, help="length of an answer (default 40)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    setup = Setup(args.model, args.python, args.texts, args.documents, args.length, args.kl_tokens, args.answer_tokens)
    command = (
        f"python -m benchmarks.gguf_quality {setup.model.name} --python llama/bin/python --documents {setup.documents}"
        f" --length {setup.length} --kl-tokens {setup.kl_tokens} --out {args.out}"
    )
    provenance.write(args.out, provenance.record(command, measure(setup)))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
