"""``moesaic pack`` and ``moesaic quantize``: write a model as a packed folder, rounded to nearest or calibrated."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from moesaic.cli.flags import MODEL_HELP, Commands, add_command, add_requantize, folder
from moesaic.errors import InvalidRequest
from moesaic.load_options import DTYPES

TOKENS = 16384


def add_pack(commands: Commands) -> None:
    parser = add_command(
        commands,
        "pack",
        _pack,
        "quantize a model into a folder that loads without conversion",
        "The folder has the weights in the format of the kernels, so that later commands map it into memory instead "
        "of reading and quantizing the model again. It appears only when it is complete.",
        "moesaic pack ./mixtral ./mixtral-q4 --format q4",
        "moesaic pack ./mixtral ./mixtral-small --format experts=int2,attention=int8",
        "moesaic pack mixtral.Q4_K_M.gguf ./mixtral-q4km",
    )
    _add_folders(parser)
    parser.add_argument(
        "--format",
        metavar="F",
        help="q8, q4, q3, q2, a format of `moesaic list formats`, or role=format,...; default: keep quantized weights",
    )


def _pack(args: argparse.Namespace) -> int:
    from moesaic import packed
    from moesaic.console.progress import bar

    path = folder(args.model)
    with bar("packing") as progress:
        packed.pack(path, args.dst, args.format, args.dtype, requantize=args.requantize, progress=progress)
    return 0


def add_quantize(commands: Commands) -> None:
    parser = add_command(
        commands,
        "quantize",
        _quantize,
        "quantize a model with calibration into a folder that loads without conversion",
        "Weights in int4, int3 and int2 are rounded so that the outputs on a text change least (GPTQ). This loses less "
        "than rounding to nearest, as pack does. The folder is that of pack, and appears only when it is complete. "
        "If the command is stopped and given again, it continues at the first layer that is not finished.\n\n"
        "--bits chooses a format for each weight: it measures how much the predictions suffer from each, and spends "
        "the bits where they help most. It prints the formats, which are also in choices.json of the new folder.",
        "moesaic quantize ./mixtral ./mixtral-q2 --format q2",
        "moesaic quantize ./mixtral ./mixtral-small --format experts=int2,attention=int8 --calibrate texts.jsonl.xz",
        "moesaic quantize smollm2 ./smollm2-q3 --format q3 --requantize",
        "moesaic quantize ./mixtral ./mixtral-small --bits 2.5",
    )
    _add_folders(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--format",
        metavar="F",
        help="q4, q3, q2, a format of `moesaic list formats`, or role=format,...",
    )
    size.add_argument(
        "--bits",
        type=float,
        metavar="N",
        help="choose int8, int4, int3 or int2 for each weight, so that a quantized weight takes at most N bits on "
        "average, with scales",
    )
    parser.add_argument("--json", action="store_true", help="print the formats that --bits chose as a JSON object")
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help='text to calibrate with: a .txt, or a .jsonl or .jsonl.xz with a "text" on each line; default: the model '
        "writes it itself",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"calibration tokens (default {TOKENS})"
    )
    parser.add_argument(
        "--heat-map", type=Path, metavar="FILE", help="draw the calibration tokens of each expert to a .png or .svg"
    )


def _quantize(args: argparse.Namespace) -> int:
    from moesaic import calibration
    from moesaic.bench import plotting, quality
    from moesaic.calibration import heat_map, texts
    from moesaic.console.progress import bar

    if args.json and args.bits is None:
        raise InvalidRequest("--json prints the formats that --bits chooses, but there is no --bits")
    path = folder(args.model)
    name = str(args.calibrate.resolve()) if args.calibrate else "written by the model"
    settings = calibration.Settings(args.format, args.dtype, args.requantize, name, args.tokens, args.bits)
    documents = quality.read_texts(args.calibrate) if args.calibrate else None
    if args.heat_map:
        plotting.check(args.heat_map)

    def sequences() -> list[list[int]]:
        if documents is not None:
            return texts.from_documents(path, documents, args.tokens)
        with bar("writing text", count=True) as progress:
            return texts.self_written(path, args.tokens, progress)

    with bar("quantizing", count=True) as progress, ExitStack() as first:
        show = first.enter_context(bar("measuring", count=True))

        def measuring(done: int, total: int) -> None:
            if show is not None:
                show(done, total)
            if done == total:
                first.close()  # a terminal shows one bar at a time

        outcome = calibration.quantize(path, args.dst, settings, sequences, progress, measuring)
    if args.heat_map:
        heat_map.draw(outcome.usage, args.heat_map)
    if args.json:
        print(json.dumps({name: asdict(choice) for name, choice in outcome.choices.items()}))
    elif outcome.choices:
        print("\n".join(calibration.lines(outcome.choices)))
    return 0


def _add_folders(parser: argparse.ArgumentParser) -> None:
    """Add the model to read, the folder to write, and how its weights are read."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to create")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of activations and of weights that are not quantized"
    )
    add_requantize(parser)
