"""What changes jobs, as generators of statements (see ``_steps``): every promise of ``jobs.Store`` is kept here.

The fence is what holds a lease: it moves when a job is leased and when the lease is taken away, so whoever shows the
fence that a job has is the one who has it, and a lease that was lost, released or taken back writes nothing any more.

Operations run one after the other, also those of several gateways: each sees all that the ones before it have written.
Knows the tables. Does not know which database has them.
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
"""What news say where there is something to lease."""

_BY_ID = f"SELECT {COLUMNS} FROM jobs WHERE id IN ?"
_ENDED = "(SELECT tick FROM store)"
_KNOWN = f"""SELECT
    (SELECT digest FROM jobs WHERE id = ?),
    (SELECT id FROM idempotency_keys WHERE tenant = ? AND idempotency_key = ?),
    (SELECT digest FROM idempotency_keys WHERE tenant = ? AND idempotency_key = ?),
    (SELECT CAST(COALESCE(SUM(queued), 0) AS BIGINT) FROM flows WHERE tenant = ?),
    (SELECT CAST(COALESCE(SUM(queued), 0) AS BIGINT) FROM queues),
    (SELECT CAST(COALESCE(SUM(cost), 0) AS BIGINT) FROM queues),
    {ENTRY_COLUMNS}"""
_INSERT = """INSERT INTO jobs (id, model, kind, tenant, cost, priority, idempotency_key, digest, state, turn)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', ?) RETURNING seq"""
_GROUP = f"""SELECT {COLUMNS} FROM jobs WHERE state = 'queued' AND suspect > 0 AND suspect = ? AND model IN ?
    ORDER BY priority, turn, seq LIMIT ?{SKIP_LOCKED}"""
_OLDEST = """SELECT suspect FROM jobs WHERE state = 'queued' AND suspect > 0 AND model IN ?
    ORDER BY suspect LIMIT 1"""
_LEASE = """UPDATE jobs SET state = 'leased', fence = fence + 1, heartbeat = heartbeat + 1,
    attempts = attempts + 1, worker = ? WHERE seq IN ?"""
_QUEUE = "UPDATE jobs SET state = 'queued', fence = fence + 1, crashes = crashes + ?, suspect = ? WHERE seq = ?"
_RECORD = "INSERT INTO records (seq, start, count, blob) VALUES (?, ?, ?, ?)"
_LARGEST = 2**40


