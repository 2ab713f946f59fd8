"""The subcommands that measure: ``perplexity`` and ``bench``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from moesaic.cli.flags import CACHE_DTYPES, DTYPES, Commands, add_command, add_model, folder
from moesaic.cli.load import add_serving
from moesaic.errors import InvalidRequest

GEOMETRIES = ("mixtral-8x7b", "mixtral-8x22b", "mistral-7b", "llama-3-8b", "llama-3-70b")

# perplexity


def add_perplexity(commands: Commands) -> None:
    parser = add_command(
        commands,
        "perplexity",
        _perplexity,
        "measure how well a model predicts a text",
        "Prints perplexity per token\n"
        "and bits per byte. Each document is read in windows that do not overlap.\n"
        "With --format more than once, a table: what each format costs, beside the first.",
        "moesaic perplexity held-out.jsonl.xz ./model --format q4",
        "moesaic perplexity held-out.jsonl.xz ./model --format bfloat16 --format int4 --format experts=int2,head=int8",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help='.txt, or .jsonl or .jsonl.xz with a "text" per line')
    add_model(parser, formats=True)
    parser.add_argument(
        "--kv-cache-dtype", choices=CACHE_DTYPES, help="read keys and values from a cache; default: none"
    )
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in a window (default 512)")
    parser.add_argument("--json", action="store_true", help="as a JSON object, or with several formats a list of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, with their origin, as JSON")


def _perplexity(args: argparse.Namespace) -> int:
    from moesaic import models
    from moesaic.bench import quality, report
    from moesaic.console.progress import bar
    from moesaic.llm import BUILT_IN
    from moesaic.loading import cache_dtype, load_model
    from moesaic.text.tokenizer import Tokenizer

    for format in args.format or []:
        models.choose(format, "float32")  # all of them before the first is measured
    texts = quality.read_texts(args.file)
    path = folder(args.model) or BUILT_IN
    tokenizer, rows = Tokenizer.open(path), []
    for format in args.format or [None]:
        with bar("loading") as progress:
            loaded = load_model(path, dtype=args.dtype, weight_format=format, device=args.device, progress=progress)
        cache = cache_dtype(loaded.model, args.kv_cache_dtype) if args.kv_cache_dtype else None
        with bar("documents", count=True) as progress:
            found = quality.perplexity(loaded, tokenizer, texts, args.length, progress, cache)
        rows.append(quality.row(format, loaded, found, args.length))
        del loaded  # before the next one needs the memory
    if args.out:
        report.write(args.out, report.record(args.line, {"formats": rows}))
    print(json.dumps(rows if len(rows) > 1 else rows[0]) if args.json else "\n".join(quality.lines(rows)))
    return 0


# bench


def add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine and this build",
        description="Measure this machine and this build, or a server. Leave the machine alone meanwhile.",
        epilog="examples:\n  moesaic bench kernels --format int4\n  moesaic bench offline ./mixtral --format q4\n"
        "  moesaic bench serving http://localhost:8000 --concurrency 1,4,16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds: Commands = parser.add_subparsers(metavar="WHAT", required=True)
    kernels = add_command(
        kinds,
        "kernels",
        _bench_kernels,
        "the CPU kernels, op by op",
        "Speeds of Mixtral's shapes, beside\n"
        "the machine's read bandwidth and its fastest multiplication of bytes, measured first.",
        "moesaic bench kernels",
        "moesaic bench kernels --format int4,int2 --out kernels.json",
    )
    kernels.add_argument("--format", metavar="F,...", default="bfloat16,int8,int4,int3,int2", help="which formats")
    kernels.add_argument("--threads", type=int, metavar="N", help="default: as many as there are cores")
    kernels.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each figure (default 1)")
    kernels.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")
    peers = add_command(
        kinds,
        "peers",
        _bench_peers,
        "this engine beside llama.cpp, vLLM and transformers",
        "All run one random model with\n"
        "Mixtral's dimensions and two layers, in turn. docs/how-to/benchmark.md says how to install them.",
        "moesaic bench peers --only moesaic:q4,moesaic_llm:q4,transformers",
        "moesaic bench peers --python llama_cpp=./llama/bin/python --plot peers.svg --out peers.json",
    )
    peers.add_argument("--only", metavar="P[:F],...", help="these peers, or these formats of them; default: all")
    peers.add_argument(
        "--python", metavar="P=FILE", action="append", default=[], help="the interpreter that has a peer"
    )
    peers.add_argument("--work", type=Path, metavar="DIR", help="for the model's files, 30 GB; default: in the cache")
    peers.add_argument("--rounds", type=int, default=3, metavar="N", help="of everything, interleaved (default 3)")
    peers.add_argument("--threads", type=int, metavar="N", help="default: as many as there are cores")
    peers.add_argument("--busy", action="store_true", help="some cells also while another process keeps a core busy")
    peers.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")
    peers.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .svg or .png")
    offline = add_command(
        kinds,
        "offline",
        _bench_offline,
        "a whole model through the engine: speed and memory",
        "Of a model folder, or with --geometry of\n"
        "a published model's sizes, with random weights that are made in place in the packed format.",
        "moesaic bench offline --geometry mixtral-8x7b --format q2",
        "moesaic bench offline ./mixtral-q4 --batch 8 --out offline.json",
    )
    offline.add_argument("model", metavar="MODEL", nargs="?", help="as for chat")
    offline.add_argument("--geometry", metavar="NAME", help=", ".join(GEOMETRIES))
    offline.add_argument("--layers", type=int, metavar="N", help="with --geometry: only so many layers")
    offline.add_argument("--packed", type=Path, metavar="DIR", help="with --geometry: make it on disk, and map it")
    offline.add_argument("--format", metavar="F", help="quantize, as for chat")
    offline.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored; of a geometry bfloat16")
    offline.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="default: that of activations")
    offline.add_argument("--context", type=int, metavar="N", help="tokens that the cache holds (default 8192)")
    offline.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of a prompt (default 512)")
    offline.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default 64)")
    offline.add_argument("--batch", type=int, default=1, metavar="N", help="answers at once (default 1)")
    offline.add_argument("--out", type=Path, metavar="FILE", help="write the figures there")
    add_serving(kinds)


def _bench_kernels(args: argparse.Namespace) -> int:
    from moesaic.bench import kernels, limits, report
    from moesaic.formats import load
    from moesaic.ops import native

    names = args.format.split(",")
    for name in names:
        load(name)
        if why := native.why_not("linear", "cpu", name):
            raise InvalidRequest(f"there is nothing to measure: {why}")
    if args.threads is not None:
        native.set_threads(args.threads)
    found = limits.measure(report=lambda line: print(line, flush=True))
    rows = []
    for row in chain(kernels.measure(found, names, seconds=args.seconds), kernels.measure_others(found, args.seconds)):
        rows.append(row)
        print(kernels.line(row), flush=True)
    if args.out:
        report.write(args.out, report.record(args.line, kernels.figures(found, rows)))
    return 0


def _bench_peers(args: argparse.Namespace) -> int:
    from moesaic import pull
    from moesaic.bench import chart, compare, limits, plotting, report
    from moesaic.ops import native

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    pairs, pythons = compare.choose(args.only), compare.interpreters(args.python)
    plan = compare.Plan(rounds=args.rounds, busy=args.busy)
    if args.threads is not None:
        plan = replace(plan, threads=args.threads)
    if args.plot:
        plotting.check(args.plot)
    most = partial(limits.measure, report=say) if native.why_not("linear", "cpu", "int4") is None else None
    work = args.work or pull.cache_folder() / "bench"
    found = compare.compare(pairs, work, plan=plan, pythons=pythons, limits=most, report=say)
    print("\n".join(chart.tables(found)))
    record = report.record(args.line, found.figures())
    if args.out:
        report.write(args.out, record)
    if args.plot:
        chart.plot(found, args.plot, f"{record['machine']['cpu']}, {record['date']}, commit {record['commit']}")
    return 2 if found.failed else 0


def _bench_offline(args: argparse.Namespace) -> int:
    from moesaic.bench import offline, report
    from moesaic.console.progress import bar

    work = offline.Work(args.prompt, args.tokens, args.batch)
    wish = offline.Wish(
        args.geometry, args.layers, args.format, args.dtype, args.context, args.packed, args.kv_cache_dtype
    )
    if args.geometry and args.model:
        raise InvalidRequest("--geometry goes without MODEL: it is a model of random weights")
    path = None if args.geometry else folder(args.model)
    with bar("loading") as progress:
        figures = offline.run(path, wish, work, lambda line: print(line, file=sys.stderr), progress)
    print("\n".join(offline.lines(figures)))
    if args.out:
        report.write(args.out, report.record(args.line, figures))
    return 0
