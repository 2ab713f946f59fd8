"""``moesaic keys``: who may use a server."""

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
        "make, list and revoke API keys",
        "A key is shown once, when it is made;\nthe file keeps its digest. A server reads it again on SIGHUP.",
        "moesaic keys add anna --file keys.json --requests-per-minute 60",
        "moesaic keys add rack-1 --worker --model mixtral --file keys.json",
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
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--admin", action="store_true", help="may use the routes for administrators")
    kind.add_argument("--worker", action="store_true", help="a worker's, for a gateway: opens nothing else")
    parser.add_argument("--model", action="append", metavar="NAME", help="of a worker's key: a model that it may offer")


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
    if args.model and not args.worker:
        raise InvalidRequest("--model is for the key of a worker: give --worker too")
    limits = {name: getattr(args, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrent")}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be at least 1")
    models = tuple(args.model or ())
    written, key = keys.new(
        args.name, **limits, priority=args.priority, admin=args.admin, worker=args.worker, models=models
    )
    keys.write(args.file, (*known, key))
    print(written)
    return 0
