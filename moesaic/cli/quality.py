"""``moesaic perplexity`` and ``moesaic eval``: measurements of quality."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli.flags import Commands, add_command, add_model, folder, load_options
from moesaic.errors import InvalidRequest
from moesaic.load_options import CACHE_DTYPES, DTYPES

if TYPE_CHECKING:
    from moesaic.bench.divergence import Reference
    from moesaic.bench.windows import Corpus
    from moesaic.llm import LLM
    from moesaic.loading import Loaded
    from moesaic.plan import Plan

CONVENTIONS = ("documents", "llama.cpp")
REFERENCE_FORMAT = "float32"

# perplexity


def add_perplexity(commands: Commands) -> None:
    parser = add_command(
        commands,
        "perplexity",
        _perplexity,
        "measure how well a model predicts a text",
        "It prints the perplexity per token with its standard error, and the bits per byte. If --format is given more "
        "than once, it prints a table that compares each format with the first.\n\n"
        "By default each document is read in windows that do not overlap, and each token counts. With --convention "
        "llama.cpp it measures as llama.cpp's llama-perplexity does.\n\n"
        "--kl-divergence also compares all probabilities with those of a reference: the same model with its weights "
        "decoded to float32, unless --reference or --reference-format names another. The reference runs once, and is "
        "not in memory together with the model.",
        "moesaic perplexity held-out.jsonl.xz ./model --format q4",
        "moesaic perplexity held-out.jsonl.xz ./model --format bfloat16 --format int4 --format experts=int2,head=int8",
        "moesaic perplexity wiki.test.raw.txt model.Q4_K_M.gguf --convention llama.cpp --kl-divergence",
        "moesaic perplexity held-out.txt ./model-q4 --reference ./model --reference-format bfloat16",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help='a .txt, or a .jsonl or .jsonl.xz with a "text" on each line'
    )
    add_model(parser, formats=True)
    parser.add_argument(
        "--kv-cache-dtype", choices=CACHE_DTYPES, help="use a key/value cache of this data type; default: no cache"
    )
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="documents",
        help="what is predicted from what: each document in windows (default), or llama.cpp's windows of one stream of "
        "tokens, of which the second half counts",
    )
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    divergence = parser.add_argument_group("divergence from a reference")
    divergence.add_argument(
        "--kl-divergence", action="store_true", help="also print the KL divergence from the reference"
    )
    divergence.add_argument(
        "--reference", metavar="MODEL", help="model to compare with; implies --kl-divergence; default: the same model"
    )
    divergence.add_argument(
        "--reference-format",
        metavar="F",
        help="format of the reference's weights; implies --kl-divergence; float32 (default), bfloat16 and float16 are "
        "also the data type of its activations",
    )
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object, or a list of them for several formats"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures and their origin to a JSON file")


def _perplexity(args: argparse.Namespace) -> int:
    from moesaic import builtin
    from moesaic.bench import divergence, provenance, quality

    texts = quality.read_texts(args.file)
    path, names = folder(args.model or builtin.default()), args.format or [None]
    plans = _plans(args, path)  # errors come before the first measurement
    with _reference(args, path, texts) as reference:
        rows = [_row(args, plan, texts, reference, name) for plan, name in zip(plans, names, strict=True)]
    if args.out:
        provenance.write(args.out, provenance.record(args.line, {"model": path.name, "formats": rows}))
    shown = [*quality.lines(rows), *(divergence.lines(rows) if reference else ())]
    print(json.dumps(rows if len(rows) > 1 else rows[0]) if args.json else "\n".join(shown))
    return 0


def _plans(args: argparse.Namespace, path: Path) -> list[Plan]:
    """Return the plan for the model in each of the formats that the flags name."""
    from moesaic.plan import make_plan

    cache = args.kv_cache_dtype or "auto"
    return [make_plan(path, load_options(args, format=name, kv_cache_dtype=cache)) for name in args.format or [None]]


def _row(
    args: argparse.Namespace, plan: Plan, texts: list[str], reference: Reference | None, format_name: str | None
) -> dict[str, Any]:
    """Return the figures of the model in a format."""
    from moesaic.bench import quality
    from moesaic.console.progress import bar

    loaded, text = _loaded(args, plan, texts)
    cache = plan.cache_dtype if args.kv_cache_dtype else None
    with bar("windows", count=True) as progress:
        if reference is None:
            return quality.row(format_name, loaded, quality.measure(loaded, text, progress, cache), text)
        measured, distance = reference.compare(loaded, text, progress, cache)
    figures = {"kl_divergence": distance.figures(reference.name, reference.format)}
    return quality.row(format_name, loaded, measured, text) | figures


def _loaded(args: argparse.Namespace, plan: Plan, texts: list[str]) -> tuple[Loaded, Corpus]:
    """Return the planned model, and the texts as its windows."""
    from moesaic.bench import quality
    from moesaic.console.progress import bar
    from moesaic.loading import load_model
    from moesaic.text.tokenizer import Tokenizer

    with bar("loading") as progress:
        loaded = load_model(plan, progress=progress)
    return loaded, quality.prepare(loaded, Tokenizer.open(plan.spec.path), texts, args.length, args.convention)


def _reference(
    args: argparse.Namespace, model: Path, texts: list[str]
) -> AbstractContextManager[Reference] | AbstractContextManager[None]:
    """Return the reference that the flags ask for, after it has read the texts; None if they ask for none."""
    from moesaic import packed
    from moesaic.bench.divergence import Reference
    from moesaic.console.progress import bar
    from moesaic.plan import make_plan

    if not (args.kl_divergence or args.reference or args.reference_format):
        return nullcontext()
    path = folder(args.reference) if args.reference else model
    name: str | None = args.reference_format
    if packed.is_packed(path):
        if not args.reference:
            raise InvalidRequest(f"{path} has packed weights: name the model that it was made from with --reference")
    else:
        name = name or REFERENCE_FORMAT
    dtype = name if name in DTYPES else "auto" if args.reference else args.dtype
    plan = make_plan(path, load_options(args, format=name, dtype=str(dtype), kv_cache_dtype="auto"))
    loaded, text = _loaded(args, plan, texts)
    with bar("reference", count=True) as progress:
        return Reference(loaded, text, Path(args.reference or args.model or path).name, name, progress)


# eval


def add_eval(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        "run benchmark tasks of lm-eval on a model",
        "lm-eval is EleutherAI's lm-evaluation-harness; it needs `pip install 'moesaic[eval]'`. It runs in this "
        "process, and the model answers its requests in batches. Data sets come from the Hugging Face hub, or from "
        "local files that a task in --include-path names. If --format is given more than once, the table has a column "
        "for each.",
        "moesaic eval ./model --tasks arc_easy,hellaswag --limit 200",
        "moesaic eval ./model --tasks gsm8k --apply-chat-template --num-fewshot 5 --format bfloat16 --format q4",
        "moesaic eval ./model --tasks my_task --include-path ./tasks --json",
        "moesaic eval --tasks list",
    )
    add_model(parser, formats=True)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        metavar="T,...",
        required=True,
        help="names of tasks, groups or tags, patterns such as mmlu_*, or YAML files; list: print all names",
    )
    tasks.add_argument(
        "--include-path", metavar="DIR", type=Path, action="append", default=[], help="folder of tasks; repeatable"
    )
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question; default: the task's")
    tasks.add_argument(
        "--limit", type=float, metavar="N", help="questions of each task, or a share if less than 1; default: all"
    )
    tasks.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the model's chat format; examples are messages"
    )
    tasks.add_argument("--system-instruction", metavar="TEXT", help="system prompt")
    tasks.add_argument("--gen-kwargs", metavar="K=V,...", help="generation settings, such as max_gen_toks=64")
    tasks.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="allow tasks that run code which the model wrote"
    )
    tasks.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of examples and draws (default 1234)")
    _add_engine(parser)
    _add_output(parser)
    parser.add_argument("--samples-out", type=Path, metavar="FILE", help="write each question and answer as JSON lines")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="requests that run at the same time (default 64)"
    )
    engine.add_argument(
        "--context", type=int, metavar="N", help="tokens that the model reads; longer requests are cut from the left"
    )
    engine.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="default: as activations")
    engine.add_argument("--chat-format", metavar="NAME", help="see `moesaic list chat-formats`; or FILE.jinja")


def _eval(args: argparse.Namespace) -> int:
    from moesaic import builtin
    from moesaic.bench import evaluation, provenance

    if args.tasks == evaluation.LIST:
        print("\n".join(evaluation.task_names(args.include_path)))
        return 0
    path = folder(args.model or builtin.default())
    plans = _plans(args, path)  # errors come before the first measurement
    options = evaluation.Options(**{name: getattr(args, name) for name in evaluation.Options.__dataclass_fields__})
    tasks = evaluation.Tasks.find([name for name in args.tasks.split(",") if name], args.include_path)
    rows, samples = [], []
    for format_name, plan in zip(args.format or [None], plans, strict=True):
        with _started(args, plan) as llm:
            results = evaluation.evaluate(llm, tasks, options, args.batch_size)
        rows.append(evaluation.row(format_name, results))
        samples.append((rows[-1]["format"], results))
    if args.samples_out:
        evaluation.write_samples(args.samples_out, samples)
    if args.out:
        provenance.write(args.out, provenance.record(args.line, {"model": path.name, "formats": rows}))
    print(json.dumps(rows if len(rows) > 1 else rows[0]) if args.json else "\n".join(evaluation.lines(rows)))
    return 0


def _started(args: argparse.Namespace, plan: Plan) -> LLM:
    """Return the planned model with an engine for evaluations."""
    from moesaic.bench import evaluation
    from moesaic.console.progress import bar
    from moesaic.loading import load_model

    with bar("loading") as progress:
        loaded = load_model(plan, progress=progress)
    return evaluation.start(loaded, plan.spec.path.stem, args.batch_size, args.chat_format)
