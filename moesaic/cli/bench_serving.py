"""The subcommand ``bench serving``: a load on a server, ours or another's."""

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
from moesaic.cli.flags import Commands, add_command
from moesaic.errors import InvalidParameter, InvalidRequest

if TYPE_CHECKING:
    from moesaic.bench.serving import Load, Standing
    from moesaic.bench.sweep import Found, Source, Target

WORKLOADS = ("aime-short", "aime-context")
SECRET = ("--api-key", "--header")
WORDS = ("prompt_tokens", "answer_tokens", "spread", "shared_prefix_tokens")


def add_serving(kinds: Commands) -> None:
    parser = add_command(
        kinds,
        "serving",
        _bench_serving,
        "a load on a server over HTTP: time to first token, speed, failures",
        "Any server\nthat speaks one of the dialects. Exit status 1: a request failed. "
        "Ctrl-C ends it, with the\nfigures so far.",
        "moesaic bench serving http://localhost:8000 --concurrency 1,4,16 --duration 60 --plot load.svg",
        "moesaic bench serving http://localhost:8000 --request-rate 2.5 --requests 200 --goodput ttft=500,tpot=50",
        "moesaic bench serving http://localhost:7777 --dialect aime --model mixtral_chat --workload aime-short",
    )
    parser.add_argument(
        "url", metavar="URL", help="its root, such as http://localhost:8000; a path of a dialect will do"
    )
    parser.add_argument("--dialect", choices=("auto", *endpoints.names()), default="auto", help="default: what the server knows")
    parser.add_argument("--model", metavar="NAME", help="default: the server's first; of AIME's the endpoint")
    parser.add_argument("--api-key", metavar="KEY", help="default: $MOESAIC_API_KEY")
    parser.add_argument(
        "--header", metavar="'NAME: VALUE'", action="append", default=[], help="send it with everything"
    )
    when = parser.add_argument_group("load")
    when.add_argument(
        "--concurrency", metavar="N,...", help="so many at once, each asks again when answered (default 1)"
    )
    when.add_argument("--request-rate", metavar="R,...", help="so many begin each second, whatever becomes of them")
    when.add_argument("--burstiness", type=float, metavar="B", help="of a rate: 1 Poisson (default), less: bursts")
    when.add_argument(
        "--requests", type=int, metavar="N", help="end after so many (default 4 for each at once, or 100)"
    )
    when.add_argument("--duration", type=float, metavar="S", help="begin none after so many seconds")
    when.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before, not counted (default 1)")
    when.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for each request (default 600)")
    _add_questions(parser)
    out = parser.add_argument_group("results")
    out.add_argument("--goodput", metavar="M=MS,...", help="count requests that keep to ttft, tpot, e2el, in ms")
    out.add_argument("--allow-failures", action="store_true", help="exit with 0 although requests failed")
    out.add_argument("--json", action="store_true", help="print the figures as JSON")
    out.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, with their origin, as JSON")
    out.add_argument("--requests-out", type=Path, metavar="FILE", help="write a line of JSON for each request")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .svg or .png")


