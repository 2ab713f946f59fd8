"""``moesaic admin``: inspect and control a running gateway or server through its admin routes.

This module needs neither torch nor the packages of a server.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from moesaic import errors
from moesaic.cli import client_options
from moesaic.cli.flags import Commands, add_command
from moesaic.errors import BadReply, ConnectionFailed, InvalidRequest, MoesaicError, Unavailable

KEY_VARIABLE = "MOESAIC_ADMIN_KEY"
TIMEOUT_SECONDS = 30.0
LOAD_SECONDS = 3600.0
"""Time limit for loading a model, and for unloading it, which waits for its answers."""
STATES = ("queued", "leased", "done", "failed", "cancelled", "dead")
ACTIONS = {
    "status": "show a summary of the gateway",
    "drain": "stop accepting requests; with NAME: give worker NAME no further jobs",
    "resume": "undo drain; with NAME: undo drain or ban of worker NAME",
    "workers": "list the workers and their jobs",
    "ban": "ban worker NAME; other workers run its jobs",
    "queues": "count waiting and running jobs by model",
    "jobs": f"list jobs in state NAME: {', '.join(STATES)}",
    "dead": "list dead letters: jobs that were tried until the crash limit",
    "job": "show job NAME; with --request, also the request of a dead job",
    "revive": "queue the dead job NAME again",
    "cancel": "cancel job NAME of any client",
    "keys": "list the API keys and their limits",
    "reload": "reload the API keys",
    "models": "list the models of a server, their states and their memory",
    "load": "load model NAME of a server",
    "unload": "unload model NAME of a server after its running answers; with --force: now",
    "presets": "list the presets of a server",
    "reload-presets": "reload the presets of a server",
}
NAMED_ACTIONS = ("ban", "jobs", "job", "revive", "cancel", "load", "unload")
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
        "inspect and control a gateway: workers, queues, dead letters, API keys; or the models of a server",
        "It needs an admin key: `moesaic keys add NAME --admin`.\n\n"
        + "\n".join(f"  {name:<14}  {about}" for name, about in ACTIONS.items()),
        "MOESAIC_ADMIN_KEY=msc-... moesaic admin workers",
        "moesaic admin dead --url https://chat.example.org --key-file admin.key --json",
        "moesaic admin drain rack-1/node-7",
        "moesaic admin unload mixtral --url http://127.0.0.1:8001",
    )
    parser.add_argument("what", choices=ACTIONS, metavar="WHAT", help="one of the actions above")
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a worker, a model, the id of a job, or a state of jobs"
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="address of the gateway or server (default http://127.0.0.1:8000)",
    )
    client_options.add_flags(parser.add_argument_group("connection"), KEY_VARIABLE, "an admin's")
    parser.add_argument("--json", action="store_true", help="print the gateway's response as JSON")
    parser.add_argument(
        "--most", type=int, default=100, metavar="N", help="with jobs and dead: list the newest N (default 100)"
    )
    parser.add_argument("--request", action="store_true", help="with job: also show the request, if the job is dead")
    parser.add_argument("--force", action="store_true", help="with unload: end running answers with an error")


def _admin(args: argparse.Namespace) -> int:
    if args.what in NAMED_ACTIONS and not args.name:
        raise InvalidRequest(f"{args.what} requires a name: `moesaic admin {args.what} NAME`")
    if args.name and args.what not in (*NAMED_ACTIONS, "drain", "resume"):
        raise InvalidRequest(f"{args.what} takes no name: leave out {args.name!r:.100}")
    client_options.check("--url", args.url, plain=args.insecure_plaintext)
    response = _send(args, *_request(args))
    if args.json:
        print(json.dumps(response, indent=1))
    else:
        print("\n".join(_lines(args.what, response)))
    return 0


def _request(args: argparse.Namespace) -> tuple[str, str, Any]:
    """Return the HTTP method, the path below /admin/ and the body of the request for an action."""
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
    if what in ("load", "unload"):
        return "POST", f"models/{quote(name, safe='')}/{what}" + "?force=true" * (what == "unload" and args.force), None
    if what in ("reload", "reload-presets"):
        return "POST", f"{'keys' if what == 'reload' else 'presets'}/reload", None
    return "GET", what, None


def _send(args: argparse.Namespace, method: str, path: str, body: Any) -> Any:
    """Send a request to the gateway and return the decoded response.

    Uses no proxy and follows no redirect, because the request carries the admin key.
    """
    import contextlib
    import http.client

    parts, key = urlsplit(args.url), client_options.key(args, KEY_VARIABLE)
    seconds = LOAD_SECONDS if args.what in ("load", "unload") else TIMEOUT_SECONDS
    headers = {"authorization": f"Bearer {key}"} if key else {}
    host = str(parts.hostname)
    try:
        connection = (
            http.client.HTTPSConnection(host, parts.port, timeout=seconds, context=client_options.trusted(args.ca))
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, parts.port, timeout=seconds)
        )
        data = None if body is None else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(
                method, f"{parts.path.rstrip('/')}/admin/{path}", data, headers | {"content-type": "application/json"}
            )
            response = connection.getresponse()
            content = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionFailed(f"{args.url:.100}: the gateway does not answer: {error}") from error
    if response.status != 200:
        raise _error(response.status, content)
    try:
        return json.loads(content)
    except ValueError as error:
        raise BadReply(f"{args.url:.100}: the response is not a gateway's: check --url") from error


def _error(status: int, content: bytes) -> MoesaicError:
    try:
        message = str(json.loads(content)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        message = f"the response has status {status}: check that --url is a gateway's address"
    return STATUSES.get(status, Unavailable if status >= 500 else BadReply)(message)


# Output

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
    "models": (
        "models",
        {
            "name": lambda row: row["name"],
            "state": lambda row: row["state"] + ", pinned" * row["pinned"],
            "GB": lambda row: "-" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f}",
            "answers": lambda row: row["running"] + row["waiting"],
            "idle": lambda row: "-" if row["idle"] is None else f"{row['idle']:.0f} s",
            "loads": lambda row: row["loads"],
            "s/load": lambda row: "-" if row["load_seconds"] is None else f"{row['load_seconds']:.1f}",
            "unloads": lambda row: sum(row["unloads"].values()),
            "presets": lambda row: ", ".join(row["presets"]) or "-",
            "error": lambda row: row["error"],
        },
    ),
    "presets": (
        "presets",
        {
            "name": lambda row: row["name"],
            "base": lambda row: row["base"],
            "sampling": lambda row: ", ".join(f"{name} {value}" for name, value in row["sampling"].items()),
            "description": lambda row: row["description"],
        },
    ),
}
ALIASES = {"dead": "jobs", "reload": "keys", "reload-presets": "presets"}
"""Actions whose response is printed like that of another action."""


def _lines(what: str, response: Mapping[str, Any]) -> list[str]:
    """Return the gateway's response to the action ``what`` as lines of text, with control characters escaped."""
    from moesaic.console.visible import one_line

    table = COLUMNS.get(ALIASES.get(what, what))
    if table is None:
        pairs = {**response, **response.get("job", {})} if what == "job" else response
        filled = {name: value for name, value in pairs.items() if name != "job" and value not in ("", None)}
        width = max(map(len, filled), default=0)
        return [f"{name:<{width}}  {one_line(_text(value))}" for name, value in filled.items()]
    field, columns = table
    rows = [[one_line(str(cell(row))) for cell in columns.values()] for row in response[field]]
    lines = _table([[name.upper() for name in columns], *rows]) if rows else [f"no {field}"]
    banned = response.get("banned")
    return [*lines, f"banned: {one_line(', '.join(banned))}"] if banned else lines


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
