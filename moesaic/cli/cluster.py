"""``moesaic gateway`` and ``moesaic worker``: one address for the models of many machines."""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import client_options, server_options, serving
from moesaic.cli.event_loop import run_async
from moesaic.cli.flags import Commands, add_command
from moesaic.errors import EngineStopped, InvalidRequest, MoesaicError, NotInstalled

if TYPE_CHECKING:
    from moesaic.backend import Backend
    from moesaic.cluster.gateway import Gateway
    from moesaic.cluster.worker.agent import Worker
    from moesaic.serve.endpoint import Endpoint
    from moesaic.serve.presets import PresetBackend

MANY_STREAMS = 4
"""Running answers above which a worker polls its engine less often: each poll costs a message to the gateway."""
KEY_VARIABLE = "MOESAIC_WORKER_KEY"


def add_gateway(commands: Commands) -> None:
    parser = add_command(
        commands,
        "gateway",
        _gateway,
        "serve the models of many workers at one address, with a durable queue of requests",
        "The gateway offers the same APIs as `moesaic serve`. It loads no model and does not need torch: workers "
        "connect to it and run the requests. Accepted requests survive crashes of workers and of the gateway.",
        "moesaic gateway",
        "moesaic gateway --keys keys.json --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem",
        "moesaic gateway --jobs postgresql://jobs@db/moesaic",
    )
    jobs = parser.add_argument_group("jobs")
    jobs.add_argument(
        "--jobs",
        metavar="WHERE",
        help="job store: a file or postgresql://...; default: moesaic/jobs.sqlite in $XDG_STATE_HOME",
    )
    jobs.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="accept requests for this model before a worker offers it; repeatable",
    )
    jobs.add_argument(
        "--queue", type=int, metavar="N", help="maximum waiting jobs; further requests get 503 (default 10000)"
    )
    jobs.add_argument(
        "--queue-per-key",
        type=int,
        metavar="N",
        help="maximum waiting jobs of an API key; further requests get 429 (default 2000)",
    )
    jobs.add_argument(
        "--lease",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds without a message after which a worker counts as lost (default 10)",
    )
    jobs.add_argument(
        "--crashes",
        type=int,
        metavar="N",
        help="worker crashes after which a job is a dead letter; the last try runs alone on its worker (default 3)",
    )
    jobs.add_argument(
        "--aime-endpoints",
        action="append",
        type=Path,
        metavar="PATH",
        help="endpoint file of an AIME API server, or a folder of such files; repeatable",
    )
    server_options.add_flags(parser)
    server_options.add_admin_port(parser)
    parser.set_defaults(host="127.0.0.1", port=8000)


def _gateway(args: argparse.Namespace) -> int:
    server_options.require_packages()
    from moesaic.cluster import admin, routes
    from moesaic.cluster.aime import clients, settings, workers
    from moesaic.cluster.metrics import ClusterCollector

    if not args.lease > 0:
        raise InvalidRequest(f"--lease: is {args.lease:g}, expected more than 0")
    custom = [endpoint for path in args.aime_endpoints or () for endpoint in settings.read(path)]
    names = {endpoint.name for endpoint in custom}
    built_in = [endpoint for endpoint in settings.shipped() if endpoint.name not in names]
    aime_endpoints = settings.check_definitions([*built_in, *custom])

    def all_routes(gateway: Gateway) -> Iterable[Endpoint]:
        aime_workers = workers.endpoints(gateway.leases, gateway, aime_endpoints, args.lease)
        aime = [*clients.endpoints(gateway, aime_endpoints), *aime_workers]
        return [*routes.endpoints(gateway), *aime, *admin.endpoints(gateway)]

    server_settings = server_options.settings(args, admin_port=args.admin_port)
    return server_options.serve(args, server_settings, lambda: _open_gateway(args), all_routes, ClusterCollector)


async def _open_gateway(args: argparse.Namespace) -> Gateway:
    from moesaic.cluster.gateway import Gateway
    from moesaic.cluster.jobs import StoreLimits
    from moesaic.cluster.store import open_store

    given = {"queued": args.queue, "queued_per_tenant": args.queue_per_key, "crashes": args.crashes}
    limits = StoreLimits(**{name: value for name, value in given.items() if value is not None})
    return Gateway(await open_store(args.jobs or str(_default_store()), limits), args.model or (), args.lease)


def _default_store() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moesaic"
    state.mkdir(parents=True, exist_ok=True)
    return state / "jobs.sqlite"


