"""JSON files of a checkpoint: read with a bound, and answered with one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError, ConfigError

LIMIT = 64 << 20
"""Bytes that no honest file reaches: the index of a model with 100,000 tensors takes ten million."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        ConfigError: the file is missing, too big, or holds no JSON object.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise ConfigError(path, f"is larger than {LIMIT >> 20} MiB, which no configuration is")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(path, "is missing") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(path, "does not hold a JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, or an empty one if there is no such file."""
    return read_json(path) if path.exists() else {}
