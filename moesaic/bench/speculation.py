"""Speed with and without speculation, side by side, on a task that repeats its prompt and on one that repeats nothing.

Both tasks have random token ids as their prompt, so they suit any model. In the first, the prompt repeats a passage.
The answer is drawn greedily, and usually continues the repetition. In the second, the prompt repeats nothing, and the
answer is drawn at temperature 1: there speculation can only cost time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.engine import Sampling
from moesaic.llm import LLM

ROUNDS = 3
"""Times that each task is measured, with and without speculation in turn."""
REPEATS = 4
"""Occurrences of the passage in the prompt of the first task, the last of which may be cut."""


@dataclass(frozen=True)
class Comparison:
    """The same answers with and without speculation, one at a time; tokens per second are medians."""

    tokens_s: float
    """Generated tokens per second with speculation, from the first token of an answer to its last."""
    plain_tokens_s: float
    """Generated tokens per second without."""
    draft_tokens: int
    """Tokens that were proposed."""
    accepted_tokens: int
    same: bool
    """Whether all answers had the same tokens."""


def measure(llm: LLM, prompt: int, tokens: int, seed: int = 0) -> Mapping[str, Any]:
    """Return a ``Comparison`` of each task as a dictionary; prompts have ``prompt`` tokens, answers ``tokens``.

    Raises:
        NumericalError: the model computed NaN or infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(llm.loaded.model.vocab_size, (prompt,), generator=generator).tolist()
    passage = ids[: -(-prompt // REPEATS)]
    repeating = (passage * REPEATS)[:prompt]
    tasks = {"copying": (repeating, 0.0), "random": (ids, 1.0)}
    return {name: asdict(_compare(llm, *task, tokens, seed)) for name, task in tasks.items()}


def _compare(llm: LLM, ids: list[int], temperature: float, tokens: int, seed: int) -> Comparison:
    speeds: dict[bool, list[float]] = {False: [], True: []}
    answers = set()
    before = llm.engine.stats()
    for _ in range(ROUNDS):
        for speculation, found in speeds.items():
            options: dict[str, Any] = {"temperature": temperature, "seed": seed, "speculation": speculation}
            reply = llm.submit(ids, Sampling(max_tokens=tokens, ignore_eos=True, **options))[0]
            arrivals = [(time.perf_counter(), token.id) for piece in reply for token in piece.tokens]
            found.append((len(arrivals) - 1) / (arrivals[-1][0] - arrivals[0][0]))
            answers.add(tuple(token_id for _, token_id in arrivals))
    after = llm.engine.stats()
    return Comparison(
        tokens_s=statistics.median(speeds[True]),
        plain_tokens_s=statistics.median(speeds[False]),
        draft_tokens=after.draft_tokens - before.draft_tokens,
        accepted_tokens=after.accepted_tokens - before.accepted_tokens,
        same=len(answers) == 1,
    )


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``results``, a result of ``measure``, as lines of text."""
    for name, row in results.items():
        speeds = f"{row['tokens_s']:.2f} tokens/s, without {row['plain_tokens_s']:.2f}"
        counts = f"{row['accepted_tokens']} of {row['draft_tokens']} proposals accepted"
        note = "" if row["same"] else "; ANSWERS DIFFER"
        yield f"speculation, {name} task: {speeds} ({row['tokens_s'] / row['plain_tokens_s']:.2f}x), {counts}{note}"
