"""Who is next: start-time fair queueing (P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996), and the counts that go with it.

Jobs of one model and one priority stand in one *line*; those of one tenant in a line are a *flow*. A job's ``turn``,
its start tag, is given to it once: the line's ``clock`` (the turn of what was leased last) or the end of the flow's job
before it, turn + cost, whichever is later. The least turn goes first. So whoever comes to a line starts even with those
who are being served, however much they have queued, and nobody pays for times when there was no one to be fair to:

* a line in which nobody waits moves its clock to the end of all that it has served;
* a flow in which nothing waits ends where what was leased of it ended, whatever was cancelled.

Priorities and models have clocks of their own: jobs that wait long in one line would otherwise put off newcomers in
another. Among lines of one priority, where a worker offers several models, the one that was given the least goes first,
counted from when it last began to wait (as in Y. Sheng et al., "Fairness in serving large language models", OSDI 2024).

Knows lines, flows and turns. Does not know leases, nor what a job is about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moesaic.cluster.jobs import Job, JobState
from moesaic.cluster.store._program import SKIP_LOCKED, ExecuteMany, SqlProgram, Statement


class Row(NamedTuple):
    """A row of the table of jobs."""

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
        """What it counts for among tenants: a job that costs nothing still takes a place."""
        return max(self.cost, 1)

    @property
    def line(self) -> tuple[str, int]:
        return self.model, self.priority

    def job(self, body: bytes = b"") -> Job:
        """Return what was submitted."""
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
    """What one operation changes in lines and flows: gathered first, then written at once.

    Counts are differences; clocks and ends are values, which never go back.
    """

    _lines: dict[tuple[str, int], _QueueCounts] = field(default_factory=dict)
    _flows: dict[tuple[str, str, int], _FlowCounts] = field(default_factory=dict)

    def _of(self, job: Job | Row) -> tuple[_QueueCounts, _FlowCounts]:
        line = self._lines.setdefault((job.model, job.priority), _QueueCounts())
        return line, self._flows.setdefault((job.tenant, job.model, job.priority), _FlowCounts())

    def wait(self, job: Job | Row, suspect: int = 0, by: int = 1) -> None:
        """A job begins to wait, or with ``by`` -1 ends it. ``suspect``: the group that it is in."""
        line, flow = self._of(job)
        line.queued += by
        line.suspects += by * (suspect > 0)
        line.cost += by * job.cost
        flow.queued += by

    def run(self, job: Row, by: int = 1) -> None:
        """A job begins to run, or ends it."""
        self._of(job)[0].leased += by

    def enter(self, job: Job | Row, entry: QueueEntry) -> None:
        """A job takes its place."""
        line, flow = self._of(job)
        line.clock, line.share = max(line.clock, entry.clock), max(line.share, entry.share)
        flow.finish = entry.turn + max(job.cost, 1)

    def serve(self, job: Row, share: int) -> None:
        """A job has had its turn, and its line that share with it."""
        line, flow = self._of(job)
        line.clock, line.share = max(line.clock, job.turn), max(line.share, share)
        end = job.turn + job.weight
        line.last, flow.served = max(line.last, end), max(flow.served, end)

    def write(self) -> SqlProgram[None]:
        """Write it all."""
        yield ExecuteMany(_UPSERT_QUEUES, [(*key, *vars(line).values()) for key, line in self._lines.items()])
        flows = [(*key, *vars(flow).values()) for key, flow in self._flows.items() if any(vars(flow).values())]
        if flows:
            yield ExecuteMany(_UPSERT_FLOWS, flows)


class QueueEntry(NamedTuple):
    """Where a new job stands."""

    turn: int
    clock: int
    """Of its line."""
    share: int
    """Of its line."""


ENTRY_COLUMNS = """(SELECT queued FROM queues WHERE model = ? AND priority = ?),
    (SELECT clock FROM queues WHERE model = ? AND priority = ?),
    (SELECT last FROM queues WHERE model = ? AND priority = ?),
    (SELECT finish FROM flows WHERE tenant = ? AND model = ? AND priority = ?),
    (SELECT MIN(share) FROM queues WHERE priority = ? AND queued > 0)"""
"""Columns of a query that ``place`` reads; their values are those of ``placing``."""


def entry_parameters(job: Job | Row) -> tuple[str | int, ...]:
    """Return what the columns ``PLACE`` are asked with."""
    line = (job.model, job.priority)
    return (*line, *line, *line, job.tenant, *line, job.priority)


def queue_entry(columns: Sequence[int | None]) -> QueueEntry:
    """Return where a job stands that comes now."""
    queued, clock, last, finish, least = (number or 0 for number in columns)
    if not queued:
        clock = max(clock, last)
    return QueueEntry(max(clock, finish), clock, 0 if queued else least)


_QUEUES_WITH_WORK = "SELECT model, priority, share FROM queues WHERE queued > suspects AND model IN ? ORDER BY priority"
_QUEUE_HEAD = f"""SELECT {COLUMNS} FROM jobs WHERE state = 'queued' AND suspect = 0 AND model = ? AND priority = ?
    ORDER BY turn, seq LIMIT ?{SKIP_LOCKED}"""


def choose(models: Iterable[str], most: int, moves: QueueDelta) -> SqlProgram[list[Row]]:
    """Return the jobs that are next, and move the clocks."""
    found = yield Statement(_QUEUES_WITH_WORK, (list(models),))
    chosen: list[Row] = []
    for priority in dict.fromkeys(row[1] for row in found):
        room = most - len(chosen)
        if room <= 0:
            break
        shares = {row[0]: row[2] for row in found if row[1] == priority}
        heads: dict[str, deque[Row]] = {}
        for model in shares:
            rows = yield Statement(_QUEUE_HEAD, (model, priority, room))
            heads[model] = deque(Row(*row) for row in rows)
        chosen += _merge(heads, shares, room, moves)
    return chosen


def _merge(heads: Mapping[str, deque[Row]], shares: dict[str, int], room: int, moves: QueueDelta) -> list[Row]:
    """Take up to ``room`` jobs from the heads of lines, from the line with the least share each time."""
    chosen: list[Row] = []
    while len(chosen) < room and any(heads.values()):
        model = min((each for each in heads if heads[each]), key=lambda each: (shares[each], heads[each][0].seq))
        job = heads[model].popleft()
        shares[model] += job.weight
        moves.serve(job, shares[model])
        chosen.append(job)
    return chosen
