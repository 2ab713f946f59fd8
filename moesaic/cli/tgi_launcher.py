"""Translate the flags and variables of TGI's ``text-generation-launcher`` into arguments of ``moesaic serve``.

The translation is printed at the start of the server. TGI's environment variables (a flag's name in capitals) count
only if a flag of TGI is given, or if MODEL_ID is set and there is no MODEL argument. So a PORT that is set for another
program changes nothing. Two of TGI's variables never count: HOSTNAME, which Docker and shells set to the machine's
name, and ENV. This module does not know the meaning of a single flag (see ``tgi_flags``) and starts no server.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.cli.tgi_flags import STEP_TOKENS, TABLE, Changes, Flag, Value
from moesaic.errors import InvalidRequest

PORT, TGI_PORT = 8000, 3000
HOST = "127.0.0.1"
TGI_1_3_INPUT_TOKENS = 1024
"""TGI 1.3's limit on the tokens of a prompt if --max-input-length is not given."""

BOUNDS = ("max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_input_tokens")
SHARED_FLAGS = {"port": int, "dtype": str, "kv_cache_dtype": str}
"""Flags that have the same name in TGI and here, and their types; TGI's environment variables set them too."""
FP8 = ("fp8_e4m3fn", "fp8_e5m2")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of TGI's launcher to ``parser``; --help shows those that have a help text."""
    group = parser.add_argument_group(
        "TGI's launcher",
        "Flags of text-generation-launcher, with the same meaning as far as it applies here.\n"
        "The server prints at its start how it understands each flag; see docs/how-to/migrate-from-tgi.md.\n"
        "With any of these flags the default port is 3000.",
    )
    for flag in TABLE:
        names = [f"--{flag.name}", *(f"--{alias}" if len(alias) > 1 else f"-{alias}" for alias in flag.aliases)]
        options: dict[str, Any] = {"action": "store_true"} if flag.kind is bool else {"type": flag.kind, "metavar": "V"}
        group.add_argument(*names, dest=flag.dest, default=None, help=flag.help or argparse.SUPPRESS, **options)


@dataclass(frozen=True)
class Launch:
    """Arguments of ``moesaic serve`` after the translation of TGI's flags."""

    args: argparse.Namespace
    notes: tuple[str, ...] = ()
    """Lines to print at the start, which explain the translation; empty if TGI's flags are not used."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables to set for libraries."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Values for TGI's route /info."""

    @property
    def bounds(self) -> dict[str, Any]:
        """Values of the fields of ``serve.settings.TgiBounds``."""
        limits = {name: value for name in BOUNDS if (value := getattr(self.args, name)) is not None}
        return limits | {
            "max_total_tokens": self.args.context,
            "grammar": not self.args.no_grammar,
            "launcher_info": self.info,
        }


TGI_ONLY: Changes = {
    **dict.fromkeys((*BOUNDS, "revision", "concurrent_requests", "batch_tokens", "prompts", "api_key")),
    "no_grammar": False,
}
"""Arguments that only TGI's flags can set, with their defaults."""


def translate(args: argparse.Namespace, environ: Mapping[str, str]) -> Launch:
    """Return the arguments of ``moesaic serve`` that follow from its own flags, TGI's flags and TGI's variables.

    Raises:
        InvalidRequest: a flag asks for something unsupported, or contradicts another flag.
    """
    values = {flag: value for flag in TABLE if (value := getattr(args, flag.dest)) is not None}
    as_tgi = bool(values) or args.kv_cache_dtype in FP8 or (bool(environ.get("MODEL_ID")) and not args.models)
    own = argparse.Namespace(**(TGI_ONLY | vars(args)))
    if not as_tgi:
        return Launch(_with(own, {"port": PORT if args.port is None else args.port, "host": args.host or HOST}))
    notes: list[str] = []
    from_environment = _environment(args, values, environ, notes)
    shared = _shared(args, environ, notes)
    changes: Changes = {}
    environment: dict[str, str] = {}
    info: Changes = {}
    overruled: dict[Flag, str] = {}
    for flag, value in (values | from_environment).items():
        converted = flag.convert(value) if flag.convert else {flag.argument: value} if flag.argument else {}
        if duplicate := _own_duplicate(own, converted):
            if flag not in from_environment:
                raise InvalidRequest(f"--{flag.name} and {duplicate} mean the same: pass only one of them")
            overruled[flag] = duplicate
            continue
        environment |= converted.pop("environment", {})
        changes |= converted
        info |= {flag.info_field: value} if flag.info_field else {}
    changes |= shared
    _check_sizes(changes)
    _adapt(own, changes)
    if "cache_tokens" not in changes:
        info.pop("max_batch_total_tokens", None)
    for flag, value in (values | from_environment).items():
        meaning = f"ignored: {overruled[flag]} is given" if flag in overruled else _meaning(flag, value, changes)
        notes.append(f"{_shown(flag, value, flag in from_environment)}: {meaning}")
    translated = _with(own, changes)
    return Launch(translated, (*notes, *_remarks(args, translated, changes)), environment, info)


def _with(args: argparse.Namespace, changes: Changes) -> argparse.Namespace:
    return argparse.Namespace(**(vars(args) | changes))


def _environment(
    args: argparse.Namespace, values: Mapping[Flag, Any], environ: Mapping[str, str], notes: list[str]
) -> dict[Flag, Value]:
    """Return the flags of TGI that only the environment sets, and their values; explain ignored ones in ``notes``."""
    result: dict[Flag, Value] = {}
    for flag in TABLE:
        text = environ.get(flag.variable, "") if flag.env and flag not in values else ""
        if not text:
            continue
        if flag.name == "model-id" and args.models:
            notes.append(f"MODEL_ID={text}: ignored: MODEL is on the command line")
        elif flag.kind is not bool:
            result[flag] = _parse(flag.variable, text, flag.kind)
        elif text.lower() in ("1", "true"):
            result[flag] = True
    return result


