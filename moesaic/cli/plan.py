"""``moesaic plan``: what of a model fits on a machine, and how fast it will be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli.flags import MODEL_HELP, Commands, add_command
from moesaic.errors import InvalidRequest
from moesaic.load_options import CACHE_DTYPES
from moesaic.published import CONFIGURATIONS

if TYPE_CHECKING:
    from moesaic.hardware import Machine
    from moesaic.model_spec import ModelSpec
    from moesaic.planner import Report, Wish


def add_plan(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        _plan,
        "show what of a model fits on a machine, and how fast it will be",
        "Nothing is loaded, and of a model on the hub only the headers of its files are read. Without --hardware, this "
        "machine is measured for half a second. With --for, the command lists the smallest machines for a number of "
        "people instead. Speeds are estimates from bytes and operations.",
        "moesaic plan mixtral-8x7b",
        "moesaic plan mixtral-8x22b --hardware 4xA100-80GB --context 32768 --batch 8",
        'moesaic plan --for "32 users, 8k, mixtral-8x22b"',
    )
    names = ", ".join(CONFIGURATIONS)
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL_HELP}; or a published model: {names}")
    parser.add_argument(
        "--hardware",
        metavar="TEXT",
        help="the machine: 2xH100-80GB, 4xA6000, 1xRTX4090+64GB, cpu:64GB@200GB/s; default: this one",
    )
    parser.add_argument(
        "--for", dest="need", metavar="TEXT", help='list the smallest machines for "32 users, 8k, mixtral-8x22b"'
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a prompt and its answer (default 8192)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="answers at the same time (default 1)")
    parser.add_argument(
        "--format", metavar="F", action="append", help="a format to plan instead of all presets; may be repeated"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=CACHE_DTYPES, default="auto", help="data type of the cache; default: as activations"
    )
    parser.add_argument("--device", default="cpu", help="without --hardware: cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the plan to an .svg file")


def _plan(args: argparse.Namespace) -> int:
    from moesaic.hardware import parse

    machine = parse(args.hardware) if args.hardware else None  # refused before torch is imported
    if args.need is not None:
        return _machines(args)
    if args.model is None:
        raise InvalidRequest("a model is missing: name one, or pass --for")
    from moesaic.planner import Wish, picture, text

    wish = Wish(args.context, args.batch, tuple(args.format or ()), args.kv_cache_dtype)
    report, notes = _report(args.model, machine or _this_machine(args.device), wish)
    if args.picture:
        picture.write(report, args.picture)
    print(json.dumps(report.to_json(), indent=1) if args.json else "\n".join([*text.lines(report), *notes]))
    return 0


def _report(model: str, machine: Machine, wish: Wish) -> tuple[Report, list[str]]:
    """Return the plan of a model, and lines about what its repository has."""
    from moesaic.console.progress import bar
    from moesaic.hub_files import HubName
    from moesaic.model_sizes import ModelSizes
    from moesaic.planner import hub, plan_model

    if _is_here(model) or HubName.parse(model) is None:
        return plan_model(ModelSizes.count(_spec(model)), machine, wish), []
    with bar(f"looking at {model}") as progress:
        choice = hub.choose(model, machine, wish, progress)
    return choice.report, list(hub.choice_lines(choice))


def _is_here(model: str) -> bool:
    from moesaic import builtin

    return model in CONFIGURATIONS or model in builtin.NAMES or Path(model).exists()


def _machines(args: argparse.Namespace) -> int:
    """Print the smallest machines for the need of --for."""
    from moesaic.model_sizes import ModelSizes
    from moesaic.planner import machines

    need = machines.parse_need(args.need)
    model = need.model or args.model
    if model is None or (need.model and args.model) or args.hardware or args.picture:
        raise InvalidRequest("--for needs one model, in its text or as MODEL, and excludes --hardware and --picture")
    found = machines.smallest(ModelSizes.count(_spec(model)), need)
    if args.json:
        print(json.dumps([machines.to_json(best) for best in found], indent=1))
    else:
        print("\n".join(machines.lines(need, found)))
    return 0


def _spec(model: str) -> ModelSpec:
    """Return the description of a published model, a built-in one, or the one in a folder or file."""
    from moesaic import builtin, plan
    from moesaic.load_options import LoadOptions
    from moesaic.planner import published_spec

    if model in CONFIGURATIONS and not Path(model).exists():
        return published_spec(model)
    return plan.describe(builtin.find(model) or Path(model), LoadOptions())


def _this_machine(device: str) -> Machine:
    from moesaic.hardware import this_machine

    return this_machine.describe(device)