def add_worker(commands: Commands) -> None:
    parser = add_command(
        commands,
        "worker",
        _worker,
        "run a gateway's requests with models on this machine",
        "The worker connects to the gateway and needs no open port. On SIGTERM it finishes its running jobs and "
        "returns the others. Exit code 70 means that the engine failed and the worker should be restarted.",
        "moesaic worker --gateway http://127.0.0.1:8000",
        "MOESAIC_WORKER_KEY=msc-... moesaic worker ./mixtral-q4 --gateway https://chat.example.org --slots 32",
    )
    serving.add_models(parser)
    gateway = parser.add_argument_group("gateway")
    gateway.add_argument(
        "--gateway",
        action="append",
        metavar="URL",
        help="the gateway's address; if repeated, the worker tries the next address when one does not answer",
    )
    client_options.add_flags(gateway, KEY_VARIABLE, "a worker's")
    gateway.add_argument(
        "--name", help="name of the worker, unique for the gateway; default: host name and a random suffix"
    )
    gateway.add_argument("--slots", type=int, metavar="N", help="maximum concurrent jobs (default: --sequences, or 64)")
    gateway.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds to finish running jobs after SIGTERM (default 30)",
    )
    aime = parser.add_argument_group("AIME API server, instead of a gateway")
    aime.add_argument("--api-server", metavar="URL", help="address of an AIME API server")
    aime.add_argument(
        "--api-auth-key", metavar="KEY", help=f"authorization key of the job type; default: ${KEY_VARIABLE}"
    )
    aime.add_argument("--job-type", metavar="NAME", help="job type on the AIME API server: mixtral, llama3, ...")
    server_options.add_log_flags(parser)


def _worker(args: argparse.Namespace) -> int:
    server_options.require_packages()
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise NotInstalled("a worker needs aiohttp: pip install 'moesaic[worker]'") from error
    from moesaic.serve import logs

    if bool(args.gateway) == bool(args.api_server):
        raise InvalidRequest("pass either --gateway URL or --api-server URL")
    if args.api_server and not args.job_type:
        raise InvalidRequest("--api-server requires a job type: --job-type mixtral, llama3, ...")
    for url in args.gateway or [args.api_server]:
        client_options.check("--gateway" if args.gateway else "--api-server", url, plain=args.insecure_plaintext)
    args.batch_tokens = None
    key, trusted = client_options.key(args, KEY_VARIABLE), client_options.trusted(args.ca)
    logs.set_up(args.log_level, as_json=args.log_format == "json")
    return run_async(_run_worker(args, key, trusted))


async def _run_worker(args: argparse.Namespace, key: str | None, trusted: Any) -> int:
    import asyncio

    from moesaic.cluster.launch import LOST_ENGINE
    from moesaic.cluster.worker.agent import Worker
    from moesaic.engine import Limits

    models = await serving.open_models(args, MANY_STREAMS)
    slots = args.slots or args.sequences or Limits().sequences
    name = args.name or f"{platform.node()}-{secrets.token_hex(4)}"
    about = {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
    if args.api_server:
        return await _run_aime_worker(args, models, key or "", slots)
    worker = Worker(models, args.gateway, name=name, key=key, slots=slots, about=about, ssl=trusted)
    _drain_on_signal(worker, args.drain_timeout)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, models)
    try:
        await worker.run()
    except EngineStopped as error:
        import logging

        logging.getLogger("moesaic.worker").error("engine failed", extra={"why": str(error)})
        os._exit(LOST_ENGINE)  # the engine's thread may never return from the model
    await models.close()
    return 0


def _reload(presets: PresetBackend[Any]) -> None:
    """Read the presets again. The worker announces them with its next renewal of leases."""
    import logging

    log = logging.getLogger("moesaic.worker")
    try:
        presets.reload()
        log.info("presets reloaded")
    except MoesaicError as error:
        log.error("presets not reloaded", extra={"why": str(error)})


async def _run_aime_worker(args: argparse.Namespace, models: Backend, key: str, slots: int) -> int:
    import asyncio

    from moesaic.cluster.aime import worker

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    options = {"slots": slots, "name": args.name or "", "stop": stop, "drain_seconds": args.drain_timeout}
    await worker.work(models, args.api_server, args.job_type, args.api_auth_key or key, **options)
    await models.close()
    return 0


def _drain_on_signal(worker: Worker, seconds: float) -> None:
    """Drain the worker on the first SIGTERM or SIGINT; stop it at once on the second."""
    import asyncio

    loop, drains = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    def drain_or_stop() -> None:
        if drains:
            worker.stopped.set()
        drains.append(asyncio.ensure_future(worker.drain(seconds)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain_or_stop)
