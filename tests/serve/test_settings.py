"""Tests of the settings: every limit is checked."""

from __future__ import annotations

from dataclasses import fields

import pytest

from moesaic import cli
from moesaic.cli import server_options
from moesaic.errors import InvalidParameter
from moesaic.serve.settings import Settings

LIMITS = [field for field in fields(Settings) if type(field.default) in (int, float) and field.name != "port"]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda field: field.name)
def test_limits_must_be_positive(limit):
    with pytest.raises(InvalidParameter):
        Settings(**{limit.name: -1})
    with pytest.raises(InvalidParameter):
        Settings(**{limit.name: float("nan")})
    if limit.name in ("request_seconds", "queue_seconds"):
        Settings(**{limit.name: 0})
    else:
        with pytest.raises(InvalidParameter):
            Settings(**{limit.name: 0})


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
)
def test_loopback_hosts(host, loopback):
    assert Settings(host=host).loopback is loopback
    for public_host in ("0.0.0.0", "::", "192.168.1.1", "example.org", "127.example.org", "", "1270.0.0.1"):
        assert not Settings(host=public_host).loopback, public_host


@pytest.mark.parametrize("command", ["serve", "gateway"])
@pytest.mark.parametrize("flag", ["--keep-alive-timeout", "--timeout-keep-alive"])
def test_idle_connections_are_kept_longer_than_by_load_balancers(command, flag):
    """Where a balancer keeps connections for 60 s, the server must not be the first to close one."""
    assert server_options.settings(cli._parser().parse_args([command])).idle_seconds > 60
    assert server_options.settings(cli._parser().parse_args([command, flag, "620"])).idle_seconds == 620
    with pytest.raises(InvalidParameter):
        server_options.settings(cli._parser().parse_args([command, flag, "0"]))
