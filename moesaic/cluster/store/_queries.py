"""Read operations, and the deletion of old jobs, as SQL programs (see ``_program``).

This module does not depend on a particular database.
"""

from __future__ import annotations

from moesaic.cluster.jobs import JobSnapshot, JobState, LeaseStatus, LeaseToken, LogRecord, QueueDepth, StoreLimits
from moesaic.cluster.store._fair_queueing import COLUMNS, Row
from moesaic.cluster.store._operations import storable
from moesaic.cluster.store._program import ExecuteMany, Outcome, SqlProgram, Statement

MAX_DROPPED = 500
"""Maximum number of jobs that one operation deletes, so that other operations are not delayed."""

_SNAPSHOT = f"""SELECT {COLUMNS}, (SELECT body FROM bodies WHERE bodies.seq = jobs.seq),
    (SELECT result FROM results WHERE results.seq = jobs.seq) FROM jobs WHERE id = ?"""
_AHEAD = """SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND suspect = 0 AND model = ?
    AND (priority, turn, seq) < (?, ?, ?)"""
_SUSPECTS_AHEAD = """SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND suspect > 0 AND model = ?
    AND (suspect, priority, turn, seq) < (?, ?, ?, ?)"""
_LOG = """SELECT start, count, blob FROM records WHERE seq = (SELECT seq FROM jobs WHERE id = ?)
    AND start >= COALESCE((SELECT MAX(start) FROM records WHERE start <= ?
                           AND seq = (SELECT seq FROM jobs WHERE id = ?)), 0)
    AND start + count > ? ORDER BY start"""
_DEPTHS = """SELECT model, CAST(SUM(queued) AS BIGINT), CAST(SUM(leased) AS BIGINT), CAST(SUM(suspects) AS BIGINT),
    CAST(SUM(cost) AS BIGINT) FROM queues WHERE queued > 0 OR leased > 0 GROUP BY model"""
_EXPIRED = "SELECT seq FROM jobs WHERE ended IS NOT NULL AND ended < ? ORDER BY ended, seq LIMIT ?"
_OLDEST = "SELECT seq FROM jobs WHERE ended IS NOT NULL ORDER BY ended, seq LIMIT ?"
_DELETE_OLD_FLOWS = """DELETE FROM flows WHERE queued = 0 AND finish <= COALESCE((SELECT clock FROM queues
    WHERE queues.model = flows.model AND queues.priority = flows.priority), finish)"""


def snapshot(job_id: str) -> SqlProgram[Outcome[JobSnapshot | None]]:
    """Implement ``Store.snapshot``."""
    rows = (yield Statement(_SNAPSHOT, (job_id,))) if storable(job_id) else []
    if not rows:
        return Outcome(None)
    *columns, body, result = rows[0]
    job = Row(*columns)
    queue_position = 0
    if job.state == "queued":
        position = (job.priority, job.turn, job.seq)
        if job.suspect:
            rows = yield Statement(_SUSPECTS_AHEAD, (job.model, job.suspect, *position))
        else:
            rows = yield Statement(_AHEAD, (job.model, *position))
        queue_position = rows[0][0]
    return Outcome(_job_snapshot(job, bytes(body), bytes(result or b""), queue_position))


def _job_snapshot(job: Row, body: bytes = b"", result: bytes = b"", queue_position: int = 0) -> JobSnapshot:
    return JobSnapshot(
        job=job.job(body),
        state=job.state,
        fence=job.fence,
        worker=job.worker,
        attempts=job.attempts,
        crashes=job.crashes,
        logged=job.logged,
        result=result,
        queue_position=queue_position,
    )


def log(job_id: str, start: int) -> SqlProgram[Outcome[list[LogRecord]]]:
    """Implement ``Store.log``."""
    rows = (yield Statement(_LOG, (job_id, start, job_id, start))) if storable(job_id) else []
    return Outcome([LogRecord(first, count, bytes(blob)) for first, count, blob in rows])


def active_leases() -> SqlProgram[Outcome[list[LeaseStatus]]]:
    """Implement ``Store.active_leases``."""
    rows = yield Statement("SELECT id, fence, worker, heartbeat FROM jobs WHERE state = 'leased' ORDER BY seq")
    return Outcome(
        [LeaseStatus(LeaseToken(job_id, fence), worker, heartbeat) for job_id, fence, worker, heartbeat in rows]
    )


def depths() -> SqlProgram[Outcome[dict[str, QueueDepth]]]:
    """Implement ``Store.depths``."""
    rows = yield Statement(_DEPTHS)
    return Outcome({model: QueueDepth(*counts) for model, *counts in rows})


