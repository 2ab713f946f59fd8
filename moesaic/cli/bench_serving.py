"""``moesaic bench serving``: a load test of an inference server, Moesaic's or another."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench import endpoints
from moesaic.cli.event_loop import run_async
from moesaic.cli.flags import Commands, add_command, numbers
from moesaic.errors import InvalidParameter, InvalidRequest

if TYPE_CHECKING:
    from moesaic.bench.serving import LoadProfile, Progress
    from moesaic.bench.sweep import SweepResult, Target, WorkloadSource

WORKLOADS = ("aime-short", "aime-context")
SECRET_FLAGS = ("--api-key", "--header")
WORD_FLAGS = ("prompt_tokens", "answer_tokens", "spread", "shared_prefix_tokens")


def add_serving(kinds: Commands) -> None:
    parser = add_command(
        kinds,
        "serving",
        _bench_serving,
        "load-test a server over HTTP: time to first token, speed, failures",
        "It works with any server that speaks one of the dialects. The exit code is 1 if a request failed. Ctrl-C ends "
        "the test and prints the figures so far.",
        "moesaic bench serving http://localhost:8000 --concurrency 1,4,16 --duration 60 --plot load.svg",
        "moesaic bench serving http://localhost:8000 --request-rate 2.5 --requests 200 --goodput ttft=500,tpot=50",
        "moesaic bench serving http://localhost:7777 --dialect aime --model mixtral_chat --workload aime-short",
    )
    parser.add_argument(
        "url", metavar="URL", help="address of the server, such as http://localhost:8000, with or without a route"
    )
    parser.add_argument(
        "--dialect",
        choices=(endpoints.AUTO, *endpoints.names()),
        default=endpoints.AUTO,
        help="API of the server; default: detect it",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="name of the model, or of an AIME API server's endpoint; default: the first model",
    )
    parser.add_argument("--api-key", metavar="KEY", help="API key; default: $MOESAIC_API_KEY")
    parser.add_argument(
        "--header",
        metavar="'NAME: VALUE'",
        action="append",
        default=[],
        help="HTTP header of every request; repeatable",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        metavar="N,...",
        help="concurrent requests: each is followed by another when it is answered (default 1)",
    )
    load.add_argument(
        "--request-rate",
        metavar="R,...",
        help="requests per second that start, regardless of answers; inf: all at once",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        metavar="B",
        help="with --request-rate: 1 is a Poisson process (default), less makes bursts",
    )
    load.add_argument(
        "--requests", type=int, metavar="N", help="number of requests (default: 4 times the concurrency, or 100)"
    )
    load.add_argument("--duration", type=float, metavar="S", help="start no request after this many seconds")
    load.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="requests before the measurement, not counted (default 1)"
    )
    load.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="maximum seconds of a request (default 600)"
    )
    _add_workload(parser)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--goodput",
        metavar="M=MS,...",
        help="count the requests that keep these limits on ttft, tpot and e2el, in milliseconds",
    )
    results.add_argument("--allow-failures", action="store_true", help="exit with code 0 even if requests failed")
    results.add_argument("--json", action="store_true", help="print the figures as JSON")
    results.add_argument("--out", type=Path, metavar="FILE", help="write the figures and their origin to a JSON file")
    results.add_argument("--requests-out", type=Path, metavar="FILE", help="write a JSON line for each request")
    results.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures to an .svg or .png file")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="tokens of a prompt of random words (default 128)"
    )
    workload.add_argument("--answer-tokens", type=int, metavar="N", help="maximum tokens of an answer (default 128)")
    workload.add_argument(
        "--spread", type=float, metavar="S", help="maximum relative difference of lengths from these (default 0)"
    )
    workload.add_argument(
        "--shared-prefix-tokens", type=int, metavar="N", help="tokens at the start that all prompts share (default 0)"
    )
    workload.add_argument(
        "--dataset", type=Path, metavar="FILE", help='JSONL file with {"prompt" or "messages", "max_tokens"?} lines'
    )
    workload.add_argument(
        "--workload",
        choices=WORKLOADS,
        help="a workload of the company AIME: a short prompt or a full context, and 500 tokens",
    )
    workload.add_argument(
        "--context", type=int, metavar="N", help="context length for aime-context; default: what the server announces"
    )
    workload.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of words, lengths and start times (default 0)"
    )
    workload.add_argument("--temperature", type=float, metavar="T", help="default: the server's")
    workload.add_argument(
        "--ignore-eos", action="store_true", help="let no answer end before its maximum length (an extension of vLLM)"
    )
    workload.add_argument("--extra-body", metavar="JSON", help='further fields of every request, such as {"top_k": 40}')
    workload.add_argument(
        "--poll",
        type=float,
        default=0.3,
        metavar="S",
        help="seconds between progress requests to an AIME API server (default 0.3)",
    )


def _bench_serving(args: argparse.Namespace) -> int:
    from moesaic.bench import latency, load_report, plotting, provenance
    from moesaic.bench.sweep import sweep

    loads, slos = _loads(args), latency.parse_goodput(args.goodput)
    if args.plot:
        plotting.check(args.plot)
    result = run_async(sweep(_target(args), _source(args), loads, slos, _progress_line()))
    record = result.record(without_secrets(args.line))
    print(json.dumps(record) if args.json else "\n".join(_lines(result)))
    if args.out:
        provenance.write(args.out, record)
    if args.requests_out:
        _write_requests(args.requests_out, result)
    if args.plot:
        title = f"{result.about['model_id']} over {result.about['backend']}"
        caption = f"client: {record['machine']['cpu']}, {record['date']}, commit {record['commit']}"
        load_report.plot(result.runs, result.figures, args.plot, title, caption)
    if result.interrupted:
        return 130
    return 1 if result.failed and not args.allow_failures else 0


def _loads(args: argparse.Namespace) -> list[LoadProfile]:
    """Return the loads to measure: one for each value of --concurrency or --request-rate."""
    from moesaic.bench.serving import LoadProfile

    rates = numbers("request-rate", args.request_rate, float)
    users = numbers("concurrency", args.concurrency, int) or ([] if rates else [1])
    if rates and users:
        raise InvalidRequest("--concurrency and --request-rate exclude each other")
    if args.burstiness is not None and not rates:
        raise InvalidRequest("--burstiness requires --request-rate")

    def load(concurrency: int | None, rate: float | None) -> LoadProfile:
        default = None if args.duration is not None else 4 * concurrency if concurrency else 100
        return LoadProfile(
            concurrency=concurrency,
            rate=rate,
            burstiness=1.0 if args.burstiness is None else args.burstiness,
            requests=default if args.requests is None else args.requests,
            duration=args.duration,
            warmup=args.warmup,
            timeout=args.timeout,
            seed=args.seed,
        )

    return [load(concurrency, None) for concurrency in users] + [load(None, rate) for rate in rates]


def _target(args: argparse.Namespace) -> Target:
    from moesaic.bench.endpoints import RequestOptions
    from moesaic.bench.sweep import Target

    try:
        extra = json.loads(args.extra_body or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise InvalidParameter("extra-body", f"is {args.extra_body!r}, expected a JSON object")
    if args.poll <= 0:
        raise InvalidParameter("poll", f"is {args.poll}, expected more than 0")
    headers = {}
    for header in args.header:
        name, colon, value = header.partition(":")
        if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name) or re.search(r"[\r\n]", value):
            raise InvalidParameter("header", "expected 'Name: value'")  # the value may be secret, so it is not shown
        headers[name] = value.strip()
    options = RequestOptions(args.temperature, args.ignore_eos, extra, args.poll)
    key = args.api_key or os.environ.get("MOESAIC_API_KEY") or None
    return Target(args.url, args.dialect, args.model, key, headers, options)


def _source(args: argparse.Namespace) -> WorkloadSource:
    from moesaic.bench.sweep import WorkloadSource
    from moesaic.bench.workload import RandomWords

    words = {name: getattr(args, name) for name in WORD_FLAGS if getattr(args, name) is not None}
    other = "--workload" if args.workload else "--dataset" if args.dataset else None
    for name in words:
        if other and (name != "answer_tokens" or args.workload):
            raise InvalidRequest(f"--{name.replace('_', '-')} and {other} exclude each other")
    return WorkloadSource(RandomWords(**words, seed=args.seed), args.workload, args.dataset, args.context)


def _progress_line() -> Any:
    """Return a callback that shows the progress in one line; None if standard error is not a terminal.

    A progress bar would need a thread, which would delay the client.
    """
    if not sys.stderr.isatty():
        return None

    def show(load: LoadProfile, progress: Progress) -> None:
        total = f" of {progress.total}" if progress.total else ""
        name = f"concurrency {load.concurrency}" if load.concurrency else f"{load.rate:g} requests/s"
        text = f"{name}: {progress.done}{total} done, {progress.running} running, {progress.failed} failed"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    return show


def _lines(result: SweepResult) -> list[str]:
    from moesaic.bench import load_report
    from moesaic.console.visible import one_line

    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    about = result.about
    head = one_line(f"{about['model_id']} over {about['backend']}, workload {about['workload']['kind']}")
    return [head, *load_report.lines(result.figures)]


def _write_requests(path: Path, result: SweepResult) -> None:
    from moesaic.bench import latency

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, run in enumerate(result.runs):
            for record in run.records:
                file.write(json.dumps({"setting": number} | latency.request_row(record, run)) + "\n")


def without_secrets(line: str) -> str:
    """Return a command line with API keys, headers and passwords removed, for records."""
    words = shlex.split(line)
    for index, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in SECRET_FLAGS and equals:
            words[index] = f"{flag}=..."
        elif flag in SECRET_FLAGS and index + 1 < len(words):
            words[index + 1] = "..."
        words[index] = re.sub(r"^(https?://)[^/@]+@", r"\1", words[index])
    return shlex.join(words)
