"""Start-time fair queueing of jobs (P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996), and the counters of queues.

The jobs of one model and one priority are in one *queue*. The jobs of one tenant in a queue are a *flow*. When a job is
submitted, it gets a start tag, its ``turn``. The turn is the later of two values: the queue's ``clock``, which is the
turn of the job that was leased last, and the end (turn + cost) of the flow's previous job. The job with the lowest turn
is leased first. A tenant that joins a queue therefore starts level with the tenants that are being served. Tenants are
not charged for service that they got while no other tenant was waiting:

* a queue without waiting jobs moves its clock to the end of all jobs that it has served;
* a flow without waiting jobs ends at the end of its last leased job; its cancelled jobs do not count.

Each priority and model has its own clock. Otherwise jobs that wait long in one queue would delay new tenants in another
queue. A worker with several models serves, among queues of one priority, the queue with the least service since that
queue last became active (Y. Sheng et al., "Fairness in serving large language models", OSDI 2024).

This module does not depend on leases or on the content of jobs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moesaic.cluster.jobs import Job, JobState
from moesaic.cluster.store._program import SKIP_LOCKED, ExecuteMany, SqlProgram, Statement


class Row(NamedTuple):
    """A row of the table ``jobs``; ``_schema`` explains the tables."""

    seq: int
    id: str
    model: str
    kind: str
    tenant: str
    cost: int
    priority: int
    idempotency_key: str
    digest: str
    state: JobState
    turn: int
    suspect: int
    fence: int
    heartbeat: int
    worker: str
    attempts: int
    crashes: int
    logged: int

    @property
    def weight(self) -> int:
        """The job's cost for fair queueing. It is at least 1, because even a job of cost 0 occupies a slot."""
        return max(self.cost, 1)

    def job(self, body: bytes = b"") -> Job:
        """Return the submitted job of this row, with this body."""
        return Job(
            self.id,
            self.model,
            self.kind,
            body,
            self.tenant,
            self.cost,
            self.priority,
            self.idempotency_key,
            self.digest,
        )


COLUMNS = ", ".join(Row._fields)

_KEEP_MAX = "{0} = CASE WHEN excluded.{0} > {1}.{0} THEN excluded.{0} ELSE {1}.{0} END"
_ADD = "{0} = {1}.{0} + excluded.{0}"
_UPSERT_QUEUES = f"""INSERT INTO queues (model, priority, queued, suspects, leased, cost, clock, last, share)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (model, priority) DO UPDATE SET
    {", ".join(_ADD.format(name, "queues") for name in ("queued", "suspects", "leased", "cost"))},
    {", ".join(_KEEP_MAX.format(name, "queues") for name in ("clock", "last", "share"))}"""
_UPSERT_FLOWS = f"""INSERT INTO flows (tenant, model, priority, queued, finish, served)
    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, model, priority) DO UPDATE SET
    {_ADD.format("queued", "flows")}, {_KEEP_MAX.format("served", "flows")},
    finish = CASE
        WHEN flows.queued + excluded.queued = 0 AND excluded.served > flows.served THEN excluded.served
        WHEN flows.queued + excluded.queued = 0 THEN flows.served
        WHEN excluded.finish > flows.finish THEN excluded.finish ELSE flows.finish END"""


@dataclass
class _QueueCounts:
    queued: int = 0
    suspects: int = 0
    leased: int = 0
    cost: int = 0
    clock: int = 0
    last: int = 0
    share: int = 0


@dataclass
class _FlowCounts:
    queued: int = 0
    finish: int = 0
    served: int = 0


