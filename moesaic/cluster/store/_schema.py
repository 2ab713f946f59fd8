"""Schema of the store's tables, shared by both databases.

store             one row: tick counter and number of the newest suspect group; every writer locks it first
jobs              one row per job, kept small because it changes often; ``seq`` is the key of the next three tables
bodies            the request of each job
results           the result of each ended job
records           the log of each job
idempotency_keys  the job of each idempotency key; kept longer than the job
queues            per model and priority: counts of jobs, and the state of fair queueing
flows             per tenant in a queue: count of queued jobs, and the start of the next turn
"""

from __future__ import annotations

VERSION = 2
"""Version of the schema. Stores with another version are refused."""

_TABLES = """
CREATE TABLE store (
    one BIGINT PRIMARY KEY, version BIGINT NOT NULL, tick BIGINT NOT NULL, groups BIGINT NOT NULL
){busy};
INSERT INTO store (one, version, tick, groups) VALUES (1, {version}, 0, 0);
CREATE TABLE jobs (
    seq {serial},
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    cost BIGINT NOT NULL,
    priority BIGINT NOT NULL,
    idempotency_key TEXT NOT NULL,
    digest TEXT NOT NULL,
    state TEXT NOT NULL,
    turn BIGINT NOT NULL,
    suspect BIGINT NOT NULL DEFAULT 0,
    fence BIGINT NOT NULL DEFAULT 0,
    heartbeat BIGINT NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '',
    attempts BIGINT NOT NULL DEFAULT 0,
    crashes BIGINT NOT NULL DEFAULT 0,
    logged BIGINT NOT NULL DEFAULT 0,
    ended BIGINT
){busy};
CREATE INDEX jobs_queue ON jobs (model, priority, turn, seq) WHERE state = 'queued' AND suspect = 0;
CREATE INDEX jobs_suspect ON jobs (suspect, priority, turn, seq) WHERE state = 'queued' AND suspect > 0;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_ended ON jobs (ended, seq) WHERE ended IS NOT NULL;
CREATE TABLE bodies (seq BIGINT PRIMARY KEY, body {blob} NOT NULL);
CREATE TABLE results (seq BIGINT PRIMARY KEY, result {blob} NOT NULL);
CREATE TABLE records (
    seq BIGINT NOT NULL, start BIGINT NOT NULL, count BIGINT NOT NULL, blob {blob} NOT NULL, PRIMARY KEY (seq, start)
);
CREATE TABLE idempotency_keys (
    tenant TEXT NOT NULL, idempotency_key TEXT NOT NULL, id TEXT NOT NULL, digest TEXT NOT NULL, ended BIGINT,
    PRIMARY KEY (tenant, idempotency_key)
);
CREATE INDEX idempotency_keys_ended ON idempotency_keys (ended) WHERE ended IS NOT NULL;
CREATE TABLE queues (
    model TEXT NOT NULL, priority BIGINT NOT NULL,
    queued BIGINT NOT NULL, suspects BIGINT NOT NULL, leased BIGINT NOT NULL, cost BIGINT NOT NULL,
    clock BIGINT NOT NULL, last BIGINT NOT NULL, share BIGINT NOT NULL,
    PRIMARY KEY (model, priority)
){busy};
CREATE TABLE flows (
    tenant TEXT NOT NULL, model TEXT NOT NULL, priority BIGINT NOT NULL,
    queued BIGINT NOT NULL, finish BIGINT NOT NULL, served BIGINT NOT NULL,
    PRIMARY KEY (tenant, model, priority)
){busy};
"""


def tables(*, serial: str, blob: str, busy: str) -> list[str]:
    """Return the SQL statements that create the tables in a database.

    Args:
        serial: SQL type of an ascending key whose values are never reused.
        blob: SQL type of byte strings.
        busy: suffix for the definitions of tables whose rows change often.
    """
    text = _TABLES.format(version=VERSION, serial=serial, blob=blob, busy=busy)
    return [statement.strip() for statement in text.split(";") if statement.strip()]
