"""Write operations of ``jobs.Store`` as SQL programs (see ``_program``).

A lease is valid while its fence equals the job's fence. The fence grows when a job is leased and when the lease ends,
so the holder of an expired, released or revoked lease cannot write.

All operations run one after another, also those of several gateways; each sees the writes of those before it. This
module does not depend on a particular database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from moesaic.cluster.jobs import Job, JobState, Lease, LeaseStatus, LeaseToken, LogRecord, RenewState, StoreLimits
from moesaic.cluster.store._fair_queueing import (
    COLUMNS,
    ENTRY_COLUMNS,
    QueueDelta,
    QueueEntry,
    Row,
    choose,
    entry_parameters,
    queue_entry,
)
from moesaic.cluster.store._program import SKIP_LOCKED, ExecuteMany, Outcome, SqlProgram, Statement
from moesaic.errors import Conflict, InvalidParameter, Overloaded, Unavailable

NEW_WORK = ""
"""Value in a list of changed job ids: there are new jobs to lease."""

_BY_ID = f"SELECT {COLUMNS} FROM jobs WHERE id IN ?"
_ENDED = "(SELECT tick FROM store)"
_SUBMIT_STATE = f"""SELECT
    (SELECT digest FROM jobs WHERE id = ?),
    (SELECT id FROM idempotency_keys WHERE tenant = ? AND idempotency_key = ?),
    (SELECT digest FROM idempotency_keys WHERE tenant = ? AND idempotency_key = ?),
    (SELECT CAST(COALESCE(SUM(queued), 0) AS BIGINT) FROM flows WHERE tenant = ?),
    (SELECT CAST(COALESCE(SUM(queued), 0) AS BIGINT) FROM queues),
    (SELECT CAST(COALESCE(SUM(cost), 0) AS BIGINT) FROM queues),
    {ENTRY_COLUMNS}"""
_INSERT = """INSERT INTO jobs (id, model, kind, tenant, cost, priority, idempotency_key, digest, state, turn)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', ?) RETURNING seq"""
_SUSPECT_GROUP = f"""SELECT {COLUMNS} FROM jobs WHERE state = 'queued' AND suspect > 0 AND suspect = ? AND model IN ?
    ORDER BY priority, turn, seq LIMIT ?{SKIP_LOCKED}"""
_OLDEST_GROUP = """SELECT suspect FROM jobs WHERE state = 'queued' AND suspect > 0 AND model IN ?
    ORDER BY suspect LIMIT 1"""
_LEASE = """UPDATE jobs SET state = 'leased', fence = fence + 1, heartbeat = heartbeat + 1,
    attempts = attempts + 1, worker = ? WHERE seq IN ?"""
_REQUEUE = "UPDATE jobs SET state = 'queued', fence = fence + 1, crashes = crashes + ?, suspect = ? WHERE seq = ?"
_RECORD = "INSERT INTO records (seq, start, count, blob) VALUES (?, ?, ?, ?)"
_MAX_NUMBER = 2**40


