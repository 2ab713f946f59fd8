"""Origin of a measurement: machine, versions, command, date and commit; and the memory of this process.

This module writes JSON records for docs/results. It does not know what is measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesaic import memory

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")


def record(command: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of a measurement: ``figures``, with the command, date, commit, machine and versions."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "figures": dict(figures),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record to the file ``path``; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """Return the machine's processor, the cores that this process may use, the memory in GiB, and the system."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def resident() -> dict[str, int]:
    """Return the memory of this process in bytes; values that the system does not provide are left out.

    ``peak`` is the maximum resident memory since the start or since ``forget_peak``. ``anonymous`` is memory without a
    file, in which a page counts when it was written; ``huge`` is the part of it in pages of 2 MiB. ``file`` is the
    resident part of mapped files.
    """
    status, rollup = memory.kilobytes(Path("/proc/self/status")), memory.kilobytes(Path("/proc/self/smaps_rollup"))
    values = {"peak": status.get("VmHWM"), "anonymous": status.get("RssAnon"), "file": status.get("RssFile")}
    values["huge"] = rollup.get("AnonHugePages")
    return {name: value for name, value in values.items() if value is not None}


def forget_peak() -> None:
    """Reset the peak memory of this process that ``resident`` returns, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _processor() -> str:
    """Return the processor's name, family, model and stepping; a virtual machine may hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    numbers = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts)
    return f"{facts.get('model name', platform.processor())} ({numbers})"


def commit() -> str | None:
    """Return the Git commit of the running source, with "-changed" if files differ from it; None without a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else "")
