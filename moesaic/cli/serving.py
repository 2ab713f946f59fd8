"""``moesaic serve`` and ``moesaic keys``: a model behind HTTP, and who may use it."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import launcher
from moesaic.cli.flags import CACHE_DTYPES, DTYPES, Commands, add_command, folder
from moesaic.console.visible import one_line
from moesaic.errors import InvalidRequest, MoesaicError, NotFound

if TYPE_CHECKING:
    from moesaic.door import Door
    from moesaic.serve.keys import Key
    from moesaic.serve.shelf import Book


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
    net = parser.add_argument_group("network")
    net.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    net.add_argument("-p", "--port", type=int, help="default 8000; 0: any free one")
    net.add_argument("--allowed-host", action="append", metavar="NAME", help="a name clients call it by; *: any")
    net.add_argument("--cors-origin", action="append", metavar="URL", help="a page's origin that may call it")
    net.add_argument(
        "--trusted-proxy", action="append", metavar="ADDR", help="a proxy whose X-Forwarded-For is believed"
    )
    net.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    net.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")
    keys = parser.add_argument_group("keys")
    keys.add_argument(
        "--keys", type=Path, metavar="FILE", help="who may use it, see `moesaic keys`; read again on SIGHUP"
    )
    keys.add_argument("--insecure-no-auth", action="store_true", help="off loopback, let everybody in")
    how = parser.add_argument_group("limits (seconds)")
    how.add_argument("--request-timeout", type=float, metavar="S", help="the most an answer takes (default 600)")
    how.add_argument("--queue-timeout", type=float, metavar="S", help="the most it waits for its turn (default 300)")
    how.add_argument("--drain-timeout", type=float, metavar="S", help="for what runs, after SIGTERM (default 30)")
    how.add_argument("--max-body", type=int, metavar="BYTES", help="default 2 MiB")
    how.add_argument("--strict-model-name", action="store_true", help="no stand-ins such as tgi for the default model")
    out = parser.add_argument_group("logs")
    out.add_argument("--log-format", choices=("json", "text"), default="json")
    out.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    out.add_argument("--otel", action="store_true", help="traces to OTEL_EXPORTER_OTLP_ENDPOINT")
    launcher.add_flags(parser)


def need_packages() -> None:
    """Refuse to go on without the packages that serving needs.

    Raises:
        InvalidRequest: one is missing.
    """
    try:
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidRequest("serving needs more packages: pip install 'moesaic[serve]'") from error


def _serve(args: argparse.Namespace) -> int:
    need_packages()
    from moesaic.serve import front, keys, logs
    from moesaic.serve.settings import Settings, TgiBounds

    launch = launcher.translate(args, os.environ)
    args = launch.args
    os.environ.update(launch.environment)  # for the libraries that read it
    given = {
        "allowed_hosts": tuple(args.allowed_host or ()),
        "cors_origins": tuple(args.cors_origin or ()),
        "request_seconds": args.request_timeout,
        "queue_seconds": args.queue_timeout,
        "drain_seconds": args.drain_timeout,
        "body_bytes": args.max_body,
        "strict_model_name": args.strict_model_name,
        "concurrent_requests": args.concurrent_requests,
        "prompts": args.prompts,
        "tgi": TgiBounds(**launch.bounds),
        "trusted_proxies": tuple(args.trusted_proxy or ()),
    }
    named = {name: value for name, value in given.items() if value is not None}
    settings = Settings(host=args.host, port=args.port, **named)
    who = keys.Keys(_keys(args), wanted=args.keys is not None)
    if not settings.loopback and not who.wanted and not args.insecure_no_auth:
        raise InvalidRequest(
            f"{args.host} can be reached from elsewhere: give --keys FILE (`moesaic keys add` makes one), "
            "MOESAIC_API_KEYS, --api-key, or --insecure-no-auth to let everybody in"
        )
    if (args.tls_cert is None) != (args.tls_key is None):
        raise InvalidRequest("--tls-cert and --tls-key go together")
    logs.set_up(args.log_level, as_json=args.log_format == "json")
    _say(launch)
    front.prepare(settings.connections)
    listening = front.bind(settings)  # before a model is read: a port that is taken is known at once
    try:
        with asyncio.Runner(loop_factory=front.loop_factory()) as runner:
            runner.run(_run(args, settings, who, listening))
    finally:
        listening.close()
    return 0


def _say(launch: launcher.Launch) -> None:
    """Tell what TGI's flags were taken as."""
    if launch.said:
        lines = ("moesaic: TGI's flags, as they are taken here:", *(f"  {one_line(line)}" for line in launch.said))
        print("\n".join(lines), file=sys.stderr, flush=True)