def storable(text: str) -> bool:
    """Return whether both databases can keep a text: it is Unicode, and has no character 0."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _rows(ids: Iterable[str]) -> SqlProgram[dict[str, Row]]:
    """Return the jobs that are there, by id."""
    wanted = [job_id for job_id in dict.fromkeys(ids) if storable(job_id)]
    if not wanted:
        return {}
    rows = yield Statement(_BY_ID, (wanted,))
    return {row.id: row for row in (Row(*each) for each in rows)}


def _valid(job: Job) -> None:
    """Refuse what no store can keep."""
    for name in ("id", "model", "kind", "tenant", "idempotency_key", "digest"):
        if not storable(getattr(job, name)):
            raise InvalidParameter(name, "is not text that can be stored: leave out character 0 and lone surrogates")
    if not job.id:
        raise InvalidParameter("id", "is empty: choose one")
    if not 0 <= job.cost <= _LARGEST or abs(job.priority) > _LARGEST:
        raise InvalidParameter("cost", f"and priority are at most {_LARGEST}, and a cost is not negative")


def submit(job: Job, bounds: StoreLimits) -> SqlProgram[Outcome[str]]:
    """See ``Store.submit``."""
    _valid(job)
    name = (job.tenant, job.idempotency_key)
    rows = yield Statement(_KNOWN, (job.id, *name, *name, job.tenant, *entry_parameters(job)))
    there, named, digest, of_tenant, queued, cost, *columns = rows[0]
    if there is not None:
        named, digest = job.id, there
    if named is not None:
        if digest != job.digest:
            raise Conflict("something else was asked under this name before: take a new name for a new request")
        return Outcome(str(named))
    if of_tenant >= bounds.queued_per_tenant:
        raise Overloaded(f"{of_tenant} requests of yours wait already: try again when some are answered")
    if queued >= bounds.queued or cost + job.cost > bounds.queued_cost:
        raise Unavailable(f"{queued} requests wait already: try again later")
    where = queue_entry(columns)
    yield from _insert(job, where)
    moves = QueueDelta()
    moves.wait(job)
    moves.enter(job, where)
    yield from moves.write()
    return Outcome(job.id, (NEW_WORK,))


def _insert(job: Job, where: QueueEntry) -> SqlProgram[None]:
    values = (
        job.id,
        job.model,
        job.kind,
        job.tenant,
        job.cost,
        job.priority,
        job.idempotency_key,
        job.digest,
        where.turn,
    )
    rows = yield Statement(_INSERT, values)
    yield ExecuteMany("INSERT INTO bodies (seq, body) VALUES (?, ?)", [(rows[0][0], job.body)])
    if job.idempotency_key:
        names = "INSERT INTO idempotency_keys (tenant, idempotency_key, id, digest) VALUES (?, ?, ?, ?)"
        yield ExecuteMany(names, [(job.tenant, job.idempotency_key, job.id, job.digest)])


def lease(worker: str, models: Sequence[str], most: int, suspects: bool) -> SqlProgram[Outcome[list[Lease]]]:
    """See ``Store.lease``."""
    if not storable(worker):
        raise InvalidParameter("worker", "is not text that can be stored")
    offered = [model for model in dict.fromkeys(models) if storable(model)]
    if most <= 0 or not offered:
        return Outcome([])
    moves = QueueDelta()
    jobs = yield from (_oldest_group(offered, most) if suspects else choose(offered, most, moves))
    if not jobs:
        return Outcome([])
    for job in jobs:
        moves.wait(job, job.suspect, by=-1)
        moves.run(job)
    yield Statement(_LEASE, (worker, [job.seq for job in jobs]))
    yield from moves.write()
    leases = yield from _leases(jobs)
    return Outcome(leases, tuple(job.id for job in jobs))


def _oldest_group(models: list[str], most: int) -> SqlProgram[list[Row]]:
    groups = yield Statement(_OLDEST, (models,))
    if not groups:
        return []
    rows = yield Statement(_GROUP, (groups[0][0], models, most))
    return [Row(*row) for row in rows]


def _leases(jobs: Sequence[Row]) -> SqlProgram[list[Lease]]:
    """Return what is handed out: each job as it was before it was leased, with its body and its log."""
    rows = yield Statement("SELECT seq, body FROM bodies WHERE seq IN ?", ([job.seq for job in jobs],))
    bodies = {seq: bytes(body) for seq, body in rows}
    logs: dict[int, list[LogRecord]] = {job.seq: [] for job in jobs}
    begun = [job.seq for job in jobs if job.logged]
    if begun:
        query = "SELECT seq, start, count, blob FROM records WHERE seq IN ? ORDER BY seq, start"
        for seq, start, count, blob in (yield Statement(query, (begun,))):
            logs[seq].append(LogRecord(start, count, bytes(blob)))
    return [Lease(job.job(bodies[job.seq]), job.fence + 1, tuple(logs[job.seq])) for job in jobs]


def _holds(job: Row | None, fence: int) -> bool:
    return job is not None and job.state == "leased" and job.fence == fence


def renew(leases: Sequence[LeaseToken]) -> SqlProgram[Outcome[dict[str, RenewState]]]:
    """See ``Store.renew``."""
    jobs = yield from _rows(lease_token.id for lease_token in leases)
    held: dict[str, RenewState] = {}
    for lease_token in leases:
        job = jobs.get(lease_token.id)
        if _holds(job, lease_token.fence):
            held[lease_token.id] = "ok"
        elif job is not None and job.state == "cancelled" and job.fence == lease_token.fence:
            held[lease_token.id] = "cancelled"
        else:
            held.setdefault(lease_token.id, "fenced")
    live = [jobs[job_id].seq for job_id, state in held.items() if state == "ok"]
    if live:
        yield Statement("UPDATE jobs SET heartbeat = heartbeat + 1 WHERE seq IN ?", (live,))
    return Outcome(held)


def append(parts: Mapping[LeaseToken, LogRecord]) -> SqlProgram[Outcome[dict[str, int | None]]]:
    """See ``Store.append``."""
    jobs = yield from _rows(lease_token.id for lease_token in parts)
    ends: dict[str, int | None] = {}
    records, news = [], []
    for lease_token, record in parts.items():
        job = jobs.get(lease_token.id)
        if job is None or not _holds(job, lease_token.fence):
            ends.setdefault(lease_token.id, None)
            continue
        ends[job.id] = job.logged
        if record.start == job.logged and record.count > 0:
            ends[job.id] = record.start + record.count
            records.append((job.seq, record.start, record.count, record.blob))
            news.append(job.id)
    if records:
        yield ExecuteMany(_RECORD, records)
    live = [(end, jobs[job_id].seq) for job_id, end in ends.items() if end is not None]
    if live:
        yield ExecuteMany("UPDATE jobs SET heartbeat = heartbeat + 1, logged = ? WHERE seq = ?", live)
    return Outcome(ends, tuple(news))


def finish(
    lease_token: LeaseToken, state: Literal["done", "failed"], result: bytes, last: LogRecord | None
) -> SqlProgram[Outcome[bool]]:
    """See ``Store.finish``."""
    jobs = yield from _rows([lease_token.id])
    job = jobs.get(lease_token.id)
    if job is None or not _holds(job, lease_token.fence):
        return Outcome(job is not None and job.fence == lease_token.fence and job.state in ("done", "failed"))
    end = job.logged
    if last is not None and last.start + last.count > end:
        if last.start != end:
            raise ValueError(
                f"the log of {lease_token.id} has {end} entries: the last ones begin there, not at {last.start}"
            )
        yield ExecuteMany(_RECORD, [(job.seq, last.start, last.count, last.blob)])
        yield ExecuteMany("UPDATE jobs SET logged = ? WHERE seq = ?", [(end + last.count, job.seq)])
    yield ExecuteMany("INSERT INTO results (seq, result) VALUES (?, ?)", [(job.seq, result)])
    yield from _end(job, state)
    return Outcome(True, (job.id,))


def _end(job: Row, state: JobState) -> SqlProgram[None]:
    """End a queued or leased job: the one way to do so."""
    yield ExecuteMany(f"UPDATE jobs SET state = ?, ended = {_ENDED} WHERE seq = ?", [(state, job.seq)])
    if job.idempotency_key:
        name = (job.tenant, job.idempotency_key, job.id)
        yield ExecuteMany(
            f"UPDATE idempotency_keys SET ended = {_ENDED} WHERE tenant = ? AND idempotency_key = ? AND id = ?", [name]
        )
    moves = QueueDelta()
    if job.state == "queued":
        moves.wait(job, job.suspect, by=-1)
    else:
        moves.run(job, by=-1)
    yield from moves.write()


def _requeue(jobs: Sequence[Row], groups: Sequence[int], crashes: int) -> SqlProgram[None]:
    """Queue leased jobs again, each in the group of suspects that is named for it; 0: in none."""
    moves = QueueDelta()
    for job, group in zip(jobs, groups, strict=True):
        moves.run(job, by=-1)
        moves.wait(job, group)
    yield ExecuteMany(_QUEUE, [(crashes, group, job.seq) for job, group in zip(jobs, groups, strict=True)])
    yield from moves.write()


def release(leases: Sequence[LeaseToken]) -> SqlProgram[Outcome[None]]:
    """See ``Store.release``."""
    found = yield from _rows(lease_token.id for lease_token in leases)
    fences = set(leases)
    jobs = [job for job in found.values() if job.state == "leased" and LeaseToken(job.id, job.fence) in fences]
    if not jobs:
        return Outcome(None)
    yield from _requeue(jobs, [job.suspect for job in jobs], 0)
    return Outcome(None, (NEW_WORK, *(job.id for job in jobs)))


def expire(active_leases: Sequence[LeaseStatus], bounds: StoreLimits) -> SqlProgram[Outcome[list[str]]]:
    """See ``Store.expire``."""
    found = yield from _rows(each.lease_token.id for each in active_leases)
    given = {(each.lease_token, each.heartbeat) for each in active_leases}
    jobs = [
        job
        for job in found.values()
        if job.state == "leased" and (LeaseToken(job.id, job.fence), job.heartbeat) in given
    ]
    if not jobs:
        return Outcome([])
    if len(jobs) == 1 and jobs[0].crashes + 1 >= bounds.crashes:
        [job] = jobs
        yield ExecuteMany("UPDATE jobs SET fence = fence + 1, crashes = crashes + 1 WHERE seq = ?", [(job.seq,)])
        yield from _end(job, "dead")
        return Outcome([job.id], (job.id,))
    jobs.sort(key=lambda job: job.seq)
    rows = yield Statement("UPDATE store SET groups = groups + 2 RETURNING groups")
    half = (len(jobs) + 1) // 2
    groups = [rows[0][0] - (index < half) for index in range(len(jobs))]
    yield from _requeue(jobs, groups, 1)
    return Outcome([], (NEW_WORK, *(job.id for job in jobs)))


def forgive_crash(leases: Sequence[LeaseToken]) -> SqlProgram[Outcome[None]]:
    """See ``Store.forgive_crash``."""
    found = yield from _rows(lease_token.id for lease_token in leases)
    fences = {lease_token.id: lease_token.fence for lease_token in leases}
    jobs = [job for job in found.values() if job.state in ("queued", "leased") and job.crashes > 0]
    jobs = [job for job in jobs if job.fence > fences[job.id]]
    if not jobs:
        return Outcome(None)
    moves = QueueDelta()
    groups = [job.suspect if job.crashes > 1 else 0 for job in jobs]
    for job, group in zip(jobs, groups, strict=True):
        if job.state == "queued":
            moves.wait(job, job.suspect, by=-1)
            moves.wait(job, group)
    update = "UPDATE jobs SET crashes = crashes - 1, suspect = ? WHERE seq = ?"
    yield ExecuteMany(update, [(group, job.seq) for job, group in zip(jobs, groups, strict=True)])
    yield from moves.write()
    return Outcome(None, (NEW_WORK,))


def cancel(job_id: str) -> SqlProgram[Outcome[JobState | None]]:
    """See ``Store.cancel``."""
    jobs = yield from _rows([job_id])
    job = jobs.get(job_id)
    if job is None or job.state not in ("queued", "leased"):
        return Outcome(job and job.state)
    yield from _end(job, "cancelled")
    return Outcome("cancelled", (job_id,))


def revive(job_id: str) -> SqlProgram[Outcome[bool]]:
    """See ``Store.revive``."""
    jobs = yield from _rows([job_id])
    job = jobs.get(job_id)
    if job is None or job.state != "dead":
        return Outcome(False)
    columns = yield Statement(f"SELECT {ENTRY_COLUMNS}", entry_parameters(job))
    where = queue_entry(columns[0])
    update = "UPDATE jobs SET state = 'queued', ended = NULL, crashes = 0, suspect = 0, turn = ? WHERE seq = ?"
    yield ExecuteMany(update, [(where.turn, job.seq)])
    if job.idempotency_key:
        names = "UPDATE idempotency_keys SET ended = NULL WHERE tenant = ? AND idempotency_key = ? AND id = ?"
        yield ExecuteMany(names, [(job.tenant, job.idempotency_key, job_id)])
    moves = QueueDelta()
    moves.wait(job)
    moves.enter(job, where)
    yield from moves.write()
    return Outcome(True, (NEW_WORK, job_id))
