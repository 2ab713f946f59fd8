"""Settings of a server: every limit is checked."""

from __future__ import annotations

from dataclasses import fields

import pytest

from moesaic.errors import InvalidParameter
from moesaic.serve.settings import Settings

BOUNDS = [each for each in fields(Settings) if type(each.default) in (int, float) and each.name != "port"]


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda each: each.name)
def test_no_bound_is_below_nothing(bound):
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
def test_what_only_this_machine_reaches(host, alone):
    assert Settings(host=host).loopback is alone
    for open_to_others in ("0.0.0.0", "::", "192.168.1.1", "example.org", "127.example.org", "", "1270.0.0.1"):
        assert not Settings(host=open_to_others).loopback, open_to_others