async def _run(args: argparse.Namespace, settings: Any, who: Any, listening: Any) -> None:
    import logging

    from moesaic.serve import front
    from moesaic.serve.app import App
    from moesaic.serve.shelf import Shelf
    from moesaic.serve.tracing import Tracer

    log = logging.getLogger("moesaic.serve")
    tracer = Tracer() if args.otel else None
    shelf = Shelf(books(args), None if args.memory is None else int(args.memory * 1e9))
    await shelf.open(shelf.cards()[0].name)
    app = App(shelf, settings, who, tracer)

    def reload() -> None:
        try:
            who.replace(_keys(args))
            log.info("keys read again")
        except MoesaicError as error:
            log.error("the keys stay as they were", extra={"why": str(error)})

    if not settings.loopback and not args.tls_cert:
        log.warning("keys and prompts travel unencrypted: give --tls-cert, or have a proxy in front that encrypts")
    address, port = listening.getsockname()[:2]
    scheme = "https" if args.tls_cert else "http"
    log.info("serving", extra={"url": f"{scheme}://{address}:{port}", "models": [c.name for c in shelf.cards()]})
    try:
        await front.serve(app, listening, certificate=args.tls_cert, private_key=args.tls_key, reload_keys=reload)
    finally:
        if tracer:
            tracer.close()


def _keys(args: argparse.Namespace) -> tuple[Key, ...]:
    from moesaic.serve import keys

    listed = keys.read(args.keys) if args.keys else ()
    one = (keys.Key("api-key", keys.digest(args.api_key)),) if args.api_key else ()
    return (*listed, *one, *keys.from_environment(os.environ.get("MOESAIC_API_KEYS", "")))


def books(args: argparse.Namespace) -> list[Book]:
    """Return the models that were named, none of them loaded."""
    from moesaic.door import Card
    from moesaic.serve.shelf import Book

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
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path else 0
        found.append(Book(Card(shown, aliases, state="unloaded"), partial(open_model, args, path, shown), size))
    if len({book.card.name for book in found}) < len(found):
        raise InvalidRequest("two models have the same name: name them, as in a=./one b=./two")
    return found


async def open_model(args: argparse.Namespace, path: Path | None, name: str) -> Door:
    """Return the door to a model, loaded as the command line says."""
    from moesaic.classifier import Classifier
    from moesaic.engine import Limits
    from moesaic.llm import LLM
    from moesaic.loading import is_classifier
    from moesaic.local import Local, LocalClassifier

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
        return LocalClassifier(model, name)
    model.name = name
    return Local(model)


def add_keys(commands: Commands) -> None:
    parser = add_command(
        commands,
        "keys",
        _manage,
        "make, list and revoke API keys",
        "A key is shown once, when it is made;\nthe file keeps its digest. A server reads it again on SIGHUP.",
        "moesaic keys add anna --file keys.json --requests-per-minute 60",
        "moesaic keys list --file keys.json",
        "moesaic keys revoke anna --file keys.json",
    )
    parser.add_argument("what", choices=("add", "list", "revoke"))
    parser.add_argument("name", nargs="?", help="whose key")
    parser.add_argument("--file", type=Path, default=Path("keys.json"), help="default: keys.json")
    parser.add_argument("--requests-per-minute", type=int, metavar="N")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and answers")
    parser.add_argument("--concurrent", type=int, metavar="N", help="requests at the same time")
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="the lower number goes first")
    parser.add_argument("--admin", action="store_true", help="may use the routes for administrators")


def _manage(args: argparse.Namespace) -> int:
    from moesaic.serve import keys

    known = keys.read(args.file) if args.file.exists() or args.what != "add" else ()
    if args.what == "list":
        for key in known:
            limits = {name: value for name, value in vars(key).items() if value and name not in ("name", "sha256")}
            print(key.name, *(f"{name}={value}" for name, value in limits.items()))
        return 0
    if not args.name:
        raise InvalidRequest(f"whose key? `moesaic keys {args.what} NAME`")
    if args.what == "revoke":
        if args.name not in {key.name for key in known}:
            raise NotFound(f"{args.file} has no key of {args.name!r}")
        keys.write(args.file, tuple(key for key in known if key.name != args.name))
        return 0
    if args.name in {key.name for key in known}:
        raise InvalidRequest(f"{args.name!r} has a key already: revoke it first")
    limits = {name: getattr(args, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrent")}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be at least 1")
    written, key = keys.new(args.name, **limits, priority=args.priority, admin=args.admin)
    keys.write(args.file, (*known, key))
    print(written)
    return 0
