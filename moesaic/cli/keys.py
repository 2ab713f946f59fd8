"""``moesaic keys``: create, list and revoke the API keys of a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from moesaic.cli.flags import Commands, add_command
from moesaic.errors import InvalidRequest, NotFound


def add_keys(commands: Commands) -> None:
    parser = add_command(
        commands,
        "keys",
        _manage,
        "create, list and revoke API keys",
        "A key is shown once, when it is created; the file stores its digest. Send SIGHUP to a server to reload "
        "the file.",
        "moesaic keys add anna --file keys.json --requests-per-minute 60",
        "moesaic keys add rack-1 --worker --model mixtral --file keys.json",
        "moesaic keys list --file keys.json",
        "moesaic keys revoke anna --file keys.json",
    )
    parser.add_argument("what", choices=("add", "list", "revoke"), help="what to do")
    parser.add_argument("name", nargs="?", help="name of the key; required for add and revoke")
    parser.add_argument("--file", type=Path, default=Path("keys.json"), help="key file (default keys.json)")
    limits = parser.add_argument_group("limits of a new key")
    limits.add_argument("--requests-per-minute", type=int, metavar="N", help="maximum requests per minute")
    limits.add_argument(
        "--tokens-per-minute", type=int, metavar="N", help="maximum tokens per minute, of prompts and answers together"
    )
    limits.add_argument("--concurrent", type=int, metavar="N", help="maximum concurrent requests")
    limits.add_argument(
        "--priority", type=int, default=0, metavar="N", help="requests with a lower number go first (default 0)"
    )
    kinds = parser.add_argument_group("kind of a new key").add_mutually_exclusive_group()
    kinds.add_argument("--admin", action="store_true", help="the key also opens the admin routes")
    kinds.add_argument("--worker", action="store_true", help="the key is for a gateway's worker and opens nothing else")
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="with --worker: a model that the worker may offer; repeatable"
    )


def _manage(args: argparse.Namespace) -> int:
    from moesaic.serve import keys

    registered = keys.read(args.file) if args.file.exists() or args.what != "add" else ()
    if args.what == "list":
        for key in registered:
            limits = {name: value for name, value in vars(key).items() if value and name not in ("name", "sha256")}
            print(key.name, *(f"{name}={value}" for name, value in limits.items()))
        return 0
    if not args.name:
        raise InvalidRequest(f"a name is required: `moesaic keys {args.what} NAME`")
    if args.what == "revoke":
        if args.name not in {key.name for key in registered}:
            raise NotFound(f"{args.file} has no key with the name {args.name!r}")
        keys.write(args.file, tuple(key for key in registered if key.name != args.name))
        return 0
    if args.name in {key.name for key in registered}:
        raise InvalidRequest(f"{args.file} already has a key with the name {args.name!r}: revoke it first")
    if args.model and not args.worker:
        raise InvalidRequest("--model applies to a worker's key: pass --worker too")
    limits = {name: getattr(args, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrent")}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')}: is {value}, expected at least 1")
    models = tuple(args.model or ())
    secret, key = keys.new(
        args.name, **limits, priority=args.priority, admin=args.admin, worker=args.worker, models=models
    )
    keys.write(args.file, (*registered, key))
    print(secret)
    return 0
