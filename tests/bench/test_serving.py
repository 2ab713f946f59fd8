"""Loads on a real server that plays a script: how many, what failed and how, what was said. No test says how fast."""

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
from moesaic.bench.endpoints import Manner, from_url
from moesaic.bench.serving import Load
from moesaic.bench.sweep import Found, Source, Target, sweep
from moesaic.bench.workload import Scale, Words
from moesaic.cli.bench_serving import WORKLOADS, without_secrets
from moesaic.errors import InvalidParameter, InvalidRequest, MoesaicError
from tests.scripted import CONTEXT, TEMPLATE, Script
from tests.scripted import serving as played

WORDS = Words(20, 9)


def put(script: Script, *loads: Load, source: Source | None = None, **target: Any) -> Found:
    with played(script):
        return asyncio.run(sweep(Target(script.url, **target), source or Source(WORDS), loads))


# when


def test_arrivals_are_drawn_from_the_seed() -> None:
    def times(**more: Any) -> list[float]:
        return Load(rate=10.0, requests=200, **more).arrivals()

    assert times(seed=1) == times(seed=1) != times(seed=2)
    assert times() == sorted(times()) and len(times()) == 200
    assert times()[-1] == pytest.approx(20)
    assert len({round(after - before, 9) for before, after in pairwise(times())}) > 190


def test_burstiness_spreads_or_evens_out_arrivals() -> None:
    def uneven(burstiness: float) -> float:
        times = [0.0, *Load(rate=10.0, requests=500, burstiness=burstiness).arrivals()]
        gaps = [after - before for before, after in pairwise(times)]
        return math.sqrt(sum((gap - 0.1) ** 2 for gap in gaps) / len(gaps)) / 0.1

    assert uneven(0.25) == pytest.approx(2, rel=0.3)  # the deviation of a gamma distribution, by its mean
    assert uneven(1) == pytest.approx(1, rel=0.15)
    assert uneven(100) == pytest.approx(0.1, rel=0.15)
    assert uneven(math.inf) == pytest.approx(0, abs=1e-9)


def test_a_duration_ends_arrivals() -> None:
    times = Load(rate=10.0, duration=5.0).arrivals()
    assert 0 < len(times) < 100 and max(times) < 5
    assert Load(rate=10.0, duration=5.0, requests=10**3).arrivals()[-1] < 5
    assert Load(rate=math.inf, requests=3).arrivals() == [0, 0, 0]


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
def test_loads_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Load(**wrong)


# what


def test_the_same_seed_asks_the_same() -> None:
    def first(words: Words, part: str = "0") -> list[Any]:
        asks = words.asks(part)
        return [next(asks) for _ in range(20)]

    words = Words(100, 50, spread=0.2, shared_prefix_tokens=30, seed=1)
    assert first(words) == first(words)
    assert not {ask.prompt for ask in first(words)} & {ask.prompt for ask in first(words, "1")}
    assert len({ask.prompt for ask in first(words)}) == 20
    [prefix] = {tuple(ask.prompt.split()[:30]) for ask in first(words)}
    assert prefix == tuple(first(words, "1")[0].prompt.split()[:30])
    halved = replace(words, scale=Scale(2, 3))
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
def test_words_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(wrong))):
        Words(**wrong)


def test_words_are_counted_by_the_servers_tokenizer() -> None:
    scale = Scale.through((40, 83), (240, 483))
    assert (scale.per_word, scale.overhead) == (2, TEMPLATE)
    assert scale.words(128) == 62 and scale.words(1) == 1
    assert Scale.through((40, 5), (240, 5)) == Scale()


def test_prompts_are_as_long_as_was_asked_for() -> None:
    found = put(Script(), Load(concurrency=2, requests=4), source=Source(Words(129, 9)))
    assert found.figures[0]["mean_prompt_tokens"] == found.figures[0]["mean_prompt_tokens_asked"] == 129


