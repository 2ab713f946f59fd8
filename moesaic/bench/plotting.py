"""What every plot has in common: its colours, and what must be there to draw one. Imports nothing slow."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moesaic.errors import InvalidParameter, InvalidRequest

SUFFIXES = (".svg", ".png")
COLOURS = ("#4477aa", "#228833", "#ee6677", "#ccbb44", "#66ccee", "#aa3377")
"""Paul Tol's bright scheme, which colour-blind readers can tell apart."""


def check(path: Path) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    Raises:
        InvalidParameter: the file's kind is not known.
        InvalidRequest: matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidParameter("plot", f"{path} ends in neither {' nor '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("a plot needs matplotlib: pip install 'moesaic[plot]'")
