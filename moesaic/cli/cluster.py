"""``moesaic gateway`` and ``moesaic worker``: one address for many machines."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import secrets
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import dialing, listening, serving
from moesaic.cli.flags import Commands, add_command
from moesaic.cli.loop import run_async
from moesaic.errors import EngineStopped, InvalidRequest, NotInstalled

if TYPE_CHECKING:
    from moesaic.backend import Backend
    from moesaic.cluster.gateway import Gateway
    from moesaic.cluster.worker.agent import Worker
    from moesaic.serve.endpoint import Endpoint

CROWD = 4
"""Of a worker's answers; see ``Local``: each look is a message to the gateway, and a gateway that sends on."""
VARIABLE = "MOESAIC_WORKER_KEY"


def add_gateway(commands: Commands) -> None:
    parser = add_command(
        commands,
        "gateway",
        _gateway,
        "one address for many workers: takes requests in, keeps them, and never loses one",
        "Needs no model and\nno torch: workers dial in and do the work. What it offers is what `moesaic serve` does.",
        "moesaic gateway --keys keys.json --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem",
        "moesaic gateway --jobs postgresql://jobs@db/moesaic",
    )
    jobs = parser.add_argument_group("jobs")
    jobs.add_argument(
        "--jobs", metavar="WHERE", help="a file, or postgresql://...; default: moesaic/jobs.sqlite under XDG_STATE_HOME"
    )
    jobs.add_argument(
        "--model", action="append", metavar="NAME", help="a model to take requests for before a worker has come"
    )
    jobs.add_argument("--queue", type=int, metavar="N", help="jobs that may wait; more get 503 (default 10000)")
    jobs.add_argument("--queue-per-key", type=int, metavar="N", help="of one key; more get 429 (default 2000)")
    jobs.add_argument(
        "--lease", type=float, default=10.0, metavar="S", help="a worker silent for so long is lost (default 10)"
    )
    jobs.add_argument(
        "--crashes",
        type=int,
        metavar="N",
        help="a request at hand when so many workers died, alone at last, is set aside (default 3)",
    )
    jobs.add_argument(
        "--aime-endpoints",
        action="append",
        type=Path,
        metavar="PATH",
        help="endpoint files of AIME's server, or a folder of them",
    )
    listening.add_flags(parser)
    about = "routes for administrators: on this port of 127.0.0.1 and nowhere else (0: any free one)"
    parser.add_argument("--admin-port", type=int, metavar="N", help=about)
    parser.set_defaults(host="127.0.0.1", port=8000)


def _gateway(args: argparse.Namespace) -> int:
    listening.need_packages()
    from moesaic.cluster import admin, routes
    from moesaic.cluster.aime import clients, settings, workers
    from moesaic.cluster.metrics import ClusterCollector

    if not args.lease > 0:
        raise InvalidRequest(f"--lease: is {args.lease:g}, expected more than 0")
    given = [found for path in args.aime_endpoints or () for found in settings.read(path)]
    names = {each.name for each in given}
    known = settings.check_definitions([*(each for each in settings.shipped() if each.name not in names), *given])

    def all_routes(gateway: Gateway) -> Iterable[Endpoint]:
        aime = [*clients.endpoints(gateway, known), *workers.endpoints(gateway.leases, gateway, known, args.lease)]
        return [*routes.endpoints(gateway), *aime, *admin.endpoints(gateway)]

    bounds = listening.settings(args, admin_port=args.admin_port)
    return listening.serve(args, bounds, lambda: _open(args), all_routes, ClusterCollector)


async def _open(args: argparse.Namespace) -> Gateway:
    from moesaic.cluster.gateway import Gateway
    from moesaic.cluster.jobs import StoreLimits
    from moesaic.cluster.store import open_store

    given = {"queued": args.queue, "queued_per_tenant": args.queue_per_key, "crashes": args.crashes}
    limits = StoreLimits(**{name: value for name, value in given.items() if value is not None})
    return Gateway(await open_store(args.jobs or str(_default_jobs()), limits), args.model or (), args.lease)


def _default_jobs() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moesaic"
    state.mkdir(parents=True, exist_ok=True)
    return state / "jobs.sqlite"


