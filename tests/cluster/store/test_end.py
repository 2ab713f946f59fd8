"""A job's log has no gap and no repeat, and a job ends once."""

from __future__ import annotations

import pytest

from moesaic.cluster.jobs import LeaseToken, LogRecord
from tests.support.stores import job, token_of


@pytest.fixture
def lease_token(store) -> LeaseToken:
    """The lease token of job ``a``."""
    store.submit(job("a", idempotency_key="n"))
    return token_of(store.lease("w", ["m"], 1)[0])


def test_records_come_in_order(store, lease_token):
    assert store.append({lease_token: LogRecord(0, 2, b"ab")}) == {"a": 2}
    assert store.append({lease_token: LogRecord(2, 3, b"cde")}) == {"a": 5}
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
def test_record_with_a_gap_is_not_written(store, lease_token, record):
    store.append({lease_token: LogRecord(0, 2, b"ab")})
    assert store.append({lease_token: record}) == {"a": 2}
    assert store.log("a") == [LogRecord(0, 2, b"ab")]
    assert store.append({lease_token: LogRecord(2, 1, b"c")}) == {"a": 3}
    assert store.check() == "ok"


def test_log_is_read_from_any_entry(store, lease_token):
    for start in (0, 2, 4):
        store.append({lease_token: LogRecord(start, 2, b"%d" % start)})
    starts = [[record.start for record in store.log("a", start)] for start in range(8)]
    assert starts == [[0, 2, 4], [0, 2, 4], [2, 4], [2, 4], [4], [4], [], []]
    assert store.log("nobody's") == []


def test_append_to_several_logs(store):
    for n in range(20):
        store.submit(job(f"j{n}"))
    lease_tokens = [token_of(lease) for lease in store.lease("w", ["m"], 20)]
    store.cancel("j3")
    parts = {lease_token: LogRecord(0, n + 1, b"x") for n, lease_token in enumerate(lease_tokens)}
    assert store.append(parts) == {f"j{n}": None if n == 3 else n + 1 for n in range(20)}
    assert store.append({}) == {}


def test_the_next_lease_has_the_log(store, lease_token):
    store.append({lease_token: LogRecord(0, 2, b"ab")})
    store.append({lease_token: LogRecord(2, 1, b"c")})
    store.release([lease_token])
    [lease] = store.lease("w", ["m"], 1)
    assert lease.log == (LogRecord(0, 2, b"ab"), LogRecord(2, 1, b"c"))
    assert store.append({token_of(lease): LogRecord(3, 1, b"d")}) == {"a": 4}


@pytest.mark.parametrize("state", ["done", "failed"])
def test_job_ends_once(store, lease_token, state):
    store.append({lease_token: LogRecord(0, 1, b"x")})
    assert store.finish(lease_token, state, b"result", LogRecord(1, 2, b"yz")) is True
    snapshot = store.snapshot("a")
    assert (snapshot.state, snapshot.result, snapshot.logged) == (state, b"result", 3)
    other_state = "failed" if state == "done" else "done"
    assert store.finish(lease_token, state, b"result", LogRecord(1, 2, b"yz")) is True
    assert store.finish(lease_token, other_state, b"another") is True
    assert store.snapshot("a") == snapshot
    assert store.append({lease_token: LogRecord(3, 1, b"late")}) == {"a": None}
    assert store.renew([lease_token]) == {"a": "fenced"}
    assert store.cancel("a") == state
    assert store.lease_ids() == []
    assert store.log("a") == [LogRecord(0, 1, b"x"), LogRecord(1, 2, b"yz")]
    assert store.check() == "ok"


@pytest.mark.parametrize(
    ("last", "end"),
    [(LogRecord(0, 2, b"ab"), 2), (LogRecord(0, 1, b"a"), 2), (LogRecord(2, 0, b""), 2), (LogRecord(2, 1, b"c"), 3)],
)
def test_last_record_at_or_before_the_end_is_accepted(store, lease_token, last, end):
    store.append({lease_token: LogRecord(0, 2, b"ab")})
    assert store.finish(lease_token, "done", b"", last)
    assert store.snapshot("a").logged == end


@pytest.mark.parametrize("last", [LogRecord(3, 1, b"d"), LogRecord(1, 2, b"bc"), LogRecord(5, 0, b"")])
def test_last_record_with_a_gap_is_refused(store, lease_token, last):
    store.append({lease_token: LogRecord(0, 2, b"ab")})
    with pytest.raises(ValueError, match="2 entries"):
        store.finish(lease_token, "done", b"", last)
    assert (store.snapshot("a").state, store.snapshot("a").logged, store.log("a")) == (
        "leased",
        2,
        [LogRecord(0, 2, b"ab")],
    )
    assert store.finish(lease_token, "done", b"")


def test_only_the_lease_holder_finishes_a_job(store, lease_token):
    for wrong in (
        LeaseToken("a", lease_token.fence + 1),
        LeaseToken("a", lease_token.fence - 1),
        LeaseToken("nobody's", 1),
    ):
        assert store.finish(wrong, "done", b"") is False
    assert store.snapshot("a").state == "leased"
    store.submit(job("b"))
    assert store.finish(LeaseToken("b", 0), "done", b"") is False


def test_cancel(store, lease_token):
    store.submit(job("b"))
    assert [store.cancel("a"), store.cancel("b"), store.cancel("nobody's")] == ["cancelled", "cancelled", None]
    assert [store.cancel("a"), store.snapshot("b").state] == ["cancelled", "cancelled"]
    assert store.lease_ids(9) == []
    assert store.append({lease_token: LogRecord(0, 1, b"x")}) == {"a": None}
    assert store.finish(lease_token, "done", b"") is False
    assert store.snapshot("a").result == b""
    assert store.depths() == {}
    assert store.check() == "ok"


def test_revoked_lease_is_fenced_not_cancelled(store, lease_token):
    store.release([lease_token])
    store.cancel("a")
    assert store.renew([lease_token]) == {"a": "fenced"}
