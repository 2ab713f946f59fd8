"""Tiny random checkpoints, written by transformers, and slots that keep the tensors stored in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import Tiny


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral written by save_pretrained in several shards; tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("mixtral")
    Tiny.build().save_pretrained(path, max_shard_size="40KB")
    return path