def _add_questions(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("questions")
    what.add_argument("--prompt-tokens", type=int, metavar="N", help="of random words (default 128)")
    what.add_argument("--answer-tokens", type=int, metavar="N", help="at most so many (default 128)")
    what.add_argument("--spread", type=float, metavar="S", help="lengths differ by this share, +- (default 0)")
    what.add_argument("--shared-prefix-tokens", type=int, metavar="N", help="of a prompt, the same for all (default 0)")
    what.add_argument("--dataset", type=Path, metavar="FILE", help='JSONL of {"prompt" or "messages", "max_tokens"?}')
    what.add_argument("--workload", choices=WORKLOADS, help="AIME's: a short or a full context, 500 tokens generated")
    what.add_argument("--context", type=int, metavar="N", help="for aime-context; default: what the server says")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of words, lengths and arrivals (default 0)")
    what.add_argument("--temperature", type=float, metavar="T", help="default: the server's")
    what.add_argument("--ignore-eos", action="store_true", help="no answer ends early (vLLM's extra)")
    what.add_argument("--extra-body", metavar="JSON", help='what else is sent, such as {"top_k": 40}')
    what.add_argument("--poll", type=float, default=0.3, metavar="S", help="of AIME: how often to ask (default 0.3)")


def _bench_serving(args: argparse.Namespace) -> int:
    from moesaic.bench import latency, load_report, plotting, report
    from moesaic.bench.sweep import sweep

    loads, promised = _loads(args), latency.promises(args.goodput)
    if args.plot:
        plotting.check(args.plot)
    found = run_async(sweep(_target(args), _source(args), loads, promised, _watch()))
    record = found.record(without_secrets(args.line))
    print(json.dumps(record) if args.json else "\n".join(_lines(found)))
    if args.out:
        report.write(args.out, record)
    if args.requests_out:
        _write_requests(args.requests_out, found)
    if args.plot:
        title = f"{found.about['model_id']} over {found.about['backend']}"
        caption = f"client: {record['machine']['cpu']}, {record['date']}, commit {record['commit']}"
        load_report.plot(found.runs, found.figures, args.plot, title, caption)
    if found.interrupted:
        return 130
    return 1 if found.failed and not args.allow_failures else 0


def _loads(args: argparse.Namespace) -> list[Load]:
    """Return what is to be measured, one load for each value of a list."""
    from moesaic.bench.serving import Load

    rates = _numbers("request-rate", args.request_rate, float)
    users = _numbers("concurrency", args.concurrency, int) or ([] if rates else [1])
    if rates and users:
        raise InvalidRequest("--concurrency goes without --request-rate: either so many at once, or so many a second")
    if args.burstiness is not None and not rates:
        raise InvalidRequest("--burstiness goes with --request-rate")

    def load(concurrency: int | None, rate: float | None) -> Load:
        default = None if args.duration is not None else 4 * concurrency if concurrency else 100
        return Load(
            concurrency=concurrency,
            rate=rate,
            burstiness=1.0 if args.burstiness is None else args.burstiness,
            requests=default if args.requests is None else args.requests,
            duration=args.duration,
            warmup=args.warmup,
            timeout=args.timeout,
            seed=args.seed,
        )

    return [load(each, None) for each in users] + [load(None, each) for each in rates]


def _numbers(name: str, text: str | None, kind: type[Any]) -> list[Any]:
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidParameter(name, f"{text!r} is not a list of numbers such as 1,4,16") from error


def _target(args: argparse.Namespace) -> Target:
    from moesaic.bench.endpoints import Manner
    from moesaic.bench.sweep import Target

    try:
        extra = json.loads(args.extra_body or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise InvalidParameter("extra-body", f"{args.extra_body!r} is no JSON object")
    if args.poll <= 0:
        raise InvalidParameter("poll", f"is {args.poll}, expected more than 0")
    headers = {}
    for header in args.header:
        name, colon, value = header.partition(":")
        if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name) or re.search(r"[\r\n]", value):
            raise InvalidParameter("header", "is not as in 'Name: value'")  # not shown: it may be secret
        headers[name] = value.strip()
    manner = Manner(args.temperature, args.ignore_eos, extra, args.poll)
    key = args.api_key or os.environ.get("MOESAIC_API_KEY") or None
    return Target(args.url, args.dialect, args.model, key, headers, manner)


def _source(args: argparse.Namespace) -> Source:
    from moesaic.bench.sweep import Source
    from moesaic.bench.workload import Words

    given = {name: getattr(args, name) for name in WORDS if getattr(args, name) is not None}
    other = "--workload" if args.workload else "--dataset" if args.dataset else None
    for name in given:
        if other and (name != "answer_tokens" or args.workload):
            raise InvalidRequest(f"--{name.replace('_', '-')} goes without {other}, which says it already")
    return Source(Words(**given, seed=args.seed), args.workload, args.dataset, args.context)


def _watch() -> Any:
    """Return what shows how far a run is, in one line on a terminal; None without one.

    No bar: what draws one has a thread of its own, for which the client would have to wait.
    """
    if not sys.stderr.isatty():
        return None

    def show(load: Load, standing: Standing) -> None:
        of = f" of {standing.total}" if standing.total else ""
        what = f"{load.concurrency} at once" if load.concurrency else f"{load.rate:g} a second"
        text = f"{what}: {standing.done}{of} done, {standing.running} running, {standing.failed} failed"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    return show


def _lines(found: Found) -> list[str]:
    from moesaic.bench import load_report
    from moesaic.console.visible import one_line

    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    about = found.about
    head = one_line(f"{about['model_id']} over {about['backend']}, workload {about['workload']['kind']}")
    return [head, *load_report.lines(found.figures)]


def _write_requests(path: Path, found: Found) -> None:
    from moesaic.bench import latency

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, run in enumerate(found.runs):
            for record in run.records:
                file.write(json.dumps({"setting": number} | latency.single(record, run)) + "\n")


def without_secrets(line: str) -> str:
    """Return a command line for the records, without keys."""
    words = shlex.split(line)
    for place, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in SECRET and equals:
            words[place] = f"{flag}=..."
        elif flag in SECRET and place + 1 < len(words):
            words[place + 1] = "..."
        words[place] = re.sub(r"^(https?://)[^/@]+@", r"\1", words[place])
    return shlex.join(words)
