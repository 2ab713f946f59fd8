"""Logs without gap or repeat, and one end."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LeaseToken, LogRecord
from tests.support.stores import hold, job


@pytest.fixture
def held(store) -> LeaseToken:
    """A hold on the job ``a``."""
    store.submit(job("a", idempotency_key="n"))
    return hold(store.lease("w", ["m"], 1)[0])


def test_records_come_in_order(store, held):
    assert store.append({held: LogRecord(0, 2, b"ab")}) == {"a": 2}
    assert store.append({held: LogRecord(2, 3, b"cde")}) == {"a": 5}
    assert store.log("a") == [LogRecord(0, 2, b"ab"), LogRecord(2, 3, b"cde")]
    assert store.snapshot("a").logged == 5


@pytest.mark.parametrize(
    "record",
    [
        LogRecord(0, 2, b"ab"),  # the same again
        LogRecord(3, 1, b"d"),  # a gap
        LogRecord(1, 3, b"bcd"),  # across the end
        LogRecord(0, 3, b"abc"),
        LogRecord(1, 1, b"b"),
        LogRecord(2, 0, b""),  # nothing
        LogRecord(2, -1, b""),
    ],
)
def test_record_with_a_gap_is_not_written(store, held, record):
    store.append({held: LogRecord(0, 2, b"ab")})
    assert store.append({held: record}) == {"a": 2}
    assert store.log("a") == [LogRecord(0, 2, b"ab")]
    assert store.append({held: LogRecord(2, 1, b"c")}) == {"a": 3}
    assert store.check() == "ok"


def test_log_is_read_from_any_entry(store, held):
    for start in (0, 2, 4):
        store.append({held: LogRecord(start, 2, b"%d" % start)})
    starts = [[record.start for record in store.log("a", start)] for start in range(8)]
    assert starts == [[0, 2, 4], [0, 2, 4], [2, 4], [2, 4], [4], [4], [], []]
    assert store.log("nobody's") == []


def test_append_to_several_logs(store):
    for n in range(20):
        store.submit(job(f"j{n}"))
    holds = [hold(lease) for lease in store.lease("w", ["m"], 20)]
    store.cancel("j3")
    parts = {each: LogRecord(0, n + 1, b"x") for n, each in enumerate(holds)}
    assert store.append(parts) == {f"j{n}": None if n == 3 else n + 1 for n in range(20)}
    assert store.append({}) == {}


def test_the_next_lease_has_the_log(store, held):
    store.append({held: LogRecord(0, 2, b"ab")})
    store.append({held: LogRecord(2, 1, b"c")})
    store.release([held])
    [lease] = store.lease("w", ["m"], 1)
    assert lease.log == (LogRecord(0, 2, b"ab"), LogRecord(2, 1, b"c"))
    assert store.append({hold(lease): LogRecord(3, 1, b"d")}) == {"a": 4}


@pytest.mark.parametrize("state", ["done", "failed"])
def test_job_ends_once(store, held, state):
    store.append({held: LogRecord(0, 1, b"x")})
    assert store.finish(held, state, b"result", LogRecord(1, 2, b"yz")) is True
    seen = store.snapshot("a")
    assert (seen.state, seen.result, seen.logged) == (state, b"result", 3)
    other = "failed" if state == "done" else "done"
    assert store.finish(held, state, b"result", LogRecord(1, 2, b"yz")) is True
    assert store.finish(held, other, b"another") is True
    assert store.snapshot("a") == seen
    assert store.append({held: LogRecord(3, 1, b"late")}) == {"a": None}
    assert store.renew([held]) == {"a": "fenced"}
    assert store.cancel("a") == state
    assert store.take() == []
    assert store.log("a") == [LogRecord(0, 1, b"x"), LogRecord(1, 2, b"yz")]
    assert store.check() == "ok"


@pytest.mark.parametrize(
    ("last", "end"),
    [(LogRecord(0, 2, b"ab"), 2), (LogRecord(0, 1, b"a"), 2), (LogRecord(2, 0, b""), 2), (LogRecord(2, 1, b"c"), 3)],
)
def test_last_record_at_or_before_the_end_is_accepted(store, held, last, end):
    store.append({held: LogRecord(0, 2, b"ab")})
    assert store.finish(held, "done", b"", last)
    assert store.snapshot("a").logged == end


@pytest.mark.parametrize("last", [LogRecord(3, 1, b"d"), LogRecord(1, 2, b"bc"), LogRecord(5, 0, b"")])
def test_last_record_with_a_gap_is_refused(store, held, last):
    store.append({held: LogRecord(0, 2, b"ab")})
    with pytest.raises(ValueError, match="2 entries"):
        store.finish(held, "done", b"", last)
    assert (store.snapshot("a").state, store.snapshot("a").logged, store.log("a")) == (
        "leased",
        2,
        [LogRecord(0, 2, b"ab")],
    )
    assert store.finish(held, "done", b"")


def test_only_the_lease_holder_finishes_a_job(store, held):
    for wrong in (LeaseToken("a", held.fence + 1), LeaseToken("a", held.fence - 1), LeaseToken("nobody's", 1)):
        assert store.finish(wrong, "done", b"") is False
    assert store.snapshot("a").state == "leased"
    store.submit(job("b"))
    assert store.finish(LeaseToken("b", 0), "done", b"") is False


def test_cancel(store, held):
    store.submit(job("b"))
    assert [store.cancel("a"), store.cancel("b"), store.cancel("nobody's")] == ["cancelled", "cancelled", None]
    assert [store.cancel("a"), store.snapshot("b").state] == ["cancelled", "cancelled"]
    assert store.take(9) == []
    assert store.append({held: LogRecord(0, 1, b"x")}) == {"a": None}
    assert store.finish(held, "done", b"") is False
    assert store.snapshot("a").result == b""
    assert store.depths() == {}
    assert store.check() == "ok"


def test_revoked_lease_is_fenced_not_cancelled(store, held):
    store.release([held])
    store.cancel("a")
    assert store.renew([held]) == {"a": "fenced"}