def _parse(variable: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InvalidRequest(f"{variable}={text:.40}: expected a number") from None


def _shared(args: argparse.Namespace, environ: Mapping[str, str], notes: list[str]) -> Changes:
    """Return the new values of the flags that have the same name in TGI and here; explain them in ``notes``."""
    changes: Changes = {}
    for name, kind in SHARED_FLAGS.items():
        text = environ.get(name.upper(), "")
        if text and getattr(args, name) in (None, "auto"):
            changes[name] = _parse(name.upper(), text, kind)
            notes.append(f"{name.upper()}={text}: --{name.replace('_', '-')} {text}")
    if changes.get("dtype") not in (None, "auto", "float16", "bfloat16", "float32"):
        raise InvalidRequest(f"DTYPE={changes['dtype']:.40}: expected float16, bfloat16 or float32")
    dtype = changes.get("kv_cache_dtype", args.kv_cache_dtype)
    if dtype in FP8:
        notes.append(f"--kv-cache-dtype {dtype}: int8, which takes the same memory and is more exact")
        changes["kv_cache_dtype"] = "int8"
    elif "kv_cache_dtype" in changes:
        raise InvalidRequest(f"KV_CACHE_DTYPE={dtype:.40}: expected {' or '.join(FP8)}")
    if args.port is None and "port" not in changes:
        changes["port"] = TGI_PORT
        notes.append(f"--port: {TGI_PORT}, as in TGI ({PORT} without TGI's flags)")
    return changes


def _own_duplicate(args: argparse.Namespace, converted: Changes) -> str:
    """Return the flag of ``moesaic serve`` that is given and sets the same argument as a flag of TGI, or ""."""
    for name in converted.keys() - {"otel", "environment"}:
        value = getattr(args, name, None)
        if value not in (None, [], False) and not (name == "log_format" and value == "json"):
            return "MODEL" if name == "models" else f"--{name.replace('_', '-')}"
    return ""


def _check_sizes(changes: Changes) -> None:
    """Refuse sizes that contradict each other, with TGI's own messages."""
    longest, total, batch = (changes.get(name) for name in ("max_input_tokens", "context", "cache_tokens"))
    for name, value in changes.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "port" and value <= 0:
            flag = next(flag for flag in TABLE if flag.argument == name)
            raise InvalidRequest(f"--{flag.name} {value}: expected more than 0")
    if longest is not None and total is not None and longest >= total:
        raise InvalidRequest(
            f"`max_input_tokens` must be < `max_total_tokens`. Given: {longest} and {total}: an answer needs room"
        )
    if total is not None and batch is not None and total > batch:
        raise InvalidRequest(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch}: "
            "the cache must hold at least one request"
        )


def _adapt(args: argparse.Namespace, changes: Changes) -> None:
    """Turn TGI's model id, host and sizes in ``changes`` into values that ``moesaic serve`` accepts, in place."""
    if changes.get("revision") and not changes.get("models"):
        raise InvalidRequest("--revision goes with --model-id; without --model-id, write MODEL@REVISION")
    if changes.get("models"):
        changes["models"] = [_model_argument(changes["models"], changes.get("revision"))]
    if (step := changes.get("batch_tokens")) is not None:
        changes["batch_tokens"] = min(STEP_TOKENS, step)
    context = changes.get("context") or args.context
    if context and changes.get("cache_tokens", 0) > 4 * context:
        del changes["cache_tokens"]
    changes["host"] = changes.get("host") or args.host or HOST


def _model_argument(model: str, revision: str | None) -> str:
    """Return the argument MODEL of ``moesaic serve``, with a name in front so that a path may contain "="."""
    name = model.rstrip("/").split("/")[-1].replace("=", "-")
    return f"{name}={model}" if revision is None or Path(model).exists() else f"{name}={model}@{revision}"


def _shown(flag: Flag, value: Value, in_environment: bool) -> str:
    shown = "..." if flag.name in ("api-key", "ngrok-authtoken") else value
    if in_environment:
        return f"{flag.variable}={shown}"
    return f"--{flag.name}" if flag.kind is bool else f"--{flag.name} {shown}"


def _meaning(flag: Flag, value: Value, changes: Changes) -> str:
    cache = f"--cache-tokens {value}"
    if "cache_tokens" not in changes:
        cache = "an upper bound: the cache gets 16 contexts, or fewer if they need more than a quarter of free memory"
    step = changes.get("batch_tokens")
    return flag.meaning.format(value=value, format=changes.get("format"), step=step, cache=cache)


def _remarks(original: argparse.Namespace, args: argparse.Namespace, changes: Changes) -> list[str]:
    """Return notes on differences from TGI that no flag mentions."""
    notes = []
    if args.max_input_tokens is None:
        notes.append(
            "--max-input-tokens is not given: a prompt may fill the context less one token. "
            f"TGI 1.3 would have refused more than {TGI_1_3_INPUT_TOKENS} tokens (its --max-input-length)"
        )
    if original.host is None and args.host == HOST:
        notes.append(
            f"--hostname is not given: listening on {HOST}, for this machine alone. TGI listens on 0.0.0.0 without a "
            "key; here that requires --hostname 0.0.0.0 and --api-key, --keys or --insecure-no-auth"
        )
    if args.device == "cpu":
        notes.append("--device cpu: TGI uses all GPUs; --device cuda uses one")
    if "api_key" in changes:
        notes.append(
            "--api-key: other users of this machine can see it in the process list; use API_KEY, MOESAIC_API_KEYS "
            "or --keys to hide it"
        )
    return notes
