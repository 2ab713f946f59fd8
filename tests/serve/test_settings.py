"""Tests of the settings: their limits are positive, and ``docs/serving.md`` lists them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from moesaic.engine import Limits
from moesaic.errors import InvalidParameter
from moesaic.serve.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
LIMITS = [field for field in fields(Settings) if type(field.default) in (int, float) and field.name != "port"]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda field: field.name)
def test_the_page_lists_every_limit(limit):
    [row] = re.findall(rf"^\| `{limit.name}`.*?\| *([\d.]+) *\|", PAGE, re.M)
    assert float(row) == limit.default


def test_the_page_lists_the_engine_limits():
    limits = Limits()
    assert f"each model | {limits.sequences} |" in PAGE and f"answers that wait | {limits.queue} |" in PAGE


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
