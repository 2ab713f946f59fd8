"""``moesaic serve``: models behind HTTP."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import launcher, listening
from moesaic.cli.flags import CACHE_DTYPES, DTYPES, Commands, add_command, folder
from moesaic.console.visible import one_line
from moesaic.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from moesaic.backend import Backend
    from moesaic.serve.model_manager import ModelEntry, ModelManager


def add_serve(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        _serve,
        "put models behind HTTP: OpenAI's API, TGI's and Anthropic's, and a web chat",
        "The first MODEL is the default and is loaded at once,\n"
        "others when they are asked for. NAME=MODEL gives one a name. Without --host, only this machine can reach it.",
        "moesaic serve",
        "moesaic serve ./mixtral-q4 --port 8080",
        "moesaic serve chat=./mixtral small=./mistral-7b --memory 20 --host 0.0.0.0 --keys keys.json",
    )
    parser.usage = "moesaic serve [FLAGS] [MODEL ...]"
    add_models(parser)
    listening.add_flags(parser)
    parser.add_argument(
        "--strict-model-name", action="store_true", help="no stand-ins such as tgi for the default model"
    )
    launcher.add_flags(parser)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add what says which models there are, and how they are held: what ``books`` reads."""
    parser.add_argument("models", metavar="MODEL", nargs="*", help="folders, or org/name on the hub; default: built-in")
    model = parser.add_argument_group("models")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as the checkpoint is stored")
    model.add_argument("--format", metavar="F", help="quantize: q8, q4, q3, q2, a format, or experts=int2,...")
    model.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    model.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    model.add_argument("--cache-tokens", type=int, metavar="N", help="places in the key/value cache of each model")
    stored = (*CACHE_DTYPES, *launcher.FP8)
    model.add_argument("--kv-cache-dtype", choices=stored, default="auto", help="int8: half the memory; fp8: int8")
    model.add_argument("--chat-format", metavar="NAME", help="see `moesaic list chat-formats`")
    model.add_argument("--memory", type=float, metavar="GB", help="most that loaded models may take together")
    model.add_argument("--sequences", type=int, metavar="N", help="answers at the same time (default 64)")
    model.add_argument("--queue", type=int, metavar="N", help="answers that may wait; more get 429 (default 256)")


def _serve(args: argparse.Namespace) -> int:
    listening.need_packages()
    from moesaic.serve.settings import TgiBounds

    launch = launcher.translate(args, os.environ)
    args = launch.args
    os.environ.update(launch.environment)  # for the libraries that read it
    settings = listening.settings(
        args,
        strict_model_name=args.strict_model_name,
        concurrent_requests=args.concurrent_requests,
        prompts=args.prompts,
        tgi=TgiBounds(**launch.bounds),
    )

    return listening.serve(args, settings, lambda: model_manager(args), before=lambda: _say(launch))


async def model_manager(args: argparse.Namespace, many_streams: int | None = None) -> ModelManager:
    """Return the models that were named, the first of them loaded. ``many_streams``: see ``LocalBackend``."""
    from moesaic.serve.model_manager import ModelManager

    made = ModelManager(model_entries(args, many_streams), None if args.memory is None else int(args.memory * 1e9))
    await made.get(made.models()[0].name)
    return made


def _say(launch: launcher.Launch) -> None:
    """Tell what TGI's flags were taken as."""
    if launch.said:
        lines = ("moesaic: TGI's flags, as they are taken here:", *(f"  {one_line(line)}" for line in launch.said))
        print("\n".join(lines), file=sys.stderr, flush=True)


def model_entries(args: argparse.Namespace, many_streams: int | None = None) -> list[ModelEntry]:
    """Return the models that were named, none of them loaded."""
    from moesaic.backend import ModelInfo
    from moesaic.serve.model_manager import ModelEntry

    found = []
    for given in args.models or [None]:
        # A path may have a "=" in it, behind the name that it then needs.
        name, _, model = given.partition("=") if given and "=" in given else ("", "", given)
        path = folder(model)
        if path is not None and not path.is_dir():
            raise NotFound(f"{path}: no such folder; `moesaic pull {path}` fetches a model from the hub")
        called = model if model is None or Path(model).exists() else model.partition("@")[0]
        shown = name or (called.rstrip("/").split("/")[-1] if called else "built-in")
        aliases = tuple({called} - {shown, None}) if called and "/" in called and not Path(called).exists() else ()
        size = _memory_needed(args, path) if getattr(args, "memory", None) is not None else 0
        found.append(
            ModelEntry(
                ModelInfo(shown, aliases, state="unloaded"), partial(open_model, args, path, shown, many_streams), size
            )
        )
    if len({entry.info.name for entry in found}) < len(found):
        raise InvalidRequest("two models have the same name: name them, as in a=./one b=./two")
    return found


def _memory_needed(args: argparse.Namespace, path: Path | None) -> int:
    """Return the bytes that a model takes when it is loaded with these arguments."""
    from moesaic.llm import BUILT_IN
    from moesaic.loading import memory_needed

    return memory_needed(
        path or BUILT_IN,
        dtype=args.dtype,
        weight_format=args.format,
        device=args.device,
        context=args.context,
        cache_tokens=args.cache_tokens,
        kv_cache_dtype=args.kv_cache_dtype,
    )


async def open_model(
    args: argparse.Namespace, path: Path | None, name: str, many_streams: int | None = None
) -> Backend:
    """Return the door to a model, loaded as the command line says."""
    from moesaic.classifier import Classifier
    from moesaic.engine import Limits
    from moesaic.llm import LLM
    from moesaic.loading import is_classifier
    from moesaic.local_backend import MANY_STREAMS, LocalBackend, LocalClassifierBackend

    limits = Limits()
    if args.sequences is not None:
        limits = replace(limits, sequences=args.sequences, batch_tokens=max(limits.batch_tokens, args.sequences))
    if args.queue is not None:
        limits = replace(limits, queue=args.queue)
    if args.batch_tokens is not None:
        limits = replace(limits, sequences=min(limits.sequences, args.batch_tokens), batch_tokens=args.batch_tokens)

    def load() -> LLM | Classifier:
        if path is not None and is_classifier(path):
            return Classifier.load(path, dtype=args.dtype, device=args.device)
        return LLM.load(
            path,
            dtype=args.dtype,
            format=args.format,
            device=args.device,
            context=args.context,
            cache_tokens=args.cache_tokens,
            kv_cache_dtype=args.kv_cache_dtype,
            chat_format=args.chat_format,
            limits=limits,
        )

    model = await asyncio.get_running_loop().run_in_executor(None, load)
    if isinstance(model, Classifier):
        return LocalClassifierBackend(model, name)
    model.name = name
    return LocalBackend(model, many_streams=many_streams or MANY_STREAMS)
