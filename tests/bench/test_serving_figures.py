"""Latency figures, computed from records made by hand."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest

from moesaic.bench import latency, load_report
from moesaic.bench.endpoints import Answer
from moesaic.bench.serving import LoadProfile, RequestRecord, Run
from moesaic.errors import InvalidParameter


def record(
    start: float, *arrivals: float, tokens: int | None = None, failure: str | None = None, **more: Any
) -> RequestRecord:
    answer = Answer(array("d", arrivals), tokens, more.pop("prompt_tokens", None))
    end = more.pop("end", arrivals[-1] if arrivals else start)
    return RequestRecord(0, start, 10, 7, answer=answer, end=end, failure=failure, **more)


def run(*records: RequestRecord, seconds: float = 10.0, **load: Any) -> Run:
    load = load or {"concurrency": 2, "requests": len(records)}
    return Run(LoadProfile(**load), 0.0, seconds, list(records), array("d", [0.0] * 99 + [0.001]), 1.0)


def test_latencies_of_one_answer() -> None:
    single = record(1.0, 1.5, 1.6, 1.8, 2.5)
    assert latency.ttft(single) == pytest.approx(0.5)
    assert latency.e2el(single) == pytest.approx(1.5)
    assert latency.itl(single) == pytest.approx([0.1, 0.2, 0.7])
    assert latency.tpot(single) == pytest.approx(1 / 3)
    assert latency.tpot(record(1.0, 1.5, 2.5, tokens=11)) == pytest.approx(0.1)  # many tokens in a piece
    assert latency.tpot(record(1.0, 1.5)) is None


def test_figures_of_a_run() -> None:
    records = [
        record(0.0, 1.0, 2.0, 3.0, prompt_tokens=20),  # TTFT 1, TPOT 1
        record(0.0, 3.0, 5.0, tokens=5, prompt_tokens=30),  # TTFT 3, TPOT 0.5
        record(2.0, 2.5, failure="cut stream"),
        record(4.0, 6.0, prompt_tokens=40),  # TTFT 2
    ]
    result = latency.summarize(run(*records), {"ttft": 2500.0, "tpot": 1000.0})
    assert (result["completed"], result["failed"], result["failures"]) == (3, 1, {"cut stream": 1})
    assert (result["total_output_tokens"], result["total_input_tokens"]) == (9, 90)
    assert result["request_throughput"] == 0.3 and result["request_goodput"] == 0.2
    assert result["output_throughput"] == 0.9 and result["total_token_throughput"] == 9.9
    ttft = [result[f"{which}_ttft_ms"] for which in ("mean", "median", "p90", "p99", "max")]
    assert ttft == pytest.approx([2000, 2000, 2800, 2980, 3000])  # as numpy and vLLM: between the ranks
    assert result["std_ttft_ms"] == pytest.approx(1000 * math.sqrt(2 / 3))
    assert result["mean_tpot_ms"] == pytest.approx(750) and result["median_itl_ms"] == pytest.approx(1000)
    assert result["max_e2el_ms"] == pytest.approx(5000)
    assert result["mean_stream_throughput"] == pytest.approx(1.5) and result["p10_stream_throughput"] == pytest.approx(
        1.1
    )
    assert (result["tokens_counted_by"], result["prompt_tokens_counted_by"]) == ("usage, else chunks", "usage")
    assert result["tokens_per_chunk"] == 1.5 and result["max_concurrent_requests"] == 3
    assert result["mean_prompt_tokens"] == 30 and result["mean_prompt_tokens_asked"] == 7
    assert result["client_cpu"] == 0.1 and result["client_lag_max_ms"] == 1 and result["warning"] is None


def test_names_match_vllm() -> None:
    result = latency.summarize(run(record(0.0, 1.0, 2.0)), {})
    names = ["request_throughput", "output_throughput", "total_token_throughput", "completed", "failed", "duration"]
    names += ["total_input_tokens", "total_output_tokens", "max_concurrency", "request_rate", "burstiness"]
    names += ["request_goodput", "max_output_tokens_per_s", "max_concurrent_requests", "num_prompts"]
    names += [
        f"{which}_{what}_ms" for which in ("mean", "median", "std", "p99") for what in ("ttft", "tpot", "itl", "e2el")
    ]
    assert set(names) <= result.keys()


def test_tokens_are_counted_per_second() -> None:
    records = [record(0.0, 0.5, 1.5, 1.6, 3.0), record(0.0, 0.2, 2.9, tokens=10), record(0.0, 1.0, failure="timeout")]
    whole = run(*records, seconds=3.0)
    assert latency.tokens_per_second(whole) == [1 + 5, 2, 1 + 5]
    assert latency.summarize(whole, {})["max_output_tokens_per_s"] == 6


def test_peak_concurrency() -> None:
    spans = [(0, 10), (1, 2), (2, 3), (2, 3), (9, 12)]
    assert latency.peak_concurrency([record(start, end=end) for start, end in spans]) == 3
    assert latency.peak_concurrency([]) == 0


def test_run_without_answers() -> None:
    whole = run(record(0.0, failure="timeout"))
    result = latency.summarize(whole, {"ttft": 1.0})
    assert result["mean_ttft_ms"] is None and result["output_throughput"] == 0 and result["request_goodput"] == 0
    assert "failed: 1 x timeout" in "\n".join(load_report.lines([result]))
    assert "failed with concurrency 2: 1 x timeout" in "\n".join(load_report.lines([result, result]))


def test_goodput_limits() -> None:
    assert latency.parse_goodput("ttft=500,tpot:50") == {"ttft": 500, "tpot": 50}  # vLLM writes a colon
    assert latency.parse_goodput(None) == {}
    single = record(0.0, 0.4, 0.5, tokens=2)
    assert latency.meets_slos(single, {"ttft": 400.0, "tpot": 101.0, "e2el": 500.0})
    assert not latency.meets_slos(single, {"ttft": 399.0})
    assert not latency.meets_slos(single, {"tpot": 99.0})
    assert latency.meets_slos(record(0.0, 0.4), {"tpot": 1.0})
    for wrong in ("ttft", "ttft=", "ttft=-1", "ttft=nan", "itl=3", "=3"):
        with pytest.raises(InvalidParameter, match="goodput"):
            latency.parse_goodput(wrong)


def test_late_client_causes_a_warning() -> None:
    answers = [record(0.0, 0.5, *(0.5 + 0.02 * step for step in range(1, 9)))]
    whole = run(*answers)
    assert latency.summarize(whole, {})["warning"] is None
    whole.timer_delays = array("d", [0.006] * 100)
    assert "6.0 ms late" in latency.summarize(whole, {})["warning"]
    whole = run(*answers)
    whole.cpu_seconds = 9.5
    assert "95% of a core" in latency.summarize(whole, {})["warning"]
    sent = [record(0.03, 0.5, 0.52, 0.54, due=0.0)]
    whole = run(*sent, rate=1.0, requests=1)
    assert "30.0 ms late" in latency.summarize(whole, {})["warning"]


def test_text_of_one_and_several_loads() -> None:
    result = latency.summarize(run(record(0.0, 1.0, 2.0)), {})
    one, several = "\n".join(load_report.lines([result])), list(load_report.lines([result, result]))
    assert "1 answered, 0 failed in 10.0 s; concurrency 2, at most 1 concurrent" in one
    assert len(several) == 4 and len({len(line) for line in several[1:]}) == 1
    assert "goodput" not in several[1]
    assert load_report.load_name(result | {"max_concurrency": None, "request_rate": 2.5, "burstiness": 0.5}) == (
        "2.5 requests/s, burstiness 0.5"
    )


def test_tokens_per_chunk_are_shown_beside_itl() -> None:
    """A server that sends several tokens at a time has a longer ITL without being slower."""
    chunks = latency.summarize(run(record(0.0, 1.0, 2.0, tokens=8)), {})
    single = latency.summarize(run(record(0.0, 1.0, 2.0, tokens=2)), {})
    uncounted = latency.summarize(run(record(0.0, 1.0, 2.0)), {})

    def shown(figures: dict[str, Any]) -> tuple[str, bool]:
        lines = list(load_report.lines([figures]))
        [row] = [line for line in lines if line.startswith("ITL")]
        return row.partition(" tokens per chunk")[0].split()[-1], any("compare TPOT" in line for line in lines)

    assert [shown(figures) for figures in (chunks, single, uncounted)] == [
        ("4.00", True),
        ("1.00", False),
        ("?", False),
    ]
    table = list(load_report.lines([chunks, uncounted]))
    assert "tok/chunk" in table[1]
    assert ["4.00" in line for line in table[2:4]] == [True, False]
    assert "note with concurrency 2: a chunk has 4.00 tokens" in table[-1]