def test_a_server_that_does_not_count_prompts() -> None:
    [each] = put(Script(counts=False), Load(concurrency=2, requests=4)).figures
    assert (each["tokens_counted_by"], each["prompt_tokens_counted_by"]) == ("chunks", "words")
    assert (each["total_input_tokens"], each["total_output_tokens"]) == (80, 20)


def test_aimes_workloads() -> None:
    script = Script()
    short = put(script, Load(concurrency=1, requests=2), source=Source(preset="aime-short"))
    assert {json.dumps(body["messages"]) for _, _, body in script.asked} == {
        json.dumps([{"role": "user", "content": "Tell a long story: Once upon a time"}])
    }
    assert all(body["max_tokens"] == 500 and body["ignore_eos"] for _, _, body in script.asked)
    assert short.about["workload"]["kind"] == "aime-short"
    whole = put(Script(), Load(concurrency=1, requests=2), source=Source(preset="aime-context"))
    assert 0.97 * CONTEXT < whole.figures[0]["mean_prompt_tokens"] + 500 <= CONTEXT
    given = put(Script(), Load(concurrency=1, requests=1), source=Source(preset="aime-context", context=1000))
    assert 460 < given.figures[0]["mean_prompt_tokens"] <= 500
    with pytest.raises(InvalidRequest, match="--context"):
        put(Script(), Load(concurrency=1, requests=1), source=Source(preset="aime-context"), dialect="aime")
    with pytest.raises(InvalidParameter, match="context"):
        workload.filling(510, 0, Scale())