def storable(text: str) -> bool:
    """Return whether both databases can store a text: it is valid Unicode without NUL characters."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _rows(ids: Iterable[str]) -> SqlProgram[dict[str, Row]]:
    """Return the rows of the jobs with these ids, by id; ids without a job are left out."""
    valid_ids = [job_id for job_id in dict.fromkeys(ids) if storable(job_id)]
    if not valid_ids:
        return {}
    rows = yield Statement(_BY_ID, (valid_ids,))
    return {job.id: job for job in (Row(*columns) for columns in rows)}


def _check_storable(job: Job) -> None:
    """Raise InvalidParameter if a store cannot represent the job."""
    for name in ("id", "model", "kind", "tenant", "idempotency_key", "digest"):
        if not storable(getattr(job, name)):
            raise InvalidParameter(name, "contains NUL characters or lone surrogates: remove them")
    if not job.id:
        raise InvalidParameter("id", "is empty: choose an id")
    if not 0 <= job.cost <= _MAX_NUMBER or abs(job.priority) > _MAX_NUMBER:
        raise InvalidParameter(
            "cost", f"cost and priority must be at most {_MAX_NUMBER}, and a cost must not be negative"
        )


def submit(job: Job, limits: StoreLimits) -> SqlProgram[Outcome[str]]:
    """Implement ``Store.submit``."""
    _check_storable(job)
    name = (job.tenant, job.idempotency_key)
    rows = yield Statement(_SUBMIT_STATE, (job.id, *name, *name, job.tenant, *entry_parameters(job)))
    id_digest, existing_id, digest, tenant_queued, queued, cost, *columns = rows[0]
    if id_digest is not None:
        existing_id, digest = job.id, id_digest
    if existing_id is not None:
        if digest != job.digest:
            raise Conflict("the idempotency key belongs to another request: use a new key for a new request")
        return Outcome(str(existing_id))
    if tenant_queued >= limits.queued_per_tenant:
        raise Overloaded(f"this API key has {tenant_queued} queued requests already: try again when some are answered")
    if queued >= limits.queued or cost + job.cost > limits.queued_cost:
        raise Unavailable(f"the queue is full with {queued} requests of all clients: try again later")
    entry = queue_entry(columns)
    yield from _insert(job, entry)
    delta = QueueDelta()
    delta.add_queued(job)
    delta.enter(job, entry)
    yield from delta.write()
    return Outcome(job.id, (NEW_WORK,))


def _insert(job: Job, entry: QueueEntry) -> SqlProgram[None]:
    values = (
        job.id,
        job.model,
        job.kind,
        job.tenant,
        job.cost,
        job.priority,
        job.idempotency_key,
        job.digest,
        entry.turn,
    )
    rows = yield Statement(_INSERT, values)
    yield ExecuteMany("INSERT INTO bodies (seq, body) VALUES (?, ?)", [(rows[0][0], job.body)])
    if job.idempotency_key:
        insert = "INSERT INTO idempotency_keys (tenant, idempotency_key, id, digest) VALUES (?, ?, ?, ?)"
        yield ExecuteMany(insert, [(job.tenant, job.idempotency_key, job.id, job.digest)])


def lease(worker: str, models: Sequence[str], limit: int, suspects: bool) -> SqlProgram[Outcome[list[Lease]]]:
    """Implement ``Store.lease``."""
    if not storable(worker):
        raise InvalidParameter("worker", "contains NUL characters or lone surrogates: remove them")
    offered = [model for model in dict.fromkeys(models) if storable(model)]
    if limit <= 0 or not offered:
        return Outcome([])
    delta = QueueDelta()
    jobs = yield from (_oldest_group(offered, limit) if suspects else choose(offered, limit, delta))
    if not jobs:
        return Outcome([])
    for job in jobs:
        delta.add_queued(job, job.suspect, by=-1)
        delta.add_leased(job)
    yield Statement(_LEASE, (worker, [job.seq for job in jobs]))
    yield from delta.write()
    leases = yield from _leases(jobs)
    return Outcome(leases, tuple(job.id for job in jobs))


def _oldest_group(models: list[str], limit: int) -> SqlProgram[list[Row]]:
    groups = yield Statement(_OLDEST_GROUP, (models,))
    if not groups:
        return []
    rows = yield Statement(_SUSPECT_GROUP, (groups[0][0], models, limit))
    return [Row(*row) for row in rows]


def _leases(jobs: Sequence[Row]) -> SqlProgram[list[Lease]]:
    """Return the new leases of jobs, with bodies and logs. ``jobs`` are the rows from before the lease."""
    rows = yield Statement("SELECT seq, body FROM bodies WHERE seq IN ?", ([job.seq for job in jobs],))
    bodies = {seq: bytes(body) for seq, body in rows}
    logs: dict[int, list[LogRecord]] = {job.seq: [] for job in jobs}
    logged = [job.seq for job in jobs if job.logged]
    if logged:
        query = "SELECT seq, start, count, blob FROM records WHERE seq IN ? ORDER BY seq, start"
        for seq, start, count, blob in (yield Statement(query, (logged,))):
            logs[seq].append(LogRecord(start, count, bytes(blob)))
    return [Lease(job.job(bodies[job.seq]), job.fence + 1, tuple(logs[job.seq])) for job in jobs]


def _holds(job: Row | None, fence: int) -> bool:
    return job is not None and job.state == "leased" and job.fence == fence


def renew(leases: Sequence[LeaseToken]) -> SqlProgram[Outcome[dict[str, RenewState]]]:
    """Implement ``Store.renew``."""
    jobs = yield from _rows(lease_token.id for lease_token in leases)
    states: dict[str, RenewState] = {}
    for lease_token in leases:
        job = jobs.get(lease_token.id)
        if _holds(job, lease_token.fence):
            states[lease_token.id] = "ok"
        elif job is not None and job.state == "cancelled" and job.fence == lease_token.fence:
            states[lease_token.id] = "cancelled"
        else:
            states.setdefault(lease_token.id, "fenced")
    live = [jobs[job_id].seq for job_id, state in states.items() if state == "ok"]
    if live:
        yield Statement("UPDATE jobs SET heartbeat = heartbeat + 1 WHERE seq IN ?", (live,))
    return Outcome(states)


def append(parts: Mapping[LeaseToken, LogRecord]) -> SqlProgram[Outcome[dict[str, int | None]]]:
    """Implement ``Store.append``."""
    jobs = yield from _rows(lease_token.id for lease_token in parts)
    ends: dict[str, int | None] = {}
    records, changes = [], []
    for lease_token, record in parts.items():
        job = jobs.get(lease_token.id)
        if job is None or not _holds(job, lease_token.fence):
            ends.setdefault(lease_token.id, None)
            continue
        ends[job.id] = job.logged
        if record.start == job.logged and record.count > 0:
            ends[job.id] = record.start + record.count
            records.append((job.seq, record.start, record.count, record.blob))
            changes.append(job.id)
    if records:
        yield ExecuteMany(_RECORD, records)
    live = [(end, jobs[job_id].seq) for job_id, end in ends.items() if end is not None]
    if live:
        yield ExecuteMany("UPDATE jobs SET heartbeat = heartbeat + 1, logged = ? WHERE seq = ?", live)
    return Outcome(ends, tuple(changes))


def finish(
    lease_token: LeaseToken, state: Literal["done", "failed"], result: bytes, last: LogRecord | None
) -> SqlProgram[Outcome[bool]]:
    """Implement ``Store.finish``."""
    jobs = yield from _rows([lease_token.id])
    job = jobs.get(lease_token.id)
    if job is None or not _holds(job, lease_token.fence):
        return Outcome(job is not None and job.fence == lease_token.fence and job.state in ("done", "failed"))
    end = job.logged
    if last is not None and last.start + last.count > end:
        if last.start != end:
            raise ValueError(
                f"the log of {lease_token.id} has {end} entries: the last record must start there, not at {last.start}"
            )
        yield ExecuteMany(_RECORD, [(job.seq, last.start, last.count, last.blob)])
        yield ExecuteMany("UPDATE jobs SET logged = ? WHERE seq = ?", [(end + last.count, job.seq)])
    yield ExecuteMany("INSERT INTO results (seq, result) VALUES (?, ?)", [(job.seq, result)])
    yield from _end(job, state)
    return Outcome(True, (job.id,))


def _end(job: Row, state: JobState) -> SqlProgram[None]:
    """End a queued or leased job in this state. All operations that end a job use this function."""
    yield ExecuteMany(f"UPDATE jobs SET state = ?, ended = {_ENDED} WHERE seq = ?", [(state, job.seq)])
    if job.idempotency_key:
        name = (job.tenant, job.idempotency_key, job.id)
        yield ExecuteMany(
            f"UPDATE idempotency_keys SET ended = {_ENDED} WHERE tenant = ? AND idempotency_key = ? AND id = ?", [name]
        )
    delta = QueueDelta()
    if job.state == "queued":
        delta.add_queued(job, job.suspect, by=-1)
    else:
        delta.add_leased(job, by=-1)
    yield from delta.write()


def _requeue(jobs: Sequence[Row], groups: Sequence[int], crashes: int) -> SqlProgram[None]:
    """Queue leased jobs again. ``groups`` has the group of suspects of each job; 0: the job is not a suspect.

    ``crashes`` is added to the crash count of each job.
    """
    delta = QueueDelta()
    for job, group in zip(jobs, groups, strict=True):
        delta.add_leased(job, by=-1)
        delta.add_queued(job, group)
    yield ExecuteMany(_REQUEUE, [(crashes, group, job.seq) for job, group in zip(jobs, groups, strict=True)])
    yield from delta.write()


def release(leases: Sequence[LeaseToken]) -> SqlProgram[Outcome[None]]:
    """Implement ``Store.release``."""
    rows = yield from _rows(lease_token.id for lease_token in leases)
    tokens = set(leases)
    jobs = [job for job in rows.values() if job.state == "leased" and LeaseToken(job.id, job.fence) in tokens]
    if not jobs:
        return Outcome(None)
    yield from _requeue(jobs, [job.suspect for job in jobs], 0)
    return Outcome(None, (NEW_WORK, *(job.id for job in jobs)))


def expire(statuses: Sequence[LeaseStatus], limits: StoreLimits) -> SqlProgram[Outcome[list[str]]]:
    """Implement ``Store.expire``."""
    rows = yield from _rows(status.lease_token.id for status in statuses)
    silent = {(status.lease_token, status.heartbeat) for status in statuses}
    jobs = [
        job
        for job in rows.values()
        if job.state == "leased" and (LeaseToken(job.id, job.fence), job.heartbeat) in silent
    ]
    if not jobs:
        return Outcome([])
    if len(jobs) == 1 and jobs[0].crashes + 1 >= limits.crashes:
        [job] = jobs
        yield ExecuteMany("UPDATE jobs SET fence = fence + 1, crashes = crashes + 1 WHERE seq = ?", [(job.seq,)])
        yield from _end(job, "dead")
        return Outcome([job.id], (job.id,))
    jobs.sort(key=lambda job: job.seq)
    counters = yield Statement("UPDATE store SET groups = groups + 2 RETURNING groups")
    half = (len(jobs) + 1) // 2
    groups = [counters[0][0] - (index < half) for index in range(len(jobs))]
    yield from _requeue(jobs, groups, 1)
    return Outcome([], (NEW_WORK, *(job.id for job in jobs)))


def forgive_crash(leases: Sequence[LeaseToken]) -> SqlProgram[Outcome[None]]:
    """Implement ``Store.forgive_crash``."""
    rows = yield from _rows(lease_token.id for lease_token in leases)
    fences = {lease_token.id: lease_token.fence for lease_token in leases}
    jobs = [job for job in rows.values() if job.state in ("queued", "leased") and job.crashes > 0]
    jobs = [job for job in jobs if job.fence > fences[job.id]]
    if not jobs:
        return Outcome(None)
    delta = QueueDelta()
    groups = [job.suspect if job.crashes > 1 else 0 for job in jobs]
    for job, group in zip(jobs, groups, strict=True):
        if job.state == "queued":
            delta.add_queued(job, job.suspect, by=-1)
            delta.add_queued(job, group)
    update = "UPDATE jobs SET crashes = crashes - 1, suspect = ? WHERE seq = ?"
    yield ExecuteMany(update, [(group, job.seq) for job, group in zip(jobs, groups, strict=True)])
    yield from delta.write()
    return Outcome(None, (NEW_WORK,))


def cancel(job_id: str) -> SqlProgram[Outcome[JobState | None]]:
    """Implement ``Store.cancel``."""
    jobs = yield from _rows([job_id])
    job = jobs.get(job_id)
    if job is None or job.state not in ("queued", "leased"):
        return Outcome(job and job.state)
    yield from _end(job, "cancelled")
    return Outcome("cancelled", (job_id,))


def revive(job_id: str) -> SqlProgram[Outcome[bool]]:
    """Implement ``Store.revive``."""
    jobs = yield from _rows([job_id])
    job = jobs.get(job_id)
    if job is None or job.state != "dead":
        return Outcome(False)
    columns = yield Statement(f"SELECT {ENTRY_COLUMNS}", entry_parameters(job))
    entry = queue_entry(columns[0])
    update = "UPDATE jobs SET state = 'queued', ended = NULL, crashes = 0, suspect = 0, turn = ? WHERE seq = ?"
    yield ExecuteMany(update, [(entry.turn, job.seq)])
    if job.idempotency_key:
        update = "UPDATE idempotency_keys SET ended = NULL WHERE tenant = ? AND idempotency_key = ? AND id = ?"
        yield ExecuteMany(update, [(job.tenant, job.idempotency_key, job_id)])
    delta = QueueDelta()
    delta.add_queued(job)
    delta.enter(job, entry)
    yield from delta.write()
    return Outcome(True, (NEW_WORK, job_id))
