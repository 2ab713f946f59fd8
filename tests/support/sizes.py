"""Sizes of tests: small by default, and full in the slow lane (``make test-slow``)."""

from __future__ import annotations

from typing import Any

import pytest


def sizes(small: Any, full: Any) -> list[Any]:
    """Return the values of a parameter: a small one for the default run, and the full one, marked ``slow``."""
    return [pytest.param(small, id="small"), pytest.param(full, id="full", marks=pytest.mark.slow)]