def list_jobs(state: JobState, limit: int) -> SqlProgram[Outcome[list[JobSnapshot]]]:
    """Implement ``Store.list_jobs``."""
    rows = yield Statement(f"SELECT {COLUMNS} FROM jobs WHERE state = ? ORDER BY seq DESC LIMIT ?", (state, limit))
    return Outcome([_job_snapshot(Row(*row)) for row in rows])


def tick(seen: int, limits: StoreLimits) -> SqlProgram[Outcome[int]]:
    """Implement ``Store.tick`` except for dropping jobs: advance the tick count if it is still ``seen``; return it.

    An advance deletes old idempotency keys, empty queues and old flows.
    """
    rows = yield Statement("SELECT tick FROM store")
    [now] = rows[0]
    if now != seen:
        return Outcome(now)
    yield Statement("UPDATE store SET tick = tick + 1")
    yield Statement(
        "DELETE FROM idempotency_keys WHERE ended IS NOT NULL AND ended < ?", (now + 1 - limits.idempotency_ticks,)
    )
    yield Statement("DELETE FROM queues WHERE queued = 0 AND leased = 0")
    yield Statement(_DELETE_OLD_FLOWS)
    return Outcome(now + 1)


def drop(now: int, limits: StoreLimits) -> SqlProgram[Outcome[bool]]:
    """Delete up to ``MAX_DROPPED`` ended jobs beyond the retention limits; return whether any were deleted."""
    rows = yield Statement(_EXPIRED, (now - limits.retention_ticks, MAX_DROPPED))
    if not rows:
        counts = yield Statement("SELECT COUNT(*) FROM jobs WHERE ended IS NOT NULL")
        rows = yield Statement(_OLDEST, (min(max(counts[0][0] - limits.max_ended, 0), MAX_DROPPED),))
    if not rows:
        return Outcome(False)
    for table in ("records", "bodies", "results", "jobs"):
        yield ExecuteMany(f"DELETE FROM {table} WHERE seq = ?", [(row[0],) for row in rows])
    return Outcome(True)


_QUEUES_NOW = "SELECT model, priority, queued, suspects, leased, cost FROM queues WHERE queued > 0 OR leased > 0"
_QUEUES_TRUE = """SELECT model, priority, SUM(CASE WHEN state = 'queued' THEN 1 ELSE 0 END),
    SUM(CASE WHEN state = 'queued' AND suspect > 0 THEN 1 ELSE 0 END),
    SUM(CASE WHEN state = 'leased' THEN 1 ELSE 0 END), SUM(CASE WHEN state = 'queued' THEN cost ELSE 0 END)
    FROM jobs WHERE state IN ('queued', 'leased') GROUP BY model, priority"""
_FLOWS_NOW = "SELECT tenant, model, priority, queued FROM flows WHERE queued <> 0"
_FLOWS_TRUE = """SELECT tenant, model, priority, COUNT(*) FROM jobs WHERE state = 'queued'
    GROUP BY tenant, model, priority"""
_LOGS_NOW = "SELECT seq, logged FROM jobs WHERE logged > 0"
_LOGS_TRUE = "SELECT seq, MAX(start + count) FROM records GROUP BY seq HAVING MIN(start) = 0"
_LOGS_SUM = "SELECT seq, SUM(count) FROM records GROUP BY seq"
_BODIES_NOW = "SELECT seq FROM bodies"
_BODIES_TRUE = "SELECT seq FROM jobs"
_ENDED_NOW = "SELECT seq FROM jobs WHERE ended IS NOT NULL"
_ENDED_TRUE = "SELECT seq FROM jobs WHERE state NOT IN ('queued', 'leased')"
_INVARIANTS = {
    "counts of queued and leased jobs": (_QUEUES_NOW, _QUEUES_TRUE),
    "counts of tenants": (_FLOWS_NOW, _FLOWS_TRUE),
    "ends of logs": (_LOGS_NOW, _LOGS_TRUE),
    "lengths of logs": (_LOGS_NOW, _LOGS_SUM),
    "bodies": (_BODIES_NOW, _BODIES_TRUE),
    "ends of jobs": (_ENDED_NOW, _ENDED_TRUE),
}
"""Invariants of the tables: for each name, two queries that must have the same result."""


def check() -> SqlProgram[Outcome[str]]:
    """Check the tables; return "ok", or a text that names the violated invariants."""
    violated = []
    for name, (left, right) in _INVARIANTS.items():
        missing = yield Statement(f"SELECT COUNT(*) FROM ({left} EXCEPT {right}) AS difference")
        extra = yield Statement(f"SELECT COUNT(*) FROM ({right} EXCEPT {left}) AS difference")
        if missing[0][0] or extra[0][0]:
            violated.append(name)
    return Outcome(f"the store's {', '.join(violated)} are inconsistent" if violated else "ok")
