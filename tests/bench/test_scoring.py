"""Likelihoods from the engine against those computed directly from logits."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic.bench import evaluation
from moesaic.bench.evaluation import Options
from moesaic.bench.scoring import Continuation, likelihoods
from moesaic.engine import Engine
from moesaic.errors import InvalidParameter, InvalidRequest, NotInstalled
from moesaic.llm import LLM
from moesaic.loading import Loaded
from moesaic.ops import Batch
from tests.support.loading import load_model

CONTEXT = tuple(range(100, 140))
AT_ONCE = 4


@pytest.fixture(scope="module")
def loaded(talker: Path) -> Loaded:
    return load_model(talker, context=64)


@pytest.fixture
def llm(loaded: Loaded) -> Iterator[LLM]:
    with evaluation.start(loaded, "talker", AT_ONCE) as started:
        yield started


@torch.inference_mode()
def direct(loaded: Loaded, context: tuple[int, ...], ids: tuple[int, ...], longest: int = 64) -> tuple[float, bool]:
    """Return log p of ``ids`` and whether they are greedy. The context is cut as lm-eval's adapter for HF cuts it."""
    read = [*context, *ids][-(longest + 1) :][:-1]
    logprobs = loaded.model.logits(loaded.model(Batch.whole([read])))[-len(ids) :].double().log_softmax(-1)
    return float(logprobs[range(len(ids)), list(ids)].sum()), logprobs.argmax(-1).tolist() == list(ids)


@torch.inference_mode()
def greedy(loaded: Loaded, context: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(context)
    for _ in range(count):
        ids.append(int(loaded.model.logits(loaded.model(Batch.whole([ids])))[-1].argmax()))
    return tuple(ids[len(context) :])


def test_likelihoods_equal_those_of_the_logits(loaded: Loaded, llm: LLM) -> None:
    contexts = [CONTEXT, CONTEXT[:17], (1,), (*CONTEXT[:39], 7), (*CONTEXT, *range(200, 260))]
    endings = [(5,), (6,), (6, 9, 1), (6, 9, 2), tuple(range(300, 320))]
    asked = [Continuation(context, ids) for context in contexts for ids in endings]
    asked += [Continuation(context, greedy(loaded, context, 3)) for context in contexts[:4]]
    order = torch.randperm(len(asked)).tolist()
    seen: list[tuple[int, int]] = []
    found = likelihoods(llm.engine, [asked[i] for i in order], AT_ONCE, lambda *counts: seen.append(counts))
    assert seen == [(done + 1, len(asked)) for done in range(len(asked))]
    flags = []
    for index, one in zip(order, found, strict=True):
        logprob, same = direct(loaded, asked[index].context, asked[index].ids)
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.greedy is same
        flags.append(same)
    assert flags.count(True) == 4


@pytest.mark.parametrize("size", [64, 63, 1])
def test_longest_continuations_are_scored(loaded: Loaded, llm: LLM, size: int) -> None:
    context, ids = tuple(range(400, 500)), tuple(range(500, 500 + size))
    [found] = likelihoods(llm.engine, [Continuation(context, ids)], AT_ONCE)
    assert found.logprob == pytest.approx(direct(loaded, context, ids)[0], abs=1e-4)


def test_a_model_reads_as_many_tokens_as_it_was_made_for(talker: Path) -> None:
    loaded = load_model(talker)
    length = loaded.model.max_length
    context = tuple(torch.randint(1000, (length + 5,)).tolist())
    with evaluation.start(loaded, "talker", AT_ONCE) as llm:
        [found] = likelihoods(llm.engine, [Continuation(context, (3, 4))], AT_ONCE)
    assert found.logprob == pytest.approx(direct(loaded, context, (3, 4), length)[0], abs=1e-3)


def test_a_shared_context_is_computed_once(loaded: Loaded) -> None:
    asked = [Continuation(CONTEXT, (ending, 8)) for ending in range(10)]
    asked += [Continuation((*CONTEXT[:32], 9, 9, 9), (ending,)) for ending in range(6)]
    # Without a thread, all requests that are submitted together run in one step.
    with Engine(loaded.model, context=65, thread=False) as engine:
        likelihoods(engine, asked, at_once=AT_ONCE)
        stats = engine.stats()
    # CONTEXT fills two blocks of 16; the other context begins with the same two.
    assert stats.cached_tokens == (len(asked) - 1) * 32
    assert stats.prompt_tokens == 10 * 41 + 6 * 35


@pytest.mark.parametrize(("context", "ids"), [((), (1,)), ((1,), ()), ((1,), tuple(range(65)))])
def test_impossible_continuations_are_refused(llm: LLM, context: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest):
        likelihoods(llm.engine, [Continuation(context, ids)], AT_ONCE)


def test_wrong_options_are_refused() -> None:
    for options in ({"num_fewshot": -1}, {"limit": 0}, {"limit": float("nan")}):
        with pytest.raises(InvalidParameter):
            Options(**options)  # type: ignore[arg-type]


def test_results_are_shown_as_a_table() -> None:
    figures = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.125, "words": 3, "em,strict": 1.0, "sample_len": 8}
    results = {"results": {"task_a": figures}, "n-shot": {"task_a": 2}, "samples": {"task_a": []}}
    rows = [evaluation.row(None, results), evaluation.row("q4", results)]
    assert "samples" not in rows[0]
    assert [line.split() for line in evaluation.lines(rows)] == [
        ["task", "shots", "metric", "as", "stored", "q4"],
        ["a", "2", "acc", *["0.5000", "±", "0.1250"] * 2],
        ["a", "2", "words", "3", "3"],
        ["a", "2", "em,strict", "1.0000", "1.0000"],
    ]


def test_missing_lm_eval_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NotInstalled, match=r"pip install 'moesaic\[eval\]'"):
        evaluation.require()