def add_worker(commands: Commands) -> None:
    parser = add_command(
        commands,
        "worker",
        _worker,
        "do the work of a gateway with models on this machine",
        "Dials out and needs no open port.\n"
        "SIGTERM: ends what runs, gives the rest back. Exit code 70: the engine was lost, start it again.",
        "moesaic worker --gateway http://127.0.0.1:8000",
        "MOESAIC_WORKER_KEY=msc-... moesaic worker ./mixtral-q4 --gateway https://chat.example.org --slots 32",
    )
    serving.add_models(parser)
    work = parser.add_argument_group("work")
    work.add_argument("--gateway", action="append", metavar="URL", help="several: the next when one does not answer")
    dialing.add_flags(work, VARIABLE, "a worker's")
    work.add_argument("--api-server", metavar="URL", help="work for AIME's API server instead of a gateway")
    work.add_argument("--api-auth-key", metavar="KEY", help="of AIME's server, for the job type; or MOESAIC_WORKER_KEY")
    work.add_argument("--job-type", metavar="NAME", help="of AIME's server: mixtral, llama3, ...")
    work.add_argument("--name", help="unique among the workers of a gateway; default: this machine's, and a random end")
    work.add_argument("--slots", type=int, metavar="N", help="jobs at once (default: --sequences, 64)")
    work.add_argument("--drain-timeout", type=float, default=30.0, metavar="S", help="after SIGTERM (default 30)")
    out = parser.add_argument_group("logs")
    out.add_argument("--log-format", choices=("json", "text"), default="json")
    out.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def _worker(args: argparse.Namespace) -> int:
    listening.need_packages()
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise NotInstalled("a worker needs aiohttp: pip install 'moesaic[worker]'") from error
    from moesaic.serve import logs

    if bool(args.gateway) == bool(args.api_server):
        raise InvalidRequest("whom to work for? --gateway URL, or --api-server URL")
    if args.api_server and not args.job_type:
        raise InvalidRequest("which jobs of AIME's server? --job-type mixtral, or llama3, ...")
    for url in args.gateway or [args.api_server]:
        dialing.check("--gateway" if args.gateway else "--api-server", url, plain=args.insecure_plaintext)
    args.batch_tokens = None
    key, trusted = dialing.key(args, VARIABLE), dialing.trusted(args.ca)
    logs.set_up(args.log_level, as_json=args.log_format == "json")
    return run_async(_work(args, key, trusted))


async def _work(args: argparse.Namespace, key: str | None, trusted: Any) -> int:
    from moesaic.cluster.launch import LOST_ENGINE
    from moesaic.cluster.worker.agent import Worker
    from moesaic.engine import Limits

    models = await serving.model_manager(args, CROWD)
    slots = args.slots or args.sequences or Limits().sequences
    name = args.name or f"{platform.node()}-{secrets.token_hex(4)}"
    about = {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
    if args.api_server:
        return await _work_for_aime(args, models, key or "", slots)
    worker = Worker(models, args.gateway, name=name, key=key, slots=slots, about=about, ssl=trusted)
    _obey_signals(worker, args.drain_timeout)
    try:
        await worker.run()
    except EngineStopped as error:
        import logging

        logging.getLogger("moesaic.worker").error("the engine was lost", extra={"why": str(error)})
        os._exit(LOST_ENGINE)  # its thread may be inside the model for ever
    await models.close()
    return 0


async def _work_for_aime(args: argparse.Namespace, models: Backend, key: str, slots: int) -> int:
    from moesaic.cluster.aime import worker

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    given = {"slots": slots, "name": args.name or "", "stop": stop, "drain_seconds": args.drain_timeout}
    await worker.work(models, args.api_server, args.job_type, args.api_auth_key or key, **given)
    await models.close()
    return 0


def _obey_signals(worker: Worker, seconds: float) -> None:
    """Have a first SIGTERM or SIGINT end what runs, and a second everything."""
    loop, draining = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    def end() -> None:
        if draining:
            worker.stopped.set()
        draining.append(asyncio.ensure_future(worker.drain(seconds)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
