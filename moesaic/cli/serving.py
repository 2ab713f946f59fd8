"""``moesaic serve``: an HTTP server for models; and the flags and functions that load models for other commands."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import server_options, tgi_launcher
from moesaic.cli.flags import (
    Commands,
    add_command,
    add_requantize,
    add_show_plan,
    add_speculation,
    duration,
    folder,
    load_options,
    show_plan,
)
from moesaic.cli.loading import collection_paused
from moesaic.console.visible import one_line
from moesaic.errors import InvalidRequest, NotFound
from moesaic.load_options import CACHE_DTYPES, DTYPES, LoadOptions

if TYPE_CHECKING:
    from moesaic.backend import Backend
    from moesaic.plan import Plan
    from moesaic.serve.model_entry import ModelEntry, PlannedModel
    from moesaic.serve.model_manager import ModelManager
    from moesaic.serve.presets import PresetBackend


def add_serve(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        _serve,
        "serve models over HTTP: the APIs of OpenAI, TGI and Anthropic, and a web chat",
        "The first MODEL is the default and is loaded at the start; the others are loaded when they are requested. "
        "Write NAME=MODEL to give a model a name, such as small=tales. Without --host, only this machine can connect.",
        "moesaic serve",
        "moesaic serve ./mixtral-q4 --port 8080",
        "moesaic serve chat=./mixtral small=./mistral-7b --memory 20 --host 0.0.0.0 --keys keys.json",
        "moesaic serve chat=./mixtral small=./mistral-7b --pin small --idle-unload 15m --presets presets.toml",
    )
    parser.usage = "moesaic serve [FLAGS] [MODEL ...]"
    add_models(parser)
    server_options.add_flags(parser)
    server_options.add_admin_port(parser)
    parser.add_argument(
        "--strict-model-name",
        action="store_true",
        help="refuse stand-in names, such as tgi, for the default model",
    )
    tgi_launcher.add_flags(parser)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the argument MODEL and the flags that ``model_entries`` reads: which models to load, and how."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="folders, GGUF files, org/name on the Hugging Face hub, or built-in models: smollm2 (default), tales",
    )
    model = parser.add_argument_group("models")
    model.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of activations; default: as the checkpoint is stored"
    )
    model.add_argument(
        "--format",
        metavar="F",
        help="quantize the weights: q8, q4, q3, q2, a format of `moesaic list formats`, or experts=int2,...; "
        "auto: the first that fits in memory",
    )
    add_requantize(model)
    model.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    model.add_argument("--context", type=int, metavar="N", help="maximum tokens of prompt and answer together")
    model.add_argument(
        "--cache-tokens", type=int, metavar="N", help="capacity of each model's key/value cache in tokens"
    )
    dtypes = (*CACHE_DTYPES, *tgi_launcher.FP8)
    model.add_argument(
        "--kv-cache-dtype",
        choices=dtypes,
        default="auto",
        help="int8 takes half the memory of bfloat16; TGI's fp8 values mean int8",
    )
    model.add_argument(
        "--chat-format", metavar="NAME", help="see `moesaic list chat-formats`; or FILE.jinja; default: the model's own"
    )
    add_speculation(model)
    add_show_plan(model)
    model.add_argument("--memory", type=float, metavar="GB", help="maximum size of all loaded models together")
    model.add_argument(
        "--idle-unload",
        type=duration,
        metavar="TIME",
        help="unload a model that is unused for this time, such as 15m; the next request loads it again",
    )
    model.add_argument(
        "--pin",
        action="append",
        metavar="NAME",
        help="load this model at the start and never unload it for memory or idleness; repeatable",
    )
    model.add_argument(
        "--presets",
        type=Path,
        metavar="FILE",
        help="TOML file of presets: a model with a system prompt and sampling values, under a name; SIGHUP reloads it",
    )
    model.add_argument("--sequences", type=int, metavar="N", help="maximum concurrent answers (default 64)")
    model.add_argument(
        "--queue", type=int, metavar="N", help="maximum waiting answers; further requests get 429 (default 256)"
    )


def _serve(args: argparse.Namespace) -> int:
    server_options.require_packages()
    from moesaic.serve import model_admin
    from moesaic.serve.model_metrics import ModelCollector
    from moesaic.serve.settings import TgiBounds

    launch = tgi_launcher.translate(args, os.environ)
    args = launch.args
    os.environ.update(launch.environment)  # for the libraries that read it
    settings = server_options.settings(
        args,
        admin_port=args.admin_port,
        strict_model_name=args.strict_model_name,
        concurrent_requests=args.concurrent_requests,
        prompts=args.prompts,
        tgi=TgiBounds(**launch.bounds),
    )

    return server_options.serve(
        args,
        settings,
        lambda: open_models(args),
        model_admin.endpoints,
        lambda models: ModelCollector(models.backend.entries),
        before=lambda: _print_notes(launch),
        reloads=lambda models: {"presets": models.reload},
    )


async def open_models(args: argparse.Namespace, many_streams: int | None = None) -> PresetBackend[ModelManager]:
    """Load the first model of the command line and the pinned ones; return the manager of all, with the presets.

    Args:
        args: parsed flags of ``add_models``.
        many_streams: number of running answers above which a backend polls its engine less often; None: the default.

    Raises:
        InvalidRequest: the presets are wrong, or pinned models need more memory than there is.
        NotFound: there is no model of the name of a pin.
        MoesaicError: a model cannot be loaded.
    """
    from moesaic import memory
    from moesaic.serve import presets
    from moesaic.serve.model_manager import ModelManager

    budget = None if args.memory is None else int(args.memory * 1e9)
    entries = model_entries(args, many_streams)
    manager = ModelManager(entries, budget, idle_seconds=args.idle_unload, reclaim=memory.release_unused)
    for name in args.pin or ():
        manager.entry(name).pinned = True
    models = presets.PresetBackend(manager, lambda: presets.read(args.presets) if args.presets else ())
    await manager.start()
    return models


def _print_notes(launch: tgi_launcher.Launch) -> None:
    """Print how TGI's flags were translated."""
    if launch.notes:
        lines = ("moesaic: TGI's flags and what they mean here:", *(f"  {one_line(note)}" for note in launch.notes))
        print("\n".join(lines), file=sys.stderr, flush=True)


