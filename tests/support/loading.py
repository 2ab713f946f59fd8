"""Loads a model from the options of a plan, for tests that need neither the plan nor an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesaic import loading
from moesaic.load_options import LoadOptions
from moesaic.loading import Loaded
from moesaic.plan import make_plan


def load_model(path: Path, **options: Any) -> Loaded:
    """Return the model at ``path``; ``options`` are fields of ``LoadOptions``."""
    return loading.load_model(make_plan(path, LoadOptions(**options)))
