"""Bounds: none is nothing, and the page about serving tells every one as it is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from moesaic.engine import Limits
from moesaic.errors import InvalidParameter
from moesaic.serve.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
BOUNDS = [each for each in fields(Settings) if type(each.default) in (int, float) and each.name != "port"]


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda each: each.name)
def test_the_page_lists_every_limit(bound):
    [row] = re.findall(rf"^\| `{bound.name}`.*?\| *([\d.]+) *\|", PAGE, re.M)
    assert float(row) == bound.default


def test_the_page_lists_the_engine_limits():
    limits = Limits()
    assert f"each model | {limits.sequences} |" in PAGE and f"answers that wait | {limits.queue} |" in PAGE


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda each: each.name)
def test_limits_must_be_positive(bound):
    with pytest.raises(InvalidParameter):
        Settings(**{bound.name: -1})
    with pytest.raises(InvalidParameter):
        Settings(**{bound.name: float("nan")})
    if bound.name in ("request_seconds", "queue_seconds"):
        Settings(**{bound.name: 0})
    else:
        with pytest.raises(InvalidParameter):
            Settings(**{bound.name: 0})


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
)
def test_loopback_hosts(host, alone):
    assert Settings(host=host).loopback is alone
    for open_to_others in ("0.0.0.0", "::", "192.168.1.1", "example.org", "127.example.org", "", "1270.0.0.1"):
        assert not Settings(host=open_to_others).loopback, open_to_others
