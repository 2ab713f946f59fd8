"""Tests of ``moesaic run-batch``: each request of a file gets one result, across restarts and kills."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from moesaic import cli
from moesaic.errors import InvalidRequest, Overloaded
from moesaic.serve import batch_file
from moesaic.serve.app import App
from moesaic.serve.settings import Settings
from tests.support.backend import Script, ScriptedBackend
from tests.support.wait import eventually

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def line(custom_id, body=CHAT, url="/v1/chat/completions", **more) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | more)


def write(path, *lines) -> None:
    path.write_text("".join(f"{entry}\n" for entry in lines))


def results(path) -> list[dict]:
    return [json.loads(entry) for entry in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(files, make_backend=ScriptedBackend, **options):
    """Answer the requests of ``files[0]`` into ``files[1]``; return the counts and the backend."""

    async def main():
        instance = make_backend()
        app = App(instance, Settings(request_seconds=0, queue_seconds=0))
        return await batch_file.run(app, *files, **options), instance

    return asyncio.run(main())


def test_every_request_is_answered(files):
    write(
        files[0],
        line("chat"),
        line("text", {"prompt": ["a", "b"], "max_tokens": 2}, "/v1/completions"),
        line("vector", {"input": "x"}, "/v1/embeddings"),
        "",
        line("class", {"input": "x"}, "/v1/classify"),
        line("unknown model", CHAT | {"model": "none"}),
        line("unknown route", {}, "/v1/nothing"),
        line("wrong", CHAT | {"temperature": -1}),
    )
    seen = []
    count, _ = run(files, progress=lambda done, total: seen.append((done, total)))
    assert (count.answered, count.failed, count.skipped) == (4, 3, 0)
    assert seen[0] == (0, 7) and seen[-1] == (7, 7)
    entries = {entry["custom_id"]: entry for entry in results(files[1])}
    assert len(entries) == 7
    assert all(entry.keys() == {"id", "custom_id", "response", "error"} for entry in entries.values())
    assert entries["chat"]["response"]["body"]["choices"][0]["message"]["content"] == "Hello, world!"
    assert len(entries["text"]["response"]["body"]["choices"]) == 2
    assert entries["vector"]["response"]["body"]["data"][0]["embedding"] == [1.0, 0.0, 0.0]
    statuses = [
        entries[name]["response"]["status_code"] for name in ("class", "unknown model", "unknown route", "wrong")
    ]
    assert statuses == [200, 404, 404, 400]
    assert entries["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert len({entry["response"]["request_id"] for entry in entries.values()}) == 7


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        (line(7), "custom_id"),
        (line(""), "custom_id"),
        (line("x", [], "/v1/embeddings"), "body"),
        (line("x", method="GET"), "method"),
        (line("x", url="http://evil.example/"), "url"),
        (line("x", CHAT | {"stream": True}), "stream"),
        (line("x")[:-1] + ', "custom_id": "y"}', "twice"),
        (line("x").replace('"Hi"', "NaN"), "NaN"),
        ('{"custom_id": "x"}', "missing"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(files, bad, why):
    write(files[0], line("a"), bad, line("b"))
    count, backend = run(files)
    assert (count.answered, count.failed) == (2, 1) and len(backend.requests) == 2
    [failure] = [entry for entry in results(files[1]) if entry["error"]]
    assert failure["custom_id"] is None and failure["response"] is None
    assert (
        failure["error"]["line"] == 2 and why in failure["error"]["message"] and "line 2" in failure["error"]["message"]
    )
    again, backend = run(files)
    assert (again.answered, again.failed, again.skipped, len(backend.requests)) == (2, 1, 3, 0)
    assert len(results(files[1])) == 3


def test_a_repeated_custom_id_is_an_error(files):
    write(files[0], line("a"), line("b"), line("a"))
    count, backend = run(files, concurrency=1)
    assert (count.answered, count.failed, len(backend.requests)) == (2, 1, 2)
    assert "already used in line 1" in next(entry["error"] for entry in results(files[1]) if entry["error"])["message"]
    assert run(files)[0].skipped == 3


def test_a_restart_skips_results_and_drops_a_torn_line(files):
    write(files[0], *[line(f"r{n}") for n in range(6)])
    run(files)
    whole = files[1].read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (b"", lines[3][:1], lines[3][:-1], b'{"id": "x\xff'):
        files[1].write_bytes(b"".join(lines[:3]) + cut)
        count, backend = run(files)
        assert (count.answered, count.skipped, len(backend.requests)) == (6, 3, 3)
        assert sorted(entry["custom_id"] for entry in results(files[1])) == [f"r{n}" for n in range(6)]


def test_an_unrelated_output_file_is_not_overwritten(files):
    write(files[0], line("a"))
    for content in (b"some notes\n", b"{}\n", b"[]\n", files[0].read_bytes()):
        files[1].write_bytes(content)
        with pytest.raises(InvalidRequest, match=r"out\.jsonl:1"):
            run(files)
        assert files[1].read_bytes() == content
    with pytest.raises(InvalidRequest, match="cannot go into the file of requests"):
        run((files[0], files[0]))
    with pytest.raises(InvalidRequest, match="No such file"):
        run((files[0].with_name("none"), files[1]))


def test_concurrency_is_limited(files):
    write(files[0], *[line(f"r{n}") for n in range(20)])
    running = peak = 0

    class CountingBackend(ScriptedBackend):
        async def generate(self, request):
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0)
            stream = await super().generate(request)
            running -= 1
            return stream

    run(files, CountingBackend, concurrency=5)
    assert peak == 5


def test_requests_are_retried_while_the_queue_is_full(files, monkeypatch):
    write(files[0], line("a"))
    waited = []

    async def record_sleep(seconds):
        waited.append(seconds)

    class FullBackend(ScriptedBackend):
        async def generate(self, request):
            self.script = Script(refusal=Overloaded("full") if len(self.requests) < 3 else None)
            return await super().generate(request)

    monkeypatch.setattr(batch_file.asyncio, "sleep", record_sleep)
    count, _ = run(files, FullBackend)
    assert count.answered == 1 and waited[:3] == [1.0, 1.0, 1.0]


def test_the_output_file_is_locked(files):
    pytest.importorskip("fcntl")
    write(files[0], line("a"))
    with files[1].open("ab+", buffering=0) as other:
        batch_file._lock(other, files[1])
        with pytest.raises(InvalidRequest, match="another process"):
            run(files)


PROGRAM = """
import asyncio, sys
from moesaic import cli
from moesaic.cli import serving
from tests.support.backend import Script, ScriptedBackend

