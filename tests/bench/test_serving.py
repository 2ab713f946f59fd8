"""Load tests against a scripted server over real sockets: request counts, failures and messages, but no speeds."""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moesaic import cli
from moesaic.bench import serving, workload
from moesaic.bench.endpoints import RequestOptions, from_url
from moesaic.bench.serving import LoadProfile
from moesaic.bench.sweep import SweepResult, Target, WorkloadSource, sweep
from moesaic.bench.workload import RandomWords, TokenScale
from moesaic.cli.bench_serving import WORKLOADS, without_secrets
from moesaic.errors import InvalidParameter, InvalidRequest, MoesaicError
from tests.support.require import require_package
from tests.support.scripted_server import CONTEXT, TEMPLATE, Script
from tests.support.scripted_server import serving as played

WORDS = RandomWords(20, 9)


def measure(script: Script, *loads: LoadProfile, source: WorkloadSource | None = None, **target: Any) -> SweepResult:
    with played(script):
        return asyncio.run(sweep(Target(script.url, **target), source or WorkloadSource(WORDS), loads))


# arrival times


def test_arrivals_are_drawn_from_the_seed() -> None:
    def times(**more: Any) -> list[float]:
        return LoadProfile(rate=10.0, requests=200, **more).arrivals()

    assert times(seed=1) == times(seed=1) != times(seed=2)
    assert times() == sorted(times()) and len(times()) == 200
    assert times()[-1] == pytest.approx(20)
    assert len({round(after - before, 9) for before, after in pairwise(times())}) > 190


def test_burstiness_spreads_or_evens_out_arrivals() -> None:
    def uneven(burstiness: float) -> float:
        times = [0.0, *LoadProfile(rate=10.0, requests=500, burstiness=burstiness).arrivals()]
        gaps = [after - before for before, after in pairwise(times)]
        return math.sqrt(sum((gap - 0.1) ** 2 for gap in gaps) / len(gaps)) / 0.1

    assert uneven(0.25) == pytest.approx(2, rel=0.3)  # the deviation of a gamma distribution, by its mean
    assert uneven(1) == pytest.approx(1, rel=0.15)
    assert uneven(100) == pytest.approx(0.1, rel=0.15)
    assert uneven(math.inf) == pytest.approx(0, abs=1e-9)


def test_duration_ends_arrivals() -> None:
    times = LoadProfile(rate=10.0, duration=5.0).arrivals()
    assert 0 < len(times) < 100 and max(times) < 5
    assert LoadProfile(rate=10.0, duration=5.0, requests=10**3).arrivals()[-1] < 5
    assert LoadProfile(rate=math.inf, requests=3).arrivals() == [0, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0, "requests": 1},
        {"concurrency": 1},
        {"requests": 1},
        {"concurrency": 1, "rate": 1.0, "requests": 1},
        {"rate": 0.0, "requests": 1},
        {"rate": math.nan, "requests": 1},
        {"rate": math.inf, "duration": 1.0},
        {"concurrency": 1, "duration": -1.0},
        {"concurrency": 1, "requests": 1, "warmup": -1},
        {"concurrency": 1, "requests": 1, "timeout": 0.0},
    ],
)
def test_invalid_loads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        LoadProfile(**wrong)


# workloads


def test_same_seed_gives_same_requests() -> None:
    def first(words: RandomWords, part: str = "0") -> list[Any]:
        requests = words.requests(part)
        return [next(requests) for _ in range(20)]

    words = RandomWords(100, 50, spread=0.2, shared_prefix_tokens=30, seed=1)
    assert first(words) == first(words)
    assert not {ask.prompt for ask in first(words)} & {ask.prompt for ask in first(words, "1")}
    assert len({ask.prompt for ask in first(words)}) == 20
    [prefix] = {tuple(ask.prompt.split()[:30]) for ask in first(words)}
    assert prefix == tuple(first(words, "1")[0].prompt.split()[:30])
    halved = replace(words, scale=TokenScale(2, 3))
    assert {tuple(ask.prompt.split()[:15]) for ask in first(halved)} == {prefix[:15]}
    assert len({ask.prompt.split()[15] for ask in first(halved)}) > 1
    for ask in first(words):
        assert len(ask.prompt.split()) == ask.prompt_tokens and 80 <= (ask.prompt_tokens or 0) <= 120
        assert 40 <= ask.max_tokens <= 60
    assert len({ask.max_tokens for ask in first(words)}) > 5