@dataclass
class QueueDelta:
    """Changes of one operation to the tables ``queues`` and ``flows``. They are collected and then written together.

    Counts are differences. Clocks and ends are absolute values that never decrease.
    """

    _queues: dict[tuple[str, int], _QueueCounts] = field(default_factory=dict)
    _flows: dict[tuple[str, str, int], _FlowCounts] = field(default_factory=dict)

    def _of(self, job: Job | Row) -> tuple[_QueueCounts, _FlowCounts]:
        queue = self._queues.setdefault((job.model, job.priority), _QueueCounts())
        return queue, self._flows.setdefault((job.tenant, job.model, job.priority), _FlowCounts())

    def add_queued(self, job: Job | Row, suspect: int = 0, by: int = 1) -> None:
        """Count a job as queued; with ``by`` -1, as no longer queued. ``suspect`` is its group of suspects, or 0."""
        queue, flow = self._of(job)
        queue.queued += by
        queue.suspects += by * (suspect > 0)
        queue.cost += by * job.cost
        flow.queued += by

    def add_leased(self, job: Row, by: int = 1) -> None:
        """Count a job as leased; with ``by`` -1, as no longer leased."""
        self._of(job)[0].leased += by

    def enter(self, job: Job | Row, entry: QueueEntry) -> None:
        """Record that a new job enters its queue with the turn in ``entry``."""
        queue, flow = self._of(job)
        queue.clock, queue.share = max(queue.clock, entry.clock), max(queue.share, entry.share)
        flow.finish = entry.turn + max(job.cost, 1)

    def serve(self, job: Row, share: int) -> None:
        """Record that a job is leased. ``share`` is the total service (cost) of its queue after it."""
        queue, flow = self._of(job)
        queue.clock, queue.share = max(queue.clock, job.turn), max(queue.share, share)
        end = job.turn + job.weight
        queue.last, flow.served = max(queue.last, end), max(flow.served, end)

    def write(self) -> SqlProgram[None]:
        """Write all collected changes to the database."""
        yield ExecuteMany(_UPSERT_QUEUES, [(*key, *vars(queue).values()) for key, queue in self._queues.items()])
        flows = [(*key, *vars(flow).values()) for key, flow in self._flows.items() if any(vars(flow).values())]
        if flows:
            yield ExecuteMany(_UPSERT_FLOWS, flows)


class QueueEntry(NamedTuple):
    """The turn (start tag) of a new job, and the state of its queue."""

    turn: int
    clock: int
    """The queue's clock: the turn of the job that was leased last."""
    share: int
    """The queue's total service (cost of its leased jobs), for the choice among models."""


ENTRY_COLUMNS = """(SELECT queued FROM queues WHERE model = ? AND priority = ?),
    (SELECT clock FROM queues WHERE model = ? AND priority = ?),
    (SELECT last FROM queues WHERE model = ? AND priority = ?),
    (SELECT finish FROM flows WHERE tenant = ? AND model = ? AND priority = ?),
    (SELECT MIN(share) FROM queues WHERE priority = ? AND queued > 0)"""
"""SQL columns that ``queue_entry`` needs. ``entry_parameters`` returns the values of their placeholders."""


def entry_parameters(job: Job | Row) -> tuple[str | int, ...]:
    """Return the values of the placeholders in ``ENTRY_COLUMNS`` for a job."""
    queue = (job.model, job.priority)
    return (*queue, *queue, *queue, job.tenant, *queue, job.priority)


def queue_entry(columns: Sequence[int | None]) -> QueueEntry:
    """Return the queue entry of a new job. ``columns`` is a result row of ``ENTRY_COLUMNS``."""
    queued, clock, last, finish, min_share = (number or 0 for number in columns)
    if not queued:
        clock = max(clock, last)
    return QueueEntry(max(clock, finish), clock, 0 if queued else min_share)


_QUEUES_WITH_WORK = "SELECT model, priority, share FROM queues WHERE queued > suspects AND model IN ? ORDER BY priority"
_QUEUE_HEAD = f"""SELECT {COLUMNS} FROM jobs WHERE state = 'queued' AND suspect = 0 AND model = ? AND priority = ?
    ORDER BY turn, seq LIMIT ?{SKIP_LOCKED}"""


def choose(models: Iterable[str], limit: int, delta: QueueDelta) -> SqlProgram[list[Row]]:
    """Return up to ``limit`` jobs of these models that are leased next, and record them in ``delta``."""
    queues = yield Statement(_QUEUES_WITH_WORK, (list(models),))
    chosen: list[Row] = []
    for priority in dict.fromkeys(queue[1] for queue in queues):
        remaining = limit - len(chosen)
        if remaining <= 0:
            break
        shares = {queue[0]: queue[2] for queue in queues if queue[1] == priority}
        heads: dict[str, deque[Row]] = {}
        for model in shares:
            rows = yield Statement(_QUEUE_HEAD, (model, priority, remaining))
            heads[model] = deque(Row(*row) for row in rows)
        chosen += _merge(heads, shares, remaining, delta)
    return chosen


def _merge(heads: Mapping[str, deque[Row]], shares: dict[str, int], limit: int, delta: QueueDelta) -> list[Row]:
    """Take up to ``limit`` jobs, each from the queue with the lowest share; record and return them.

    ``heads`` are the first jobs of each queue and ``shares`` the queues' total service, both by model.
    """
    chosen: list[Row] = []
    while len(chosen) < limit and any(heads.values()):
        model = min((name for name in heads if heads[name]), key=lambda name: (shares[name], heads[name][0].seq))
        job = heads[model].popleft()
        shares[model] += job.weight
        delta.serve(job, shares[model])
        chosen.append(job)
    return chosen
