"""Calibration text: documents of a file, or answers that the model writes itself.

Text that a model has written has the distribution that the model will see in use, and needs no data set (LLM-QAT,
arXiv:2305.17888). The prompts below ask for texts of many kinds, so that many experts are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moesaic import checkpoints, memory
from moesaic.errors import InvalidParameter
from moesaic.llm import LLM
from moesaic.load_options import LoadOptions
from moesaic.plan import make_plan
from moesaic.text.tokenizer import Tokenizer
from moesaic.token_rows import check_ids

LENGTH = 512
"""Maximum tokens of a calibration sequence."""
PROMPTS = (
    "Tell me a long story about a child who finds something strange in the woods.",
    "Explain how a refrigerator works to a curious teenager.",
    "Write a Python program that reads a CSV file and prints the mean of each column, and explain it.",
    "Schreibe einen kurzen Aufsatz über das Leben in einer großen Stadt.",
    "Solve this step by step: a train leaves at 9:15 and travels 240 kilometres at 80 kilometres per hour.",
    "Write a dialogue between a shopkeeper and a customer who wants to return a broken lamp.",
    "Raconte une histoire sur un chat qui traverse la mer.",
    "Summarize the history of the printing press and its effects.",
    "Write a formal letter that asks a landlord to repair the heating.",
    "Compare three ways to store energy, with their advantages and disadvantages, as a table.",
    "Describe the water cycle, and give an example for each step.",
    "Escribe una receta detallada para una sopa de verduras.",
    "Write a poem about the first snow of the year.",
    "Give me a plan for a week of exercise for a beginner.",
    "What are the arguments for and against remote work? Discuss them at length.",
    "Write an SQL query and a JSON document that describe the orders of an online shop.",
)
"""Requests to which the model writes answers, in turn."""


def from_documents(path: Path, documents: Sequence[str], tokens: int) -> list[list[int]]:
    """Return the ids of documents in sequences of at most ``LENGTH`` tokens, ``tokens`` in all.

    Args:
        path: the model, whose tokenizer is used.
        documents: the texts.
        tokens: maximum number of tokens.
    """
    tokenizer, rows = Tokenizer.open(path), make_plan(path).spec.build("meta").vocab_size
    return _limited(_sequences(tokenizer, documents, rows), tokens)


def _sequences(tokenizer: Tokenizer, documents: Sequence[str], rows: int) -> Iterator[list[int]]:
    for text in documents:
        ids = tokenizer.encode(text, bos=True)
        check_ids("calibrate", ids, tokenizer, rows)
        yield from (ids[begin : begin + LENGTH] for begin in range(0, len(ids), LENGTH))


def _limited(sequences: Iterator[list[int]], tokens: int) -> list[list[int]]:
    """Return sequences with ``tokens`` tokens in all; the last one may be cut."""
    found: list[list[int]] = []
    for ids in sequences:
        found.append(ids[: tokens - sum(map(len, found))])
        if sum(map(len, found)) >= tokens:
            break
    return found


def self_written(path: Path, tokens: int, progress: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """Return ids of conversations whose answers the model wrote: ``tokens`` tokens in all.

    The model is loaded with int8 weights, or with those of the file if they are quantized.

    Args:
        path: the model.
        tokens: number of tokens.
        progress: called with the number of tokens so far and in total.

    Raises:
        InvalidParameter: the model does not fit into memory.
    """
    with checkpoints.open_checkpoint(path) as checkpoint:
        quantized = bool(checkpoint.quantized)
    options = LoadOptions(
        format=None if quantized else "q8", context=2 * LENGTH, cache_tokens=len(PROMPTS) * 2 * LENGTH
    )
    plan = make_plan(path, options)
    if plan.bytes > memory.available():
        problem = f"is needed: the model takes {plan.bytes / 1e9:.1f} GB of memory to write a text itself; name a file"
        raise InvalidParameter("calibrate", problem)
    with LLM.from_plan(plan, path.name) as llm:
        return _limited(_conversations(llm, tokens, progress), tokens)


def _conversations(llm: LLM, tokens: int, progress: Callable[[int, int], None] | None) -> Iterator[list[int]]:
    """Yield the ids of prompts and their answers, without end."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [llm.encode_chat(conversation) for conversation in conversations]
    done, longest = 0, max(map(len, prompts))
    for seed in itertools.count():
        answers = llm.chat(
            conversations, temperature=1.0, top_p=1.0, top_k=0, max_tokens=max(1, LENGTH - longest), seed=seed
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = [*prompt, *(token.id for token in answer.tokens)]
            done += len(ids)
            if progress is not None:
                progress(min(done, tokens), tokens)
            yield ids