def test_a_files_lines(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    lines = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}], "max_tokens": 3}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    script = Script()
    found = put(script, Load(concurrency=1, requests=3, warmup=0), source=Source(WORDS, dataset=file))
    said = [(body["messages"][0]["content"], body["max_tokens"]) for _, _, body in script.asked]
    assert said == [("one", 9), ("two", 3), ("one", 9)]
    assert found.figures[0]["mean_prompt_tokens_asked"] is None
    with pytest.raises(InvalidRequest, match=r"asked.jsonl:2: .*openai-chat"):
        put(Script(), Load(concurrency=1, requests=3), source=Source(dataset=file), dialect="openai")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "no JSON"),
        ("[]", "expected"),
        ('{"prompt": ""}', "expected"),
        ('{"prompt": "a", "messages": []}', "expected"),
        ('{"messages": ["a"]}', "expected"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    ],
)
def test_lines_that_are_no_questions(line: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(InvalidRequest, match=f"a.jsonl:2: .*{why}"):
        workload.read(tmp_path / "a.jsonl", 9, chats=True)


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("missing", "empty"):
        with pytest.raises(InvalidRequest, match=name):
            workload.read(tmp_path / name, 9, chats=True)


# what came of it


@pytest.mark.parametrize("dialect", ["openai-chat", "openai", "tgi", "aime"])
def test_a_closed_loop(dialect: str) -> None:
    found = put(
        script := Script(pause=0.002),
        Load(concurrency=3, requests=10),
        dialect=dialect,
        manner=Manner(poll=0.001),
        key="secret",
    )
    [run], [each] = found.runs, found.figures
    assert [record.index for record in run.records] == list(range(10))
    assert all(
        run.began <= record.begun < record.answer.arrivals[0] <= record.ended <= run.ended for record in run.records
    )
    assert (each["completed"], each["failed"], each["failures"]) == (10, 0, {})
    assert each["total_output_tokens"] == 50 and each["tokens_counted_by"] == "usage"
    assert each["tokens_per_chunk"] == 1
    assert each["max_concurrent_requests"] == 3 and script.most <= 3
    assert len(script.asked) == 10 + 1 + len(serving.PROBES)
    assert found.about["backend"] == dialect and found.about["model_id"] == "tiny"


def test_an_open_loop_begins_in_order_at_the_times_drawn() -> None:
    load = Load(rate=200.0, requests=20)
    [run] = put(Script(), load).runs
    assert [record.due for record in run.records] == [run.began + at for at in load.arrivals()]
    assert all(record.begun >= (record.due or 0) for record in run.records)
    assert len(run.records) == 20 and not any(record.failure for record in run.records)


def test_without_a_limit_all_run_at_once() -> None:
    [each] = put(Script(pause=0.02), Load(rate=math.inf, requests=12)).figures
    assert (each["completed"], each["max_concurrent_requests"], each["request_rate"]) == (12, 12, "inf")


def test_a_duration_ends_a_closed_loop_but_no_answer() -> None:
    [run] = put(Script(pause=0.01), Load(concurrency=2, duration=0.2)).runs
    assert len(run.records) >= 2 and not any(record.failure for record in run.records)
    assert all(record.begun < run.began + 0.2 for record in run.records)


def test_failures_are_counted_by_kind_and_nowhere_else() -> None:
    faults = ["", "error", "cut", "refuse", "silent", "stuck", "short", "page", "junk"]
    load = Load(concurrency=1, requests=11, warmup=0, timeout=1.0)
    found = put(Script(faults=deque(["", "", *faults])), load)  # the first two are probes
    [run], [each] = found.runs, found.figures
    kinds = ["error event", "cut stream", "status 429", "no text", "timeout", "cut stream", "bad reply", "bad reply"]
    assert [record.failure for record in run.records] == [None, *kinds, None, None]
    assert each["failures"] == {kind: kinds.count(kind) for kind in kinds}
    assert (each["completed"], each["failed"], each["num_prompts"]) == (3, 8, 11)
    assert each["total_output_tokens"] == 15 and each["total_input_tokens"] == 3 * 19
    assert run.records[3].retry_after == "7" and "too many" in run.records[3].detail
    assert len(run.records[1].answer.arrivals) == 2


def test_nothing_is_measured_if_the_first_requests_fail() -> None:
    with pytest.raises(InvalidRequest, match="first request failed: error event: it broke"):
        put(Script(faults=deque(["error"])), Load(concurrency=1, requests=1))
    with pytest.raises(InvalidRequest, match="no warm-up was answered: status 429: too many"):
        put(Script(faults=deque(["", "", "refuse", "refuse"])), Load(concurrency=4, requests=1, warmup=2))
    for refused in (["", "", "refuse", ""], ["", "", "refuse"]):  # one answer is enough
        found = put(Script(faults=deque(refused)), Load(concurrency=1, requests=1, warmup=2))
        assert found.figures[0]["completed"] == 1


def test_settings_come_one_after_the_other_with_questions_of_their_own() -> None:
    script = Script()
    found = put(script, *(Load(concurrency=users, requests=4, warmup=0) for users in (1, 2, 4)))
    assert [each["max_concurrency"] for each in found.figures] == [1, 2, 4]
    assert [each["completed"] for each in found.figures] == [4, 4, 4]
    prompts = [body["messages"][0]["content"] for _, _, body in script.asked]
    assert len(set(prompts)) == len(prompts) == 12 + 2


def test_interrupted_it_shows_what_there_is() -> None:
    async def interrupt(script: Script) -> Found:
        loads = [Load(concurrency=2, duration=3600.0), Load(concurrency=3, requests=1)]
        whole = asyncio.create_task(sweep(Target(script.url), Source(WORDS), loads))
        while len(script.asked) < 10:
            await asyncio.sleep(0.01)
        whole.cancel()
        return await whole

    with played(Script(pause=0.01)) as script:
        found = asyncio.run(interrupt(script))
    [run], [each] = found.runs, found.figures
    assert found.interrupted and each["interrupted"]
    assert each["completed"] == len(run.records) > 0 and each["failed"] == 0


# who


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
def test_urls(url: str, expected: tuple[str, str | None]) -> None:
    assert from_url(url) == expected


def test_what_cannot_be_asked() -> None:
    load = Load(concurrency=1, requests=1)
    for url in ("host:8000", "ftp://host", "http://"):
        with pytest.raises(InvalidParameter, match="http://"):
            asyncio.run(sweep(Target(url), Source(), [load]))
    with pytest.raises(InvalidRequest, match="cannot be asked: no connection"):
        asyncio.run(sweep(Target("http://127.0.0.1:9"), Source(), [load]))
    with pytest.raises(InvalidRequest, match="cannot be asked: status 401: who are you"):
        put(Script(key="secret"), load, key="wrong")
    with pytest.raises(InvalidRequest, match="names no model"):
        put(Script(speaks=()), load, dialect="openai")
    with pytest.raises(InvalidRequest, match="names no endpoint"):
        put(Script(speaks=()), load, dialect="aime")
    put(Script(speaks=()), load, dialect="openai", model="tiny")  # asked for by name, it need not be listed


# the command


def command(script: Script, *words: str) -> int:
    return cli.main(["bench", "serving", script.url, *words])


def test_the_command_names_every_workload() -> None:
    assert WORKLOADS == workload.PRESETS


def test_a_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with played(Script(key="top-secret")) as script:
        out, single = tmp_path / "new" / "a.json", tmp_path / "b.jsonl"
        words = ["--concurrency", "2", "--requests", "6", "--goodput", "ttft=100000,tpot=100000"]
        words += ["--api-key", "top-secret", "--out", str(out), "--requests-out", str(single)]
        assert command(script, *words) == 0
    shown = capsys.readouterr().out
    assert (
        "tiny over openai-chat" in shown and "6 answered, 0 failed" in shown and "TTFT" in shown and "goodput" in shown
    )
    found = json.loads(out.read_text())
    assert "secret" not in out.read_text() and "--api-key ..." in found["command"]
    assert found["completed"] == 6 and found["request_goodput"] == found["request_throughput"]
    assert {"date", "commit", "machine", "versions"} <= found.keys() and "aiohttp" in found["versions"]
    lines = [json.loads(line) for line in single.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert all(line["tokens"] == line["chunks"] == len(line["itl_ms"]) + 1 == 5 for line in lines)


def test_several_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with played(Script()) as script:
        assert command(script, "--concurrency", "1,2", "--requests", "4", "--requests-out", str(tmp_path / "a")) == 0
        shown = capsys.readouterr().out
        assert "1 at once" in shown and "2 at once" in shown
        assert command(script, "--request-rate", "100,inf", "--requests", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["request_rate"] for each in found["settings"]] == [100, "inf"]
    assert [json.loads(line)["setting"] for line in (tmp_path / "a").read_text().splitlines()] == [0] * 4 + [1] * 4


def test_a_failure_is_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
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
        (["--workload", "aime-short", "--answer-tokens", "3"], "--answer-tokens goes without --workload"),
        (["--dataset", "a", "--prompt-tokens", "3"], "--prompt-tokens goes without --dataset"),
        (["--dataset", "a", "--workload", "aime-short"], "--dataset"),
        (["--context", "5"], "--workload aime-context"),
        (["--plot", "a.gif"], "plot"),
        (["--requests", "0"], "requests"),
    ],
)
def test_wrong_flags_are_one_line(words: Sequence[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serving", "http://127.0.0.1:9", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("moesaic: error: ") and why in line


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_API_KEY", "secret")
    with played(Script(key="secret")) as script:
        assert command(script, "--requests", "1") == 0


def test_secrets_stay_out_of_the_records() -> None:
    line = "moesaic bench serving http://me:pw@host --api-key a --header 'X: b c' --header=X:d --api-key=e --requests 3"
    shown = "moesaic bench serving http://host --api-key ... --header ... --header=... --api-key=... --requests 3"
    assert without_secrets(line) == shown


def test_without_aiohttp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MoesaicError, match=r"moesaic\[bench\]"):
        asyncio.run(sweep(Target("http://127.0.0.1:9"), Source(), [Load(concurrency=1, requests=1)]))


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with played(Script()) as script:
        loads = (["--concurrency", "2"], ["--concurrency", "1,2"], ["--request-rate", "100,inf"])
        for place, load in enumerate(loads):
            file = tmp_path / f"{place}.svg"
            assert command(script, *load, "--requests", "4", "--plot", str(file)) == 0
            assert file.read_text().count("<svg") == 1
