"""``moesaic bench``: measurements of speed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from moesaic.cli.bench_serving import add_serving
from moesaic.cli.flags import (
    MODEL_HELP,
    Commands,
    add_command,
    add_model,
    add_requantize,
    add_show_plan,
    folder,
    load_options,
    numbers,
    show_plan,
)
from moesaic.errors import InvalidParameter, InvalidRequest
from moesaic.load_options import CACHE_DTYPES, DTYPES
from moesaic.published import CONFIGURATIONS

START_MODES = ("chat", "serve")


def add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="benchmark the kernels, the engine or a server",
        description="Benchmark the kernels, the engine or a server. Run benchmarks on an otherwise idle machine.",
        epilog="examples:\n  moesaic bench kernels --format int4\n  moesaic bench offline ./mixtral --format q4\n"
        "  moesaic bench serving http://localhost:8000 --concurrency 1,4,16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds: Commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for add in (_add_kernels, _add_peers, _add_offline, add_serving, _add_startup, _add_report):
        add(kinds)


def _add_kernels(kinds: Commands) -> None:
    kernels = add_command(
        kinds,
        "kernels",
        _bench_kernels,
        "measure the CPU kernels, op by op",
        "It measures the machine's memory bandwidth and its fastest multiplication first, then each op at the sizes of "
        "Mixtral, and compares the two.",
        "moesaic bench kernels",
        "moesaic bench kernels --format int4,int2 --out kernels.json",
    )
    kernels.add_argument("--format", metavar="F,...", default="bfloat16,int8,int4,int3,int2", help="weight formats")
    _add_instruction_set(kernels)
    kernels.add_argument("--threads", type=int, metavar="N", help="number of threads; default: the number of cores")
    kernels.add_argument("--seconds", type=float, default=1.0, metavar="S", help="seconds per figure (default 1)")
    kernels.add_argument("--out", type=Path, metavar="FILE", help="write the figures to a JSON file")


def _add_peers(kinds: Commands) -> None:
    peers = add_command(
        kinds,
        "peers",
        _bench_peers,
        "compare this engine with llama.cpp, vLLM and transformers",
        "All engines take turns with one model: random weights, Mixtral's dimensions, two layers. "
        "docs/how-to/benchmark.md explains how to install the engines.",
        "moesaic bench peers --only moesaic:q4,moesaic_llm:q4,transformers",
        "moesaic bench peers --python llama_cpp=./llama/bin/python --plot peers.svg --out peers.json",
        "moesaic bench peers --gguf model.Q4_K_M.gguf --python llama_cpp=./llama/bin/python",
    )
    peers.add_argument(
        "--gguf", type=Path, metavar="FILE", help="measure this model in the engines that read GGUF files"
    )
    peers.add_argument("--only", metavar="P[:F],...", help="engines, or formats of engines, to measure; default: all")
    peers.add_argument(
        "--python",
        metavar="P=FILE",
        action="append",
        default=[],
        help="Python interpreter that has engine P installed; repeatable",
    )
    peers.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for the model's files, 30 GB; default: in the cache"
    )
    _add_instruction_set(peers)
    peers.add_argument("--rounds", type=int, default=3, metavar="N", help="number of interleaved rounds (default 3)")
    peers.add_argument("--threads", type=int, metavar="N", help="number of threads; default: the number of cores")
    peers.add_argument(
        "--busy", action="store_true", help="also measure some cells while another process keeps a core busy"
    )
    peers.add_argument("--out", type=Path, metavar="FILE", help="write the figures to a JSON file")
    peers.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures to an .svg or .png file")


def _add_offline(kinds: Commands) -> None:
    offline = add_command(
        kinds,
        "offline",
        _bench_offline,
        "measure the speed and memory of a model in the engine",
        "The model is a folder, or with --geometry a model with the sizes of a published one and random weights, which "
        "are made in memory in the packed format.",
        "moesaic bench offline --geometry mixtral-8x7b --format q2",
        "moesaic bench offline ./mixtral-q4 --prompt 8192,32768 --batch 1,8 --out offline.json",
    )
    offline.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL_HELP}; default: smollm2")
    offline.add_argument("--geometry", metavar="NAME", help=f"sizes of the model: {', '.join(CONFIGURATIONS)}")
    offline.add_argument("--layers", type=int, metavar="N", help="with --geometry: number of layers; default: all")
    offline.add_argument(
        "--packed", type=Path, metavar="DIR", help="with --geometry: create the weights in this folder and map them"
    )
    offline.add_argument(
        "--format", metavar="F", help="quantize the weights: q8, q4, q3, q2, a format, or role=format,..."
    )
    offline.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of activations; default: as stored, or bfloat16"
    )
    offline.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="default: as activations")
    offline.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="capacity of the cache in tokens; default: 8192, or what the prompts need",
    )
    add_requantize(offline)
    _add_instruction_set(offline)
    add_show_plan(offline)
    offline.add_argument(
        "--prompt", default="512", metavar="N,...", help="tokens of a prompt, such as 8192,32768 (default 512)"
    )
    offline.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default 64)")
    offline.add_argument("--batch", default="1", metavar="N,...", help="concurrent answers, such as 1,8 (default 1)")
    offline.add_argument("--out", type=Path, metavar="FILE", help="write the figures to a JSON file")


def _add_startup(kinds: Commands) -> None:
    startup = add_command(
        kinds,
        "startup",
        _bench_startup,
        "measure the time from the start of a process to the first token",
        "Each start is a process of its own: one that loads the model as `moesaic chat` does, and `moesaic serve` "
        "until a client gets the first token. Before a cold start, the model's files are dropped from the page cache.",
        "moesaic bench startup",
        "moesaic bench startup ./mixtral-q4 --runs 5 --mode serve --out startup.json",
    )
    add_model(startup)
    startup.add_argument("--mode", choices=START_MODES, help="measure only this kind of process; default: both")
    startup.add_argument(
        "--runs", type=int, default=3, metavar="N", help="starts of each kind, of which the median counts (default 3)"
    )
    startup.add_argument("--json", action="store_true", help="print the figures as JSON")
    startup.add_argument("--out", type=Path, metavar="FILE", help="write the figures and their origin to a JSON file")


def _add_report(kinds: Commands) -> None:
    report = add_command(
        kinds,
        "report",
        _bench_report,
        "draw one page of charts and tables from result files",
        "FILES are what `bench`, `perplexity` and `eval` wrote with --out or --json. The page needs no network and "
        "no other file; a Markdown page has its pictures beside it.",
        "moesaic bench report offline.json serving.json quality.json",
        "moesaic bench report docs/results/peers.json --out peers.md",
    )
    report.add_argument("files", metavar="FILES", nargs="+", type=Path, help="result files")
    about = "page to write: NAME.html, or NAME.md with pictures NAME-1.svg, ... (default report.html)"
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help=about)


def _add_instruction_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instruction-set",
        metavar="NAME",
        help="let Moesaic's kernels use only this much of the processor: portable, neon, avx2, avxvnni, avx512, "
        "avx512bf16 or amx; default: all that it has",
    )


def _use_instruction_set(name: str | None) -> None:
    """Make the kernels use an instruction set; None: that which they use already."""
    from moesaic.ops import native

    if name is None:
        return
    if name not in native.INSTRUCTION_SETS:
        raise InvalidParameter("--instruction-set", f"is {name!r}, expected {', '.join(native.INSTRUCTION_SETS)}")
    if why := native.why_not("rms_norm", "cpu", None):
        raise InvalidParameter("--instruction-set", f"cannot be chosen: {why}")
    if not native.use_instruction_set(name):
        raise InvalidParameter("--instruction-set", f"is {name}, which this processor does not have")


def _bench_kernels(args: argparse.Namespace) -> int:
    from moesaic.bench import kernels, provenance
    from moesaic.formats import load
    from moesaic.hardware import limits
    from moesaic.ops import native

    names = args.format.split(",")
    for name in names:
        load(name)
        if why := native.why_not("linear", "cpu", name):
            raise InvalidRequest(f"format {name} cannot be measured with the compiled kernels: {why}")
    _use_instruction_set(args.instruction_set)
    if args.threads is not None:
        native.set_threads(args.threads)
    machine = limits.measure(report=lambda line: print(line, flush=True))
    rows = []
    with_weights = kernels.measure(machine, names, seconds=args.seconds)
    for row in chain(with_weights, kernels.measure_others(machine, args.seconds)):
        rows.append(row)
        print(kernels.line(row), flush=True)
    if args.out:
        provenance.write(args.out, provenance.record(args.line, kernels.figures(machine, rows)))
    return 0


def _bench_peers(args: argparse.Namespace) -> int:
    from moesaic import pull
    from moesaic.bench import chart, compare, peer_choice, plotting, provenance
    from moesaic.hardware import limits
    from moesaic.ops import native

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    _use_instruction_set(args.instruction_set)
    pairs = peer_choice.choose_for_file(args.only) if args.gguf else peer_choice.choose(args.only)
    pythons = peer_choice.interpreters(args.python)
    plan = compare.Plan(rounds=args.rounds, busy=args.busy, instruction_set=args.instruction_set)
    if args.threads is not None:
        plan = replace(plan, threads=args.threads)
    if args.plot:
        plotting.check(args.plot)
    measure = partial(limits.measure, report=show) if native.why_not("linear", "cpu", "int4") is None else None
    work = args.work or pull.cache_folder() / "bench"
    comparison = compare.compare(pairs, work, file=args.gguf, plan=plan, pythons=pythons, limits=measure, report=show)
    print("\n".join(chart.tables(comparison)))
    record = provenance.record(args.line, comparison.figures())
    if args.out:
        provenance.write(args.out, record)
    if args.plot:
        chart.plot(comparison, args.plot, f"{record['machine']['cpu']}, {record['date']}, commit {record['commit']}")
    return 2 if comparison.failed else 0


def _bench_offline(args: argparse.Namespace) -> int:
    from moesaic import builtin
    from moesaic.bench import offline, offline_text, provenance
    from moesaic.console.progress import bar

    _use_instruction_set(args.instruction_set)
    prompts, batches = numbers("prompt", args.prompt, int), numbers("batch", args.batch, int)
    works = [offline.Work(prompt, args.tokens, batch) for prompt in prompts for batch in batches]
    options = offline.Options(args.geometry, args.layers, args.packed, load_options(args))
    if args.geometry and args.model:
        raise InvalidRequest("--geometry and MODEL exclude each other: a geometry has random weights")
    path = None if args.geometry else folder(args.model or builtin.default())
    with bar("loading") as progress:
        figures = offline.run(
            path, options, works, lambda line: print(line, file=sys.stderr), progress, planned=partial(show_plan, args)
        )
    print("\n".join(offline_text.lines(figures)))
    if args.out:
        provenance.write(args.out, provenance.record(args.line, figures))
    return 0


def _bench_startup(args: argparse.Namespace) -> int:
    from moesaic import builtin
    from moesaic.bench import provenance, startup

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    path, modes = folder(args.model or builtin.default()), (args.mode,) if args.mode else START_MODES
    record = provenance.record(args.line, startup.run(path, load_options(args), args.runs, modes, show))
    print(json.dumps(record) if args.json else "\n".join(startup.lines(record["figures"])))
    if args.out:
        provenance.write(args.out, record)
    return 0


def _bench_report(args: argparse.Namespace) -> int:
    from moesaic.bench import report

    print(report.write(args.files, args.out)[-1])
    return 0
