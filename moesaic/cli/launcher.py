"""TGI's way to start a server: its launcher's flags and variables, translated into arguments of ``moesaic serve``.

What was taken as what is said once, at the start. The environment counts as TGI has it (a flag's name in capitals),
but only for whoever uses TGI's way: with one of its flags, or with MODEL_ID and no MODEL. So a PORT that is set for
something else changes nothing. Two of its variables never count: HOSTNAME, which Docker and shells set to the
machine's name, and ENV.
Does not know what a flag means (``launcher_flags``) nor how a server is started.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.cli.launcher_flags import STEP, TABLE, Changes, Flag, Value
from moesaic.errors import InvalidRequest

PORT, TGI_PORT = 8000, 3000
HOST = "127.0.0.1"
INPUT_1_3 = 1024
"""What TGI 1.3 limits prompts to where --max-input-length is not given."""

BOUNDS = ("max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_input_tokens")
SHARED = {"port": int, "dtype": str, "kv_cache_dtype": str}
"""Flags that are called alike in TGI and here, whose variables of the environment count, too."""
FP8 = ("fp8_e4m3fn", "fp8_e5m2")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of them, the useful ones with a word of help."""
    group = parser.add_argument_group(
        "TGI's launcher",
        "These, and the launcher's other flags, mean what they mean in TGI as far as that makes sense here.\n"
        "The server prints at the start how it understood them; docs/how-to/migrate-from-tgi.md lists all.\n"
        "Port: 3000 unless --port is given.",
    )
    for flag in TABLE:
        names = [f"--{flag.name}", *(f"--{each}" if len(each) > 1 else f"-{each}" for each in flag.also)]
        options: dict[str, Any] = {"action": "store_true"} if flag.kind is bool else {"type": flag.kind, "metavar": "V"}
        group.add_argument(*names, dest=flag.dest, default=None, help=flag.help or argparse.SUPPRESS, **options)


@dataclass(frozen=True)
class Launch:
    """What ``moesaic serve`` is to do, with TGI's flags translated."""

    args: argparse.Namespace
    said: tuple[str, ...] = ()
    """The translation, to be shown at the start; empty where TGI's way is not used."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that libraries read."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """For /info."""

    @property
    def bounds(self) -> dict[str, Any]:
        """The fields of ``TgiBounds``."""
        found = {name: value for name in BOUNDS if (value := getattr(self.args, name)) is not None}
        return found | {
            "max_total_tokens": self.args.context,
            "grammar": not self.args.no_grammar,
            "launcher_info": self.told,
        }


EXTRA: Changes = {
    **dict.fromkeys((*BOUNDS, "revision", "concurrent_requests", "batch_tokens", "prompts", "api_key")),
    "no_grammar": False,
}
"""Arguments that only TGI's flags set."""


def translate(args: argparse.Namespace, environ: Mapping[str, str]) -> Launch:
    """Return what the arguments mean, TGI's flags and its variables among them.

    Raises:
        InvalidRequest: a flag means something that is not possible here, or contradicts another.
    """
    values = {flag: value for flag in TABLE if (value := getattr(args, flag.dest)) is not None}
    way = bool(values) or args.kv_cache_dtype in FP8 or (bool(environ.get("MODEL_ID")) and not args.models)
    plain = argparse.Namespace(**(EXTRA | vars(args)))
    if not way:
        return Launch(_with(plain, {"port": PORT if args.port is None else args.port, "host": args.host or HOST}))
    said: list[str] = []
    from_environment = _environment(args, values, environ, said)
    shared = _shared(args, environ, said)
    changes: Changes = {}
    environment: dict[str, str] = {}
    told: Changes = {}
    overruled: dict[Flag, str] = {}
    for flag, value in (values | from_environment).items():
        made = flag.take(value) if flag.take else {flag.to: value} if flag.to else {}
        if twice := _given_twice(plain, made):
            if flag not in from_environment:
                raise InvalidRequest(f"--{flag.name} and {twice} say the same: give one of them")
            overruled[flag] = twice
            continue
        environment |= made.pop("environment", {})
        changes |= made
        told |= {flag.told: value} if flag.told else {}
    changes |= shared
    _check_sizes(changes)
    _adapt(plain, changes)
    if "cache_tokens" not in changes:
        told.pop("max_batch_total_tokens", None)
    for flag, value in (values | from_environment).items():
        why = f"ignored: {overruled[flag]} is given" if flag in overruled else _meaning(flag, value, changes)
        said.append(f"{_named(flag, value, flag in from_environment)}: {why}")
    done = _with(plain, changes)
    return Launch(done, (*said, *_remarks(args, done, changes)), environment, told)


def _with(args: argparse.Namespace, changes: Changes) -> argparse.Namespace:
    return argparse.Namespace(**(vars(args) | changes))


def _environment(
    args: argparse.Namespace, values: Mapping[Flag, Any], environ: Mapping[str, str], said: list[str]
) -> dict[Flag, Value]:
    """Return what the environment says of flags that are not on the command line."""
    found: dict[Flag, Value] = {}
    for flag in TABLE:
        text = environ.get(flag.variable, "") if flag.env and flag not in values else ""
        if not text:
            continue
        if flag.name == "model-id" and args.models:
            said.append(f"MODEL_ID={text}: ignored, for MODEL is on the command line")
        elif flag.kind is not bool:
            found[flag] = _read(flag.variable, text, flag.kind)
        elif text.lower() in ("1", "true"):
            found[flag] = True
    return found


