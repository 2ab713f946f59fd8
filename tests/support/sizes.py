"""Sizes of tests: small by default, and full in the slow lane (``make test-slow``)."""

from __future__ import annotations

from typing import Any

import pytest


def sizes(small: Any, full: Any) -> list[Any]:
    """Return the values of a parameter: a small one for the default run, and the full one, marked ``slow``.

    For several parameters, each size is a tuple with a value for each of them.
    """
    values = [value if isinstance(value, tuple) else (value,) for value in (small, full)]
    return [pytest.param(*values[0], id="small"), pytest.param(*values[1], id="full", marks=pytest.mark.slow)]
