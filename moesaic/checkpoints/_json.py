"""Reads JSON files of a checkpoint, up to a size limit and with one clear error for each problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError, ConfigError

MAX_BYTES = 64 << 20
"""Maximum size of a JSON file in bytes. The index of a model with 100,000 tensors takes ten million bytes."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        ConfigError: the file is missing, too large, or holds no JSON object.
        CheckpointError: the file cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(path, f"is larger than {MAX_BYTES >> 20} MiB, the limit for a configuration")
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
    """Return the JSON object in ``path``, or an empty object if the file does not exist."""
    return read_json(path) if path.exists() else {}
