"""The arithmetic of latencies, on records made by hand."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest

from moesaic.bench import latency, load_report
from moesaic.bench.endpoints import Answer
from moesaic.bench.serving import Load, Record, Run
from moesaic.errors import InvalidParameter


def record(
    begun: float, *arrivals: float, tokens: int | None = None, failure: str | None = None, **more: Any
) -> Record:
    answer = Answer(array("d", arrivals), tokens, more.pop("prompt_tokens", None))
    ended = more.pop("ended", arrivals[-1] if arrivals else begun)
    return Record(0, begun, 10, 7, answer=answer, ended=ended, failure=failure, **more)


def run(*records: Record, seconds: float = 10.0, **load: Any) -> Run:
    load = load or {"concurrency": 2, "requests": len(records)}
    return Run(Load(**load), 0.0, seconds, list(records), array("d", [0.0] * 99 + [0.001]), 1.0)


def test_one_answer() -> None:
    each = record(1.0, 1.5, 1.6, 1.8, 2.5)
    assert latency.ttft(each) == pytest.approx(0.5)
    assert latency.e2el(each) == pytest.approx(1.5)
    assert latency.itl(each) == pytest.approx([0.1, 0.2, 0.7])
    assert latency.tpot(each) == pytest.approx(1 / 3)
    assert latency.tpot(record(1.0, 1.5, 2.5, tokens=11)) == pytest.approx(0.1)  # many tokens in a piece
    assert latency.tpot(record(1.0, 1.5)) is None


def test_all_answers() -> None:
    records = [
        record(0.0, 1.0, 2.0, 3.0, prompt_tokens=20),  # TTFT 1, TPOT 1
        record(0.0, 3.0, 5.0, tokens=5, prompt_tokens=30),  # TTFT 3, TPOT 0.5
        record(2.0, 2.5, failure="cut stream"),
        record(4.0, 6.0, prompt_tokens=40),  # TTFT 2
    ]
    found = latency.figures(run(*records), {"ttft": 2500.0, "tpot": 1000.0})
    assert (found["completed"], found["failed"], found["failures"]) == (3, 1, {"cut stream": 1})
    assert (found["total_output_tokens"], found["total_input_tokens"]) == (9, 90)
    assert found["request_throughput"] == 0.3 and found["request_goodput"] == 0.2
    assert found["output_throughput"] == 0.9 and found["total_token_throughput"] == 9.9
    ttft = [found[f"{which}_ttft_ms"] for which in ("mean", "median", "p90", "p99", "max")]
    assert ttft == pytest.approx([2000, 2000, 2800, 2980, 3000])  # as numpy and vLLM: between the ranks
    assert found["std_ttft_ms"] == pytest.approx(1000 * math.sqrt(2 / 3))
    assert found["mean_tpot_ms"] == pytest.approx(750) and found["median_itl_ms"] == pytest.approx(1000)
    assert found["max_e2el_ms"] == pytest.approx(5000)
    assert found["mean_stream_throughput"] == pytest.approx(1.5) and found["p10_stream_throughput"] == pytest.approx(
        1.1
    )
    assert (found["tokens_counted_by"], found["prompt_tokens_counted_by"]) == ("usage, else chunks", "usage")
    assert found["tokens_per_chunk"] == 1.5 and found["max_concurrent_requests"] == 3
    assert found["mean_prompt_tokens"] == 30 and found["mean_prompt_tokens_asked"] == 7
    assert found["client_cpu"] == 0.1 and found["client_lag_max_ms"] == 1 and found["warning"] is None


def test_the_names_are_vllms() -> None:
    found = latency.figures(run(record(0.0, 1.0, 2.0)), {})
    names = ["request_throughput", "output_throughput", "total_token_throughput", "completed", "failed", "duration"]
    names += ["total_input_tokens", "total_output_tokens", "max_concurrency", "request_rate", "burstiness"]
    names += ["request_goodput", "max_output_tokens_per_s", "max_concurrent_requests", "num_prompts"]
    names += [
        f"{which}_{what}_ms" for which in ("mean", "median", "std", "p99") for what in ("ttft", "tpot", "itl", "e2el")
    ]
    assert set(names) <= found.keys()


def test_tokens_are_spread_over_the_seconds_in_which_they_came() -> None:
    records = [record(0.0, 0.5, 1.5, 1.6, 3.0), record(0.0, 0.2, 2.9, tokens=10), record(0.0, 1.0, failure="timeout")]
    whole = run(*records, seconds=3.0)
    assert latency.timeline(whole) == [1 + 5, 2, 1 + 5]
    assert latency.figures(whole, {})["max_output_tokens_per_s"] == 6


def test_how_many_ran_at_once() -> None:
    spans = [(0, 10), (1, 2), (2, 3), (2, 3), (9, 12)]
    assert latency.peak([record(begun, ended=ended) for begun, ended in spans]) == 3
    assert latency.peak([]) == 0


def test_nothing_answered() -> None:
    whole = run(record(0.0, failure="timeout"))
    found = latency.figures(whole, {"ttft": 1.0})
    assert found["mean_ttft_ms"] is None and found["output_throughput"] == 0 and found["request_goodput"] == 0
    assert "failed: 1 x timeout" in "\n".join(load_report.lines([found]))
    assert "failed with 2 at once: 1 x timeout" in "\n".join(load_report.lines([found, found]))


def test_promises() -> None:
    assert latency.promises("ttft=500,tpot:50") == {"ttft": 500, "tpot": 50}  # vLLM writes a colon
    assert latency.promises(None) == {}
    each = record(0.0, 0.4, 0.5, tokens=2)
    assert latency.keeps(each, {"ttft": 400.0, "tpot": 101.0, "e2el": 500.0})
    assert not latency.keeps(each, {"ttft": 399.0})
    assert not latency.keeps(each, {"tpot": 99.0})
    assert latency.keeps(record(0.0, 0.4), {"tpot": 1.0})
    for wrong in ("ttft", "ttft=", "ttft=-1", "ttft=nan", "itl=3", "=3"):
        with pytest.raises(InvalidParameter, match="goodput"):
            latency.promises(wrong)


def test_a_client_that_is_late_says_so() -> None:
    answers = [record(0.0, 0.5, *(0.5 + 0.02 * step for step in range(1, 9)))]
    whole = run(*answers)
    assert latency.figures(whole, {})["warning"] is None
    whole.late = array("d", [0.006] * 100)
    assert "6.0 ms late" in latency.figures(whole, {})["warning"]
    whole = run(*answers)
    whole.cpu = 9.5
    assert "95% of a core" in latency.figures(whole, {})["warning"]
    sent = [record(0.03, 0.5, 0.52, 0.54, due=0.0)]
    whole = run(*sent, rate=1.0, requests=1)
    assert "30.0 ms late" in latency.figures(whole, {})["warning"]


def test_rows() -> None:
    found = latency.figures(run(record(0.0, 1.0, 2.0)), {})
    one, several = "\n".join(load_report.lines([found])), list(load_report.lines([found, found]))
    assert "1 answered, 0 failed in 10.0 s; 2 at once, at most 1 running" in one
    assert len(several) == 4 and len({len(line) for line in several[1:]}) == 1
    assert "goodput" not in several[1]
    assert load_report.setting(found | {"max_concurrency": None, "request_rate": 2.5, "burstiness": 0.5}) == (
        "2.5 a second, burstiness 0.5"
    )