@pytest.mark.parametrize(
    "wrong",
    [{"prompt_tokens": 0}, {"answer_tokens": 0}, {"spread": 1.0}, {"shared_prefix_tokens": 129}, {"spread": -0.1}],
)
def test_invalid_word_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(wrong))):
        RandomWords(**wrong)


def test_scale_follows_from_two_prompts() -> None:
    scale = TokenScale.from_prompts((40, 83), (240, 483))
    assert (scale.per_word, scale.overhead) == (2, TEMPLATE)
    assert scale.words(128) == 62 and scale.words(1) == 1
    assert TokenScale.from_prompts((40, 5), (240, 5)) == TokenScale()


def test_prompts_have_the_requested_length() -> None:
    result = measure(Script(), LoadProfile(concurrency=2, requests=4), source=WorkloadSource(RandomWords(129, 9)))
    assert result.figures[0]["mean_prompt_tokens"] == result.figures[0]["mean_prompt_tokens_asked"] == 129


def test_server_without_usage_counts_chunks_and_words() -> None:
    [figures] = measure(Script(counts=False), LoadProfile(concurrency=2, requests=4)).figures
    assert (figures["tokens_counted_by"], figures["prompt_tokens_counted_by"]) == ("chunks", "words")
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (80, 20)


def test_aime_workloads() -> None:
    script = Script()
    short = measure(script, LoadProfile(concurrency=1, requests=2), source=WorkloadSource(preset="aime-short"))
    assert {json.dumps(body["messages"]) for _, _, body in script.requests} == {
        json.dumps([{"role": "user", "content": "Tell a long story: Once upon a time"}])
    }
    assert all(body["max_tokens"] == 500 and body["ignore_eos"] for _, _, body in script.requests)
    assert short.about["workload"]["kind"] == "aime-short"
    long = measure(Script(), LoadProfile(concurrency=1, requests=2), source=WorkloadSource(preset="aime-context"))
    assert 0.97 * CONTEXT < long.figures[0]["mean_prompt_tokens"] + 500 <= CONTEXT
    custom = measure(
        Script(), LoadProfile(concurrency=1, requests=1), source=WorkloadSource(preset="aime-context", context=1000)
    )
    assert 460 < custom.figures[0]["mean_prompt_tokens"] <= 500
    with pytest.raises(InvalidRequest, match="--context"):
        measure(
            Script(),
            LoadProfile(concurrency=1, requests=1),
            source=WorkloadSource(preset="aime-context"),
            dialect="aime",
        )
    with pytest.raises(InvalidParameter, match="context"):
        workload.aime_context(510, 0, TokenScale())