def model_entries(args: argparse.Namespace, many_streams: int | None = None) -> list[ModelEntry]:
    """Return the models of the command line, none of them planned or loaded.

    Raises:
        InvalidRequest: two models have the same name.
        NotFound: a model's folder does not exist.
        NotInstalled: the package of a built-in model is not installed.
    """
    from moesaic import builtin
    from moesaic.backend import ModelInfo
    from moesaic.hub_files import HubName
    from moesaic.serve.model_entry import ModelEntry

    entries = []
    for argument in args.models or [builtin.default()]:
        # A path that contains "=" needs a name in front of it.
        name, _, model = argument.partition("=") if "=" in argument else ("", "", argument)
        path = folder(model)
        if not path.exists():
            raise NotFound(f"{path}: no such folder or file; `moesaic pull {path}` fetches a model from the hub")
        hub_name = None if Path(model).exists() else HubName.parse(model)
        source = model if hub_name is None else hub_name.model
        shown = name or source.rstrip("/").split("/")[-1]
        aliases = tuple({source} - {shown}) if "/" in source and not Path(source).exists() else ()
        if not args.models:  # the name that the default model had before it had one of its own
            aliases = ("built-in",)
        info = ModelInfo(shown, aliases, state="unloaded")
        entries.append(ModelEntry(info, partial(_plan_model, args, path, shown, many_streams)))
    if len({entry.info.name for entry in entries}) < len(entries):
        raise InvalidRequest("two models have the same name: give them names, for example a=./one b=./two")
    return entries


async def _plan_model(args: argparse.Namespace, path: Path, name: str, many_streams: int | None) -> PlannedModel:
    """Plan the model in ``path`` as the flags say."""
    import asyncio

    with collection_paused():
        from moesaic.plan import make_plan
        from moesaic.serve.model_entry import PlannedModel

    plan = await asyncio.get_running_loop().run_in_executor(None, make_plan, path, served_options(args, path))
    show_plan(args, plan)
    return PlannedModel(plan.bytes, partial(open_model, plan, args, name, many_streams))


def served_options(args: argparse.Namespace, path: Path) -> LoadOptions:
    """Return the options of the flags, with the context that a server gives the built-in model if no flag does."""
    from moesaic import builtin

    return load_options(args, context=builtin.served_context(path) if args.context is None else args.context)


async def open_model(plan: Plan, args: argparse.Namespace, name: str, many_streams: int | None) -> Backend:
    """Load the model of ``plan``, with the limits and the chat format of the flags, and return its backend."""
    import asyncio

    from moesaic.classifier import Classifier
    from moesaic.classifier_backend import LocalClassifierBackend
    from moesaic.engine import Limits
    from moesaic.llm import LLM
    from moesaic.local_backend import MANY_STREAMS, LocalBackend

    limits = Limits()
    if args.sequences is not None:
        limits = replace(limits, sequences=args.sequences, batch_tokens=max(limits.batch_tokens, args.sequences))
    if args.queue is not None:
        limits = replace(limits, queue=args.queue)
    if args.batch_tokens is not None:
        limits = replace(limits, sequences=min(limits.sequences, args.batch_tokens), batch_tokens=args.batch_tokens)

    def load() -> LLM | Classifier:
        if plan.labels:
            return Classifier.from_plan(plan)
        engine = {"chat_format": args.chat_format, "limits": limits, "speculation": args.speculation or "ngram"}
        return LLM.from_plan(plan, name, **engine)

    model = await asyncio.get_running_loop().run_in_executor(None, load)
    if isinstance(model, Classifier):
        return LocalClassifierBackend(model, name)
    return LocalBackend(model, many_streams=many_streams or MANY_STREAMS)
