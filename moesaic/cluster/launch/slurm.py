"""SLURM: a batch script whose array's tasks are workers, each on a node, started again whenever it ends.

Follows sbatch(1). A worker of several ranks is not there yet: a replica is a process, with all its GPUs in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from moesaic.cluster.launch import Plan

NAME = "moesaic-workers.sbatch"
SPARE = 30
"""Seconds between the end of a drain and the end of the job."""

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
# Before the time is up this shell alone gets SIGUSR1, and the worker from it SIGTERM: it ends what it has, and gives
# the rest back. scancel sends SIGTERM to both.
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
    2) exit 2 ;; # refused: its flags, or its key, or it was dismissed
    0) exit 0 ;; # told to stop
    *) [ -n "$ending" ] || sleep 5 ;; # lost, with 70 its engine
  esac
done
"""


def files(plan: Plan) -> Mapping[str, str]:
    """Return the script, for ``sbatch``."""
    resources = {"cpus-per-task": plan.cpus and max(1, round(plan.cpus)), "gpus-per-task": plan.gpus}
    return {
        NAME: SCRIPT.format(
            replicas=plan.replicas,
            resources="".join(f"#SBATCH --{name}={count}\n" for name, count in resources.items() if count),
            notice=round(plan.drain_seconds) + SPARE,
            command=shlex.join([plan.program, "worker", *plan.worker]),
        )
    }