def test_dataset_lines_are_sent_in_order(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    lines = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}], "max_tokens": 3}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    script = Script()
    result = measure(
        script, LoadProfile(concurrency=1, requests=3, warmup=0), source=WorkloadSource(WORDS, dataset=file)
    )
    said = [(body["messages"][0]["content"], body["max_tokens"]) for _, _, body in script.requests]
    assert said == [("one", 9), ("two", 3), ("one", 9)]
    assert result.figures[0]["mean_prompt_tokens_asked"] is None
    with pytest.raises(InvalidRequest, match=r"asked.jsonl:2: .*openai-chat"):
        measure(Script(), LoadProfile(concurrency=1, requests=3), source=WorkloadSource(dataset=file), dialect="openai")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "expected"),
        ('{"prompt": ""}', "expected"),
        ('{"prompt": "a", "messages": []}', "expected"),
        ('{"messages": ["a"]}', "expected"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    ],
)
def test_invalid_dataset_lines_are_refused(line: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(InvalidRequest, match=f"a.jsonl:2: .*{why}"):
        workload.read_dataset(tmp_path / "a.jsonl", 9, supports_messages=True)


def test_missing_or_empty_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("missing", "empty"):
        with pytest.raises(InvalidRequest, match=name):
            workload.read_dataset(tmp_path / name, 9, supports_messages=True)


# runs


@pytest.mark.parametrize("dialect", ["openai-chat", "openai", "tgi", "aime"])
def test_closed_loop(dialect: str) -> None:
    result = measure(
        script := Script(pause=0.002),
        LoadProfile(concurrency=3, requests=10),
        dialect=dialect,
        options=RequestOptions(poll=0.001),
        key="secret",
    )
    [run], [figures] = result.runs, result.figures
    assert [record.index for record in run.records] == list(range(10))
    assert all(run.start <= record.start < record.answer.arrivals[0] <= record.end <= run.end for record in run.records)
    assert (figures["completed"], figures["failed"], figures["failures"]) == (10, 0, {})
    assert figures["total_output_tokens"] == 50 and figures["tokens_counted_by"] == "usage"
    assert figures["tokens_per_chunk"] == 1
    assert figures["max_concurrent_requests"] == 3 and script.max_running <= 3
    assert len(script.requests) == 10 + 1 + len(serving.PROBE_WORDS)
    assert result.about["backend"] == dialect and result.about["model_id"] == "tiny"


def test_open_loop_starts_at_the_drawn_times() -> None:
    load = LoadProfile(rate=200.0, requests=20)
    [run] = measure(Script(), load).runs
    assert [record.due for record in run.records] == [run.start + at for at in load.arrivals()]
    assert all(record.start >= (record.due or 0) for record in run.records)
    assert len(run.records) == 20 and not any(record.failure for record in run.records)


def test_infinite_rate_runs_all_requests_at_once() -> None:
    [figures] = measure(Script(pause=0.02), LoadProfile(rate=math.inf, requests=12)).figures
    assert (figures["completed"], figures["max_concurrent_requests"], figures["request_rate"]) == (12, 12, "inf")


def test_duration_lets_running_requests_finish() -> None:
    [run] = measure(Script(pause=0.01), LoadProfile(concurrency=2, duration=0.2)).runs
    assert len(run.records) >= 2 and not any(record.failure for record in run.records)
    assert all(record.start < run.start + 0.2 for record in run.records)


def test_failures_are_counted_by_kind_only() -> None:
    faults = ["", "error", "cut", "refuse", "silent", "stuck", "short", "page", "junk"]
    load = LoadProfile(concurrency=1, requests=11, warmup=0, timeout=1.0)
    result = measure(Script(faults=deque(["", "", *faults])), load)  # the first two are probes
    [run], [figures] = result.runs, result.figures
    kinds = ["error event", "cut stream", "status 429", "no text", "timeout", "cut stream", "bad reply", "bad reply"]
    assert [record.failure for record in run.records] == [None, *kinds, None, None]
    assert figures["failures"] == {kind: kinds.count(kind) for kind in kinds}
    assert (figures["completed"], figures["failed"], figures["num_prompts"]) == (3, 8, 11)
    assert figures["total_output_tokens"] == 15 and figures["total_input_tokens"] == 3 * 19
    assert run.records[3].retry_after == "7" and "too many" in run.records[3].detail
    assert len(run.records[1].answer.arrivals) == 2


def test_failed_first_requests_are_an_error() -> None:
    with pytest.raises(InvalidRequest, match="first request failed: error event: it broke"):
        measure(Script(faults=deque(["error"])), LoadProfile(concurrency=1, requests=1))
    with pytest.raises(InvalidRequest, match="all warm-up requests failed: status 429: too many"):
        measure(Script(faults=deque(["", "", "refuse", "refuse"])), LoadProfile(concurrency=4, requests=1, warmup=2))
    for refused in (["", "", "refuse", ""], ["", "", "refuse"]):  # one answer is enough
        result = measure(Script(faults=deque(refused)), LoadProfile(concurrency=1, requests=1, warmup=2))
        assert result.figures[0]["completed"] == 1


def test_each_load_has_its_own_requests() -> None:
    script = Script()
    result = measure(script, *(LoadProfile(concurrency=users, requests=4, warmup=0) for users in (1, 2, 4)))
    assert [figures["max_concurrency"] for figures in result.figures] == [1, 2, 4]
    assert [figures["completed"] for figures in result.figures] == [4, 4, 4]
    prompts = [body["messages"][0]["content"] for _, _, body in script.requests]
    assert len(set(prompts)) == len(prompts) == 12 + 2


def test_cancelled_sweep_returns_results_so_far() -> None:
    async def interrupt(script: Script) -> SweepResult:
        loads = [LoadProfile(concurrency=2, duration=3600.0), LoadProfile(concurrency=3, requests=1)]
        whole = asyncio.create_task(sweep(Target(script.url), WorkloadSource(WORDS), loads))
        while len(script.requests) < 10:
            await asyncio.sleep(0.01)
        whole.cancel()
        return await whole

    with played(Script(pause=0.01)) as script:
        result = asyncio.run(interrupt(script))
    [run], [figures] = result.runs, result.figures
    assert result.interrupted and figures["interrupted"]
    assert figures["completed"] == len(run.records) > 0 and figures["failed"] == 0


# servers


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host:8000", ("http://host:8000", None)),
        ("http://host:8000/", ("http://host:8000", None)),
        ("https://host/api/v1/", ("https://host/api", None)),
        ("http://host/v1/chat/completions", ("http://host", "openai-chat")),
        ("http://host/v1/completions", ("http://host", "openai")),
        ("http://host/generate_stream", ("http://host", "tgi")),
    ],
)
def test_url_implies_a_dialect(url: str, expected: tuple[str, str | None]) -> None:
    assert from_url(url) == expected


