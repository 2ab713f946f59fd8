"""Colours of all plots, and a check that a plot can be drawn. This module imports nothing slow."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moesaic.errors import InvalidParameter, InvalidRequest

SUFFIXES = (".svg", ".png")
COLOURS = ("#4477aa", "#228833", "#ee6677", "#ccbb44", "#66ccee", "#aa3377")
"""Paul Tol's "bright" colour scheme, which is safe for colour-blind readers."""


def check(path: Path) -> None:
    """Check, before a measurement starts, that its plot can be drawn to a file.

    Raises:
        InvalidParameter: the file has an unknown suffix.
        InvalidRequest: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidParameter("plot", f"{path} ends in neither {' nor '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("a plot needs matplotlib: pip install 'moesaic[plot]'")