def _read(variable: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InvalidRequest(f"{variable}={text:.40}: expected a number") from None


def _shared(args: argparse.Namespace, environ: Mapping[str, str], said: list[str]) -> Changes:
    """Return what flags that both have are to be."""
    out: Changes = {}
    for name, kind in SHARED.items():
        text = environ.get(name.upper(), "")
        if text and getattr(args, name) in (None, "auto"):
            out[name] = _read(name.upper(), text, kind)
            said.append(f"{name.upper()}={text}: --{name.replace('_', '-')} {text}")
    if out.get("dtype") not in (None, "auto", "float16", "bfloat16", "float32"):
        raise InvalidRequest(f"DTYPE={out['dtype']:.40}: expected float16, bfloat16 or float32")
    stored = out.get("kv_cache_dtype", args.kv_cache_dtype)
    if stored in FP8:
        said.append(f"--kv-cache-dtype {stored}: int8, which takes the same memory and is nearer to the exact values")
        out["kv_cache_dtype"] = "int8"
    elif "kv_cache_dtype" in out:
        raise InvalidRequest(f"KV_CACHE_DTYPE={stored:.40}: expected {' or '.join(FP8)}")
    if args.port is None and "port" not in out:
        out["port"] = TGI_PORT
        said.append(f"--port: {TGI_PORT}, as in TGI ({PORT} without its flags)")
    return out


def _given_twice(args: argparse.Namespace, made: Changes) -> str:
    """Return the flag of ours that says already what one of TGI's says; "" if there is none."""
    for name in made.keys() - {"otel", "environment"}:
        ours = getattr(args, name, None)
        if ours not in (None, [], False) and not (name == "log_format" and ours == "json"):
            return "MODEL" if name == "models" else f"--{name.replace('_', '-')}"
    return ""


def _check_sizes(changes: Changes) -> None:
    """Refuse sizes that contradict each other, as TGI does at its start."""
    longest, total, batch = (changes.get(name) for name in ("max_input_tokens", "context", "cache_tokens"))
    for name, value in changes.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "port" and value <= 0:
            flag = next(flag for flag in TABLE if flag.to == name)
            raise InvalidRequest(f"--{flag.name} {value}: expected more than 0")
    if longest is not None and total is not None and longest >= total:
        raise InvalidRequest(
            f"`max_input_tokens` must be < `max_total_tokens`. Given: {longest} and {total}: an answer needs room"
        )
    if total is not None and batch is not None and total > batch:
        raise InvalidRequest(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch}: "
            "the cache must hold one request at least"
        )


def _adapt(args: argparse.Namespace, changes: Changes) -> None:
    """Turn sizes into what they are here."""
    if changes.get("revision") and not changes.get("models"):
        raise InvalidRequest("--revision goes with --model-id; beside MODEL write MODEL@REVISION")
    if changes.get("models"):
        changes["models"] = [_model(changes["models"], changes.get("revision"))]
    if (step := changes.get("batch_tokens")) is not None:
        changes["batch_tokens"] = min(STEP, step)
    context = changes.get("context") or args.context
    if context and changes.get("cache_tokens", 0) > 4 * context:
        del changes["cache_tokens"]
    changes["host"] = changes.get("host") or args.host or HOST


def _model(given: str, revision: str | None) -> str:
    """Return MODEL as ``moesaic serve`` takes it; a name in front keeps a ``=`` in a path from being one."""
    name = given.rstrip("/").split("/")[-1].replace("=", "-")
    return f"{name}={given}" if revision is None or Path(given).exists() else f"{name}={given}@{revision}"


def _named(flag: Flag, value: Value, in_environment: bool) -> str:
    shown = "..." if flag.name in ("api-key", "ngrok-authtoken") else value
    if in_environment:
        return f"{flag.variable}={shown}"
    return f"--{flag.name}" if flag.kind is bool else f"--{flag.name} {shown}"


def _meaning(flag: Flag, value: Value, changes: Changes) -> str:
    cache = f"--cache-tokens {value}"
    if "cache_tokens" not in changes:
        cache = "a bound that is kept: the cache gets 16 contexts, as far as a quarter of the free memory holds them"
    return flag.means.format(value=value, format=changes.get("format"), step=changes.get("batch_tokens"), cache=cache)


def _remarks(given: argparse.Namespace, args: argparse.Namespace, changes: Changes) -> list[str]:
    """Return what is different from TGI though no flag says so."""
    out = []
    if args.max_input_tokens is None:
        out.append(
            "--max-input-tokens is not given: a prompt may have as many tokens as leave room for one more. "
            f"TGI 1.3 would have refused more than {INPUT_1_3} (its --max-input-length)"
        )
    if given.host is None and args.host == HOST:
        out.append(
            f"--hostname is not given: listening on {HOST}, this machine alone. TGI listens on 0.0.0.0 with no key; "
            "here that takes --hostname 0.0.0.0 and --api-key, --keys or --insecure-no-auth"
        )
    if args.device == "cpu":
        out.append("--device cpu: TGI takes all GPUs; --device cuda takes one")
    if "api_key" in changes:
        out.append("--api-key: whoever may list processes can read it; API_KEY, MOESAIC_API_KEYS and --keys keep it")
    return out
