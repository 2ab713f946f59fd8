"""SLURM launcher: a batch script whose array tasks are workers, one per node, restarted after failures.

The script follows sbatch(1). A worker cannot span several processes yet: each replica is one process with all its GPUs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from moesaic.cluster.launch import Plan

NAME = "moesaic-workers.sbatch"
EXTRA_DRAIN_SECONDS = 30
"""Seconds between the end of a worker's drain time and the time limit of the SLURM job."""

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=moesaic-worker
#SBATCH --array=1-{replicas}
#SBATCH --nodes=1
#SBATCH --ntasks=1
{resources}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#SBATCH --signal=B:USR1@{notice}
# Before the time limit, SLURM sends SIGUSR1 to this shell only. The shell sends SIGTERM to the worker, which finishes
# its jobs and releases the rest. scancel sends SIGTERM to both.
worker=
ending=
trap 'ending=yes; [ -z "$worker" ] || kill -TERM "$worker"' USR1
trap 'ending=yes' TERM
name="$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"
while [ -z "$ending" ]; do
  {command} --name "$name" &
  worker=$!
  while :; do
    wait "$worker"
    code=$?
    kill -0 "$worker" 2>/dev/null || break
  done
  worker=
  case $code in
    2) exit 2 ;; # refused: wrong flags, wrong key, or banned
    0) exit 0 ;; # stopped
    *) [ -n "$ending" ] || sleep 5 ;; # failed; 70: the engine failed
  esac
done
"""


def files(plan: Plan) -> Mapping[str, str]:
    """Return the batch script for ``sbatch``, by its file name."""
    resources = {"cpus-per-task": plan.cpus and max(1, round(plan.cpus)), "gpus-per-task": plan.gpus}
    return {
        NAME: SCRIPT.format(
            replicas=plan.replicas,
            resources="".join(f"#SBATCH --{name}={count}\n" for name, count in resources.items() if count),
            notice=round(plan.drain_seconds) + EXTRA_DRAIN_SECONDS,
            command=shlex.join([plan.program, "worker", *plan.worker]),
        )
    }
