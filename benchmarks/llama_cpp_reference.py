"""Compute token ids, logits, scores and answers of a GGUF file with llama.cpp, for comparisons with Moesaic.

    python benchmarks/llama_cpp_reference.py REQUEST.json ...

The program runs in the interpreter in which llama-cpp-python is installed, and imports nothing else but numpy. A
request is a JSON object with the keys

    model        the GGUF file
    threads      number of threads; default: 2
    exact        true: keys and values in float32, and attention without the fused kernel; default: as llama.cpp runs
    texts        list of [text, whether control tokens are read, whether the mark of the beginning is added]
    sequences    list of token ids of sequences, and
    logits       .npy file to write, with the logits [tokens, vocabulary] of all sequences in float32
    windows      list of [ids, targets]: the token to predict after each id
    prompts      list of token ids of prompts, and
    max_tokens   number of tokens of the likeliest answer to each of them; it ends earlier at a token that ends answers

The last line of the output is a JSON list with an object for each request: ``version`` of llama-cpp-python, ``ids`` of
the texts, ``nats`` with the sum of -log p for each window, and ``answers`` with the ids of each answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy

SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Vocabulary:
    """The vocabulary of a GGUF file, of which nothing else is loaded."""

    def __init__(self, path: str) -> None:
        options = llama_cpp.llama_model_default_params()
        options.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load the vocabulary of {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str, control: bool, begin: bool) -> list[int]:
        """Return token ids; ``control`` reads names of control tokens, ``begin`` adds the mark of the beginning."""
        data = text.encode("utf-8", "surrogatepass")
        ids = (llama_cpp.llama_token * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), begin, control)
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count}")
        return list(ids[:count])


class Model:
    """A model in llama.cpp with one sequence of at most ``context`` tokens, which one call computes."""

    def __init__(self, path: str, threads: int, exact: bool, context: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = -(-context // 256) * 256
        parameters.n_threads = parameters.n_threads_batch = threads
        if exact:
            parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, parameters) if self._model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def logits(self, ids: list[int], start: int = 0) -> Any:
        """Return the logits [tokens, vocabulary] of ``ids``, the first of which is at position ``start``.

        The keys and values of the positions before ``start`` stay; those from there on are computed again. The result
        is valid until the next call.
        """
        llama_cpp.llama_memory_seq_rm(self._memory, -1, start, -1)
        batch = self._batch
        batch.n_tokens = len(ids)
        for row, token_id in enumerate(ids):
            batch.token[row], batch.pos[row], batch.logits[row] = token_id, start + row, True
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        data = llama_cpp.llama_get_logits(self._context)
        return numpy.ctypeslib.as_array(data, shape=(len(ids) * self._size,)).reshape(len(ids), self._size)

    def nats(self, ids: list[int], targets: list[int]) -> float:
        """Return the sum of -log p of the token to predict after each of ``ids``."""
        total = 0.0
        logits = self.logits(ids)
        for begin in range(0, len(ids), 64):
            rows = logits[begin : begin + 64].astype(numpy.float64)
            best = rows.max(1)
            likelihoods = best + numpy.log(numpy.exp(rows - best[:, None]).sum(1))
            total += float((likelihoods - rows[range(len(rows)), targets[begin : begin + 64]]).sum())
        return total

    def answer(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return the ids of the likeliest answer, with the token that ends it."""
        ids, new = list[int](), prompt
        for _ in range(max_tokens):
            token_id = int(self.logits(new, len(prompt) + len(ids) - len(new))[-1].argmax())
            ids.append(token_id)
            if llama_cpp.llama_vocab_is_eog(self._vocab, token_id):
                break
            new = [token_id]
        return ids


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a request."""
    path = request["model"]
    result: dict[str, Any] = {"version": llama_cpp.__version__, "ids": [], "nats": [], "answers": []}
    if "texts" in request:
        vocabulary = Vocabulary(path)
        result["ids"] = [vocabulary.encode(*text) for text in request["texts"]]
    sequences, windows, prompts = (request.get(key, []) for key in ("sequences", "windows", "prompts"))
    longest = max(map(len, (*sequences, *(ids for ids, _ in windows), *prompts)), default=0)
    if longest:
        context = longest + request.get("max_tokens", 0)
        model = Model(path, request.get("threads", 2), request.get("exact", False), context)
        if sequences:
            numpy.save(request["logits"], numpy.concatenate([model.logits(ids).copy() for ids in sequences]))
        result["nats"] = [model.nats(*window) for window in windows]
        result["answers"] = [model.answer(ids, request["max_tokens"]) for ids in prompts]
    return result


def main() -> None:
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    print(json.dumps([answer(json.loads(Path(file).read_text())) for file in sys.argv[1:]]))


if __name__ == "__main__":
    main()