def test_unusable_servers_are_refused() -> None:
    load = LoadProfile(concurrency=1, requests=1)
    for url in ("host:8000", "ftp://host", "http://"):
        with pytest.raises(InvalidParameter, match="http://"):
            asyncio.run(sweep(Target(url), WorkloadSource(), [load]))
    with pytest.raises(InvalidRequest, match="cannot be used: no connection"):
        asyncio.run(sweep(Target("http://127.0.0.1:9"), WorkloadSource(), [load]))
    with pytest.raises(InvalidRequest, match="cannot be used: status 401: invalid API key"):
        measure(Script(key="secret"), load, key="wrong")
    with pytest.raises(InvalidRequest, match="names no model"):
        measure(Script(dialects=()), load, dialect="openai")
    with pytest.raises(InvalidRequest, match="names no endpoint"):
        measure(Script(dialects=()), load, dialect="aime")
    measure(Script(dialects=()), load, dialect="openai", model="tiny")  # asked for by name, it need not be listed


# the command


def command(script: Script, *words: str) -> int:
    return cli.main(["bench", "serving", script.url, *words])


def test_the_command_names_every_workload() -> None:
    assert WORKLOADS == workload.PRESETS


def test_command_prints_a_table_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with played(Script(key="top-secret")) as script:
        out, single = tmp_path / "new" / "a.json", tmp_path / "b.jsonl"
        words = ["--concurrency", "2", "--requests", "6", "--goodput", "ttft=100000,tpot=100000"]
        words += ["--api-key", "top-secret", "--out", str(out), "--requests-out", str(single)]
        assert command(script, *words) == 0
    shown = capsys.readouterr().out
    assert (
        "tiny over openai-chat" in shown and "6 answered, 0 failed" in shown and "TTFT" in shown and "goodput" in shown
    )
    result = json.loads(out.read_text())
    assert "secret" not in out.read_text() and "--api-key ..." in result["command"]
    assert result["completed"] == 6 and result["request_goodput"] == result["request_throughput"]
    assert {"date", "commit", "machine", "versions"} <= result.keys() and "aiohttp" in result["versions"]
    lines = [json.loads(line) for line in single.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert all(line["tokens"] == line["chunks"] == len(line["itl_ms"]) + 1 == 5 for line in lines)


def test_command_with_several_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with played(Script()) as script:
        assert command(script, "--concurrency", "1,2", "--requests", "4", "--requests-out", str(tmp_path / "a")) == 0
        shown = capsys.readouterr().out
        assert "concurrency 1" in shown and "concurrency 2" in shown
        assert command(script, "--request-rate", "100,inf", "--requests", "4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [figures["request_rate"] for figures in result["settings"]] == [100, "inf"]
    assert [json.loads(line)["setting"] for line in (tmp_path / "a").read_text().splitlines()] == [0] * 4 + [1] * 4


def test_failed_request_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with played(Script()) as script:
        words = ["--requests", "3", "--warmup", "0"]
        for more, code in (([], 1), (["--allow-failures"], 0)):
            script.faults = deque(["", "", "cut"])
            assert command(script, *words, *more) == code
            assert "failed: 1 x cut stream" in capsys.readouterr().out
        script.faults = deque(["", "", "cut", "cut", "cut"])
        assert command(script, *words) == 1
    assert "0 answered, 3 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--concurrency", "1,two"], "concurrency"),
        (["--concurrency", "1", "--request-rate", "1"], "--request-rate"),
        (["--burstiness", "2"], "--burstiness"),
        (["--goodput", "ttft=fast"], "goodput"),
        (["--goodput", "speed=1"], "goodput"),
        (["--header", "no colon"], "header"),
        (["--extra-body", "[]"], "extra-body"),
        (["--poll", "0"], "poll"),
        (["--workload", "aime-short", "--answer-tokens", "3"], "--answer-tokens and --workload exclude each other"),
        (["--dataset", "a", "--prompt-tokens", "3"], "--prompt-tokens and --dataset exclude each other"),
        (["--dataset", "a", "--workload", "aime-short"], "--dataset"),
        (["--context", "5"], "--workload aime-context"),
        (["--plot", "a.gif"], "plot"),
        (["--requests", "0"], "requests"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    words: Sequence[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "serving", "http://127.0.0.1:9", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("moesaic: error: ") and why in line


def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_API_KEY", "secret")
    with played(Script(key="secret")) as script:
        assert command(script, "--requests", "1") == 0


def test_records_have_no_secrets() -> None:
    line = "moesaic bench serving http://me:pw@host --api-key a --header 'X: b c' --header=X:d --api-key=e --requests 3"
    shown = "moesaic bench serving http://host --api-key ... --header ... --header=... --api-key=... --requests 3"
    assert without_secrets(line) == shown


def test_missing_aiohttp_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MoesaicError, match=r"moesaic\[bench\]"):
        asyncio.run(sweep(Target("http://127.0.0.1:9"), WorkloadSource(), [LoadProfile(concurrency=1, requests=1)]))


def test_plots_are_written(tmp_path: Path) -> None:
    require_package("matplotlib")
    with played(Script()) as script:
        loads = (["--concurrency", "2"], ["--concurrency", "1,2"], ["--request-rate", "100,inf"])
        for index, load in enumerate(loads):
            file = tmp_path / f"{index}.svg"
            assert command(script, *load, "--requests", "4", "--plot", str(file)) == 0
            assert file.read_text().count("<svg") == 1
