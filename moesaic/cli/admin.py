"""``moesaic admin``: look after a running gateway.

Knows the gateway's routes for administrators. Needs neither torch nor what servers need.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from moesaic import errors
from moesaic.cli import dialing
from moesaic.cli.flags import Commands, add_command
from moesaic.errors import BadReply, ConnectionFailed, InvalidRequest, MoesaicError, Unavailable

VARIABLE = "MOESAIC_ADMIN_KEY"
SECONDS = 30.0
STATES = ("queued", "leased", "done", "failed", "cancelled", "dead")
WHAT = {
    "status": "the gateway at a glance",
    "drain": "take no new requests; with NAME: give that worker nothing more",
    "resume": "take that back; with NAME: that worker may work again, also a banned one",
    "workers": "who works, on what, since when",
    "ban": "ban worker NAME; other workers take over its jobs",
    "queues": "what waits and runs, by model",
    "jobs": f"those of state NAME: {', '.join(STATES)}",
    "dead": "the dead letters: jobs that every worker died of",
    "job": "job NAME; with --request, of a dead one, what was asked",
    "revive": "queue the dead job NAME again",
    "cancel": "cancel job NAME, whosever it is",
    "keys": "names and limits",
    "reload": "have the keys read again",
}
NAMED = ("ban", "jobs", "job", "revive", "cancel")
STATUSES: Mapping[int, type[MoesaicError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    429: errors.Overloaded,
}


def add_admin(commands: Commands) -> None:
    parser = add_command(
        commands,
        "admin",
        _admin,
        "look after a gateway: workers, queues, dead letters, keys",
        "Needs a key that was made\nwith `moesaic keys add NAME --admin`.\n\n"
        + "\n".join(f"  {name:<8}  {about}" for name, about in WHAT.items()),
        "MOESAIC_ADMIN_KEY=msc-... moesaic admin workers",
        "moesaic admin dead --url https://chat.example.org --key-file admin.key --json",
        "moesaic admin drain rack-1/node-7",
    )
    parser.add_argument("what", choices=WHAT, metavar="WHAT", help="see above")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a worker, a job or a state: see above")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway's; default: http://127.0.0.1:8000")
    dialing.add_flags(parser.add_argument_group("connection"), VARIABLE, "an admin's")
    parser.add_argument("--json", action="store_true", help="what the gateway said, as JSON")
    parser.add_argument("--most", type=int, default=100, metavar="N", help="of jobs: the newest N (default 100)")
    parser.add_argument("--request", action="store_true", help="with job: what was asked, of a dead one")


def _admin(args: argparse.Namespace) -> int:
    if args.what in NAMED and not args.name:
        raise InvalidRequest(f"which? `moesaic admin {args.what} NAME`")
    if args.name and args.what not in (*NAMED, "drain", "resume"):
        raise InvalidRequest(f"{args.what} takes no name")
    dialing.check("--url", args.url, plain=args.insecure_plaintext)
    said = _ask(args, *_request(args))
    if args.json:
        print(json.dumps(said, indent=1))
    else:
        print("\n".join(_lines(args.what, said)))
    return 0


def _request(args: argparse.Namespace) -> tuple[str, str, Any]:
    """Return method, path and body."""
    what, name = args.what, args.name
    if what in ("drain", "resume", "ban"):
        return ("POST", f"workers/{what}", {"name": name}) if name else ("POST", what, None)
    if what in ("jobs", "dead"):
        return "GET", f"jobs?state={quote(name or 'dead', safe='')}&most={args.most}", None
    if what in ("job", "cancel", "revive"):
        path = f"jobs/{quote(name, safe='')}"
        if what == "job":
            return "GET", path + "?request=true" * args.request, None
        return ("DELETE", path, None) if what == "cancel" else ("POST", f"{path}/revive", None)
    return ("POST", "keys/reload", None) if what == "reload" else ("GET", what, None)


def _ask(args: argparse.Namespace, method: str, path: str, body: Any) -> Any:
    """Ask the gateway itself: past proxies, and nowhere that it would send us, as the key goes along."""
    import contextlib
    import http.client

    parts, key = urlsplit(args.url), dialing.key(args, VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    host = str(parts.hostname)
    try:
        connection = (
            http.client.HTTPSConnection(host, parts.port, timeout=SECONDS, context=dialing.trusted(args.ca))
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, parts.port, timeout=SECONDS)
        )
        sent = None if body is None else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(
                method, f"{parts.path.rstrip('/')}/admin/{path}", sent, headers | {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            content = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionFailed(f"{args.url:.100}: no answer: {error}") from error
    if answer.status != 200:
        raise _refusal(answer.status, content)
    try:
        return json.loads(content)
    except ValueError as error:
        raise BadReply(f"{args.url:.100}: what answers there is no gateway") from error


def _refusal(status: int, content: bytes) -> MoesaicError:
    try:
        message = str(json.loads(content)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        message = f"it answered {status}: is this a gateway's address?"
    return STATUSES.get(status, Unavailable if status >= 500 else BadReply)(message)


# What is shown

Row = Mapping[str, Any]
COLUMNS: Mapping[str, tuple[str, Mapping[str, Callable[[Row], Any]]]] = {
    "workers": (
        "workers",
        {
            "name": lambda row: row["name"],
            "state": lambda row: "drained" if row["drained"] else "quarantined" if row["quarantined"] else "working",
            "models": lambda row: ", ".join(row["models"]),
            "jobs": lambda row: f"{len(row['jobs'])}/{row['slots']}",
            "since": lambda row: time.strftime("%Y-%m-%d %H:%M", time.localtime(row["since"])),
            "heard": lambda row: f"{row['heard']:.1f} s ago",
            "about": lambda row: ", ".join(f"{name} {value}" for name, value in row["about"].items()),
        },
    ),
    "queues": (
        "queues",
        {
            "model": lambda row: row["model"],
            "workers": lambda row: row["workers"],
            "slots": lambda row: row["slots"],
            "queued": lambda row: row["queued"],
            "running": lambda row: row["leased"],
            "suspects": lambda row: row["suspects"],
            "tokens": lambda row: row["cost"],
        },
    ),
    "jobs": (
        "jobs",
        {
            "id": lambda row: row["id"],
            "state": lambda row: row["state"],
            "model": lambda row: row["model"],
            "key": lambda row: row["key"] or "-",
            "tokens": lambda row: row["cost"],
            "worker": lambda row: row["worker"] or "-",
            "tries": lambda row: row["attempts"],
            "lost": lambda row: row["crashes"],
            "events": lambda row: row["events"],
        },
    ),
    "keys": (
        "keys",
        {
            "name": lambda row: row["name"],
            "kind": lambda row: row["kind"],
            "requests/min": lambda row: row["requests_per_minute"] or "-",
            "tokens/min": lambda row: row["tokens_per_minute"] or "-",
            "at once": lambda row: row["concurrent"] or "-",
            "priority": lambda row: row["priority"],
            "models": lambda row: ", ".join(row["models"]) or "any",
        },
    ),
}
SAME = {"dead": "jobs", "reload": "keys"}


def _lines(what: str, said: Mapping[str, Any]) -> list[str]:
    """Return what was said as lines; nothing in it can drive the terminal."""
    from moesaic.console.visible import one_line

    shown = COLUMNS.get(SAME.get(what, what))
    if shown is None:
        pairs = {**said, **said.get("job", {})} if what == "job" else said
        kept = {name: value for name, value in pairs.items() if name != "job" and value not in ("", None)}
        width = max(map(len, kept), default=0)
        return [f"{name:<{width}}  {one_line(_plain(value))}" for name, value in kept.items()]
    field, columns = shown
    rows = [[one_line(str(read(row))) for read in columns.values()] for row in said[field]]
    lines = _table([[name.upper() for name in columns], *rows]) if rows else [f"no {field}"]
    return [*lines, f"banned: {one_line(', '.join(said['banned']))}"] if said.get("banned") else lines


def _plain(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
