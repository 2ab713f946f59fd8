"""Tiny random checkpoints, written by transformers, and slots that take what they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import Tiny


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral as save_pretrained writes it, in several shards; tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("mixtral")
    Tiny.build().save_pretrained(path, max_shard_size="40KB")
    return path