async def open_model(*_):
    return ScriptedBackend(Script(pieces=("word",) * 4, pause=0.01))

serving.open_model = open_model
sys.exit(cli.main(["run-batch", *sys.argv[1:]]))
"""


def test_killed_runs_answer_every_request_once(files):
    count = 60
    write(files[0], *[line(f"r{n}") for n in range(count)], "no request")
    command = [sys.executable, "-c", PROGRAM, str(files[0]), str(files[1]), "tales", "--concurrency", "3"]
    kills = 0
    while True:
        lines_before = files[1].read_bytes().count(b"\n") if files[1].exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if kills < 3:
            eventually(lambda: files[1].exists() and files[1].read_bytes().count(b"\n") >= lines_before + 8)  # noqa: B023
            process.kill()
            process.communicate()
            kills += 1
            with files[1].open("ab") as torn:
                torn.write(b'{"id": "batch_req_1", "custom_id": "r59", "respon')
            continue
        _, err = process.communicate(timeout=60)
        break
    assert process.returncode == 1, err
    assert f"{count} answered, 1 failed" in err
    custom_ids = [entry["custom_id"] for entry in results(files[1])]
    assert sorted(filter(None, custom_ids)) == sorted(f"r{n}" for n in range(count)) and len(custom_ids) == count + 1


def test_with_a_real_model(files, capsys):
    text = {"prompt": "Once upon", "max_tokens": 4, "temperature": 0}
    write(files[0], line("a", text, "/v1/completions"), line("b", CHAT | {"max_tokens": 3}))
    assert cli.main(["run-batch", str(files[0]), str(files[1]), "tales", "--concurrency", "2"]) == 0
    assert "2 answered, 0 failed" in capsys.readouterr().err
    [entry] = [entry for entry in results(files[1]) if entry["custom_id"] == "a"]
    assert entry["response"]["body"]["choices"][0]["text"].startswith(" a")
    assert cli.main(["run-batch", str(files[0]), str(files[1]), "tales"]) == 0
    assert "2 of them before" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["none.jsonl", "out.jsonl"], ["--concurrency", "0", __file__, "out.jsonl"]])
def test_invalid_arguments_print_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run-batch", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
