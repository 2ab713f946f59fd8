"""``moesaic launch``: start workers on many machines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moesaic import registry
from moesaic.cli.cluster import add_worker
from moesaic.cli.flags import Commands, add_command
from moesaic.errors import InvalidRequest


def add_launch(commands: Commands) -> None:
    launchers = registry.names("cluster/launch")
    parser = add_command(
        commands,
        "launch",
        _launch,
        f"start workers on many machines, with one of: {', '.join(launchers)}",
        "All arguments after --worker are passed to `moesaic worker`. For systemd and SLURM, the command prints a "
        "service or batch file, or writes it with --to. For Ray, it runs until it gets SIGTERM.",
        "moesaic launch systemd --replicas 4 --gpus 1 --to . --worker /srv/mixtral-q4 --gateway https://chat.example.org",
        "moesaic launch slurm --replicas 16 --cpus 32 --worker /srv/mixtral-q4 --gateway https://chat.example.org",
        "moesaic launch ray --replicas 8 --gpus 1 --worker /srv/mixtral-q4 --device cuda --gateway https://chat.example.org",
    )
    parser.add_argument("launcher", choices=launchers, help="system that starts the workers")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="number of workers (default 1)")
    parser.add_argument("--cpus", type=float, metavar="N", help="CPUs per worker")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs per worker (default 0)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write the file to this folder instead of printing it")
    about = "all further arguments: the arguments of `moesaic worker`"
    parser.add_argument("--worker", nargs=argparse.REMAINDER, default=[], metavar="...", help=about)
    parser.add_argument(
        "--program", metavar="PATH", help="path of `moesaic` on the workers' machines; default: the same as here"
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="address of the Ray cluster; default: $RAY_ADDRESS, or this node's"
    )


def _launch(args: argparse.Namespace) -> int:
    from moesaic.cluster import launch

    # Errors in the worker's flags are reported here, not later on every machine.
    worker = _worker_parser().parse_args(["worker", *args.worker])
    program = args.program or str(Path(sys.executable).with_name("moesaic"))
    plan = launch.Plan(
        tuple(args.worker), args.replicas, args.cpus, args.gpus, program, args.address, worker.drain_timeout
    )
    launcher = launch.load(args.launcher)
    files = launcher.files(plan)
    if not files:
        from moesaic.serve import logs

        logs.set_up("info", as_json=True)
        return int(launcher.run(plan))
    for name, content in files.items():
        if args.to is None:
            print(content, end="")
        else:
            _write(args.to / name, content)
    return 0


def _worker_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moesaic")
    add_worker(parser.add_subparsers(metavar="COMMAND", required=True))
    return parser


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be written: {error.strerror}") from error
    print(path)
