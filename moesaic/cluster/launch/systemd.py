"""systemd launcher: a template unit; each instance is a worker that is restarted after failures.

The unit follows systemd.service(5), systemd.exec(5) and systemd.unit(5), version 252.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from moesaic.cluster.launch import LOST_ENGINE, REFUSED, Plan, value, without
from moesaic.errors import InvalidRequest

NAME = "moesaic-worker@.service"
UNQUOTED = re.compile(r"[A-Za-z0-9_@+=:,./-]+")

UNIT = """\
# Instances are named by integers{numbers}:
#   systemctl enable --now moesaic-worker@{range}
[Unit]
Description=Moesaic worker %i
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={command}
Restart=always
RestartSec=5
RestartForceExitStatus={lost}
RestartPreventExitStatus={refused}
TimeoutStopSec={stop}
User=moesaic
CacheDirectory=moesaic
Environment=XDG_CACHE_HOME=%C/moesaic HF_HOME=%C/moesaic/huggingface
{settings}LimitCORE=0
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateDevices={private}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
"""


def files(plan: Plan) -> Mapping[str, str]:
    """Return the template unit, by its file name.

    Raises:
        InvalidRequest: a worker needs more than one GPU, or the program is not an absolute path.
    """
    if plan.gpus > 1:
        raise InvalidRequest(
            "--gpus: must be 0 or 1, because systemd assigns no GPUs; an instance uses the GPU of its number"
        )
    if not PurePosixPath(plan.program).is_absolute():
        raise InvalidRequest(f"--program: systemd needs an absolute path, not {plan.program!r:.100}")
    first = 0 if plan.gpus else 1
    last = first + plan.replicas - 1
    key = value(plan.worker, "--key-file")
    flags = [_quoted(word) for word in (without(plan.worker, "--key-file") if key else plan.worker)]
    if key:
        flags += ["--key-file", "%d/worker.key"]
    settings = [f"LoadCredential=worker.key:{_quoted(key)}"] if key else []
    settings += ["Environment=CUDA_VISIBLE_DEVICES=%i"] if plan.gpus else []
    settings += [f"CPUQuota={round(100 * plan.cpus)}%"] if plan.cpus else []
    in_home = any(PurePosixPath(word).is_relative_to(home) for word in plan.worker for home in ("/home", "/root"))
    return {
        NAME: UNIT.format(
            numbers=", the numbers of their GPUs" if plan.gpus else "",
            range=f"{first}.service" if first == last else f"{{{first}..{last}}}.service",
            command=" ".join([_quoted(plan.program), "worker", *flags, "--name", "%H-%i"]),
            lost=LOST_ENGINE,
            refused=REFUSED,
            stop=round(plan.drain_seconds) + 15,
            settings="".join(f"{line}\n" for line in settings),
            home="read-only" if in_home else "yes",
            private="no" if plan.gpus or (value(plan.worker, "--device") or "cpu") != "cpu" else "yes",
        )
    }


def _quoted(word: str) -> str:
    """Return a word escaped for a unit: systemd interprets quotes, backslashes, variables and specifiers."""
    escaped = word.replace("%", "%%").replace("$", "$$")
    return word if UNQUOTED.fullmatch(word) else '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'
