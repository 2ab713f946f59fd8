"""``moesaic train``: fine-tunes a model with an adapter, on conversations or on preferences."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moesaic.cli.flags import MODEL_HELP, Commands, add_command, add_requantize, folder, load_options
from moesaic.errors import InvalidParameter
from moesaic.load_options import DTYPES

if TYPE_CHECKING:
    from moesaic.train import Outcome
    from moesaic.train.data import BadLine
    from moesaic.train.examples import Encoder, Example, Pair
    from moesaic.train.tasks import Task

T = TypeVar("T")

SHOWN = 5
"""Lines of a data file that cannot be used of which the reason is printed."""


def add_train(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="fine-tune a model with a low-rank adapter (LoRA)",
        description="Fine-tune a model with a low-rank adapter (LoRA), on conversations or on preferences.",
        epilog="examples:\n  moesaic train sft smollm2 chats.jsonl ./my-adapter\n"
        "  moesaic train dpo smollm2 preferences.jsonl ./my-adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    more = (
        "The weights of the model stay as they are, in any format. OUT gets the adapter in the files of PEFT and a "
        "log. If the command is stopped and given again, it continues where it was saved last. `moesaic convert "
        "--adapter` adds an adapter to the weights."
    )
    _add_kind(
        kinds,
        "sft",
        "train on conversations: the model learns the assistant's answers",
        "A line of DATA has messages as in OpenAI's API; or conversations as in ShareGPT; or instruction, input and "
        "output as in Alpaca; or prompt and completion. " + more,
        "moesaic train sft smollm2 chats.jsonl ./my-adapter",
        "moesaic train sft ./mixtral chats.jsonl ./my-adapter --format q4 --held-out 0.05 --patience 3",
    )
    parser = _add_kind(
        kinds,
        "dpo",
        "train on preferences: the model learns to prefer the better of two answers (DPO)",
        "A line of DATA has prompt, chosen and rejected. " + more,
        "moesaic train dpo smollm2 preferences.jsonl ./my-adapter --learning-rate 5e-5",
    )
    parser.add_argument(
        "--beta", type=float, default=0.1, metavar="X", help="how strongly it stays near the model (default 0.1)"
    )


def _add_kind(kinds: Commands, name: str, about: str, more: str, *examples: str) -> argparse.ArgumentParser:
    parser = add_command(kinds, name, _train, about, more, *examples)
    parser.set_defaults(kind=name)
    parser.add_argument("model", metavar="BASE", help=MODEL_HELP)
    parser.add_argument("data", metavar="DATA", type=Path, help="a .jsonl, or a .jsonl.xz")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the adapter and the log")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of activations; default: as the checkpoint is stored"
    )
    parser.add_argument("--format", metavar="F", help="quantize the weights first: q8, q4, q3, q2, or role=format,...")
    add_requantize(parser)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--chat-format", metavar="NAME", help="see `moesaic list chat-formats`; default: the model's own"
    )
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--rank", type=int, default=16, metavar="R", help="rank of the matrices (default 16)")
    adapter.add_argument("--alpha", type=float, metavar="X", help="scale of the change times the rank (default 2 R)")
    adapter.add_argument(
        "--targets",
        metavar="LIST",
        help="weights with an adapter, such as q_proj,k_proj,v_proj,o_proj,w1,w2,w3; default: all of attention, of "
        "dense layers and of experts; never the router",
    )
    steps = parser.add_argument_group("steps")
    for flag, kind, default, about in (
        ("--epochs", float, 1.0, "passes over the data (default 1)"),
        ("--steps", int, None, "optimizer steps, in place of --epochs"),
        ("--batch", int, 8, "examples in a step (default 8)"),
        ("--micro-batch-tokens", int, 4096, "tokens that are computed at once; bounds the memory (default 4096)"),
        ("--max-length", int, 2048, "tokens to which an example is cut (default 2048)"),
        ("--learning-rate", float, 2e-4, "the largest learning rate (default 2e-4)"),
        ("--warmup", float, 0.03, "share of the steps in which the learning rate grows (default 0.03)"),
        ("--weight-decay", float, 0.0, "weight decay of AdamW (default 0)"),
        ("--clip", float, 1.0, "largest norm of the gradient (default 1)"),
        ("--router-loss", float, 0.0, "factor of the loss that balances experts (default 0; Mixtral's own was 0.02)"),
        ("--seed", int, 0, "seed of the order of the data and of the adapter's first values (default 0)"),
        ("--save-every", int, 50, "steps between saves (default 50)"),
    ):
        steps.add_argument(flag, type=kind, default=default, metavar="N" if kind is int else "X", help=about)
    steps.add_argument(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        help="keep all activations in memory, in place of computing them twice",
    )
    held = parser.add_argument_group("evaluation")
    held.add_argument(
        "--held-out",
        metavar="X",
        help="a file, or the share of DATA to leave out of training, such as 0.05; the adapter is the one with the "
        "lowest loss on it",
    )
    held.add_argument("--evaluate-every", type=int, default=100, metavar="N", help="steps between them (default 100)")
    held.add_argument("--patience", type=int, metavar="N", help="stop after N evaluations without an improvement")
    held.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for a log that TensorBoard shows")
    return parser


def _train(args: argparse.Namespace) -> int:
    from moesaic import builtin
    from moesaic.adapters import TARGETS, AdapterConfig
    from moesaic.cli.loading import collection_paused
    from moesaic.console.progress import bar
    from moesaic.loading import load_model
    from moesaic.plan import make_plan
    from moesaic.text import chat_choice
    from moesaic.text.tokenizer import Tokenizer
    from moesaic.token_rows import check_tokenizer
    from moesaic.train import Settings, train
    from moesaic.train.examples import Encoder

    targets = tuple(args.targets.split(",")) if args.targets else TARGETS
    adapter = AdapterConfig(args.rank, 2.0 * args.rank if args.alpha is None else args.alpha, targets)
    given = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if hasattr(args, name)}
    settings = Settings(**{**given, "adapter": adapter})
    path = folder(args.model)
    with collection_paused():
        plan = make_plan(path, load_options(args))
    tokenizer = Tokenizer.open(path)
    chat_format = chat_choice.select(args.chat_format, tokenizer, path, plan.spec.config.get("model_type"))
    encoder = Encoder(chat_format, tokenizer, min(settings.max_length, plan.max_length))
    task, held_out = _tasks(args, encoder)
    with bar("loading") as progress:
        model = load_model(plan, progress=progress).model
    check_tokenizer(tokenizer, model.vocab_size, path)
    name = args.model if builtin.find(args.model) else str(path)
    with bar("training", count=True) as show:
        outcome = train(
            *(model, task, settings, args.out),
            base=name,
            held_out=held_out,
            tensorboard=args.tensorboard,
            on_step=lambda entry, total: show(entry.step, total) if show else None,
        )
    _report(outcome, args)
    return 0


def _tasks(args: argparse.Namespace, encoder: Encoder) -> tuple[Task, Task | None]:
    """Return what to learn, and the held-out items if any."""
    from moesaic.train import data, examples
    from moesaic.train.tasks import Preferences, Supervised

    def conversations(path: Path) -> tuple[list[Example], tuple[BadLine, ...]]:
        return examples.encode(data.conversations(path), encoder.conversation)

    def preferences(path: Path) -> tuple[list[Pair], tuple[BadLine, ...]]:
        return examples.encode(data.preferences(path), encoder.preference)

    if args.kind == "sft":
        return _split(args, encoder, conversations, Supervised)
    return _split(args, encoder, preferences, lambda pairs: Preferences(pairs, args.beta))


def _split(
    args: argparse.Namespace,
    encoder: Encoder,
    read: Callable[[Path], tuple[list[T], tuple[BadLine, ...]]],
    task: Callable[[Sequence[T]], Task],
) -> tuple[Task, Task | None]:
    from moesaic.train import order

    def items(path: Path) -> list[T]:
        before = encoder.shortened
        found, bad = read(path)
        _report_lines(path, len(found), bad, encoder.shortened - before)
        return found

    found = items(args.data)
    if args.held_out is None:
        return task(found), None
    if Path(args.held_out).is_file():
        return task(found), task(items(Path(args.held_out)))
    count = round(_share(args.held_out) * len(found))
    if not 0 < count < len(found):
        raise InvalidParameter("held_out", f"{args.held_out} of {len(found)} examples leaves one of the parts empty")
    mixed = next(order.batches(len(found), len(found), args.seed))
    return task([found[index] for index in mixed[count:]]), task([found[index] for index in mixed[:count]])


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InvalidParameter("held_out", f"is {text!r}, which is neither a file nor a number between 0 and 1")
    return share


def _report_lines(path: Path, count: int, bad: Sequence[BadLine], shortened: int) -> None:
    """Print how much of a file is used, and which of its lines are not."""
    note = f", {shortened} of them cut to the maximum length" if shortened else ""
    print(f"{path.name}: {count} examples{note}", file=sys.stderr)
    if bad:
        shown = "".join(f"\n  {line}" for line in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more: lines {', '.join(str(each.number) for each in bad[SHOWN:])}"
        tail = more if len(bad) > SHOWN else ""
        print(f"{path.name}: {len(bad)} lines are not used:{shown}{tail}", file=sys.stderr)


def _report(outcome: Outcome, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(asdict(outcome)))
        return
    print(f"{outcome.steps} steps, {outcome.tokens:,} tokens; the adapter is in {args.out}")
    if outcome.held_out_loss is not None:
        early = "; training stopped early" if outcome.stopped_early else ""
        print(f"loss on held-out examples {outcome.held_out_loss:.4f} after step {outcome.best_step}{early}")
