"""Fixtures: the same tiny model in transformers and here, for every option that changes the computation."""

from __future__ import annotations

import pytest

from tests.support.models import CASES, ours, theirs


@pytest.fixture(scope="session", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The model of transformers, ours, and the checkpoint of both."""
    model = theirs(*CASES[request.param])
    folder = tmp_path_factory.mktemp("pair")
    model.save_pretrained(folder)
    return model, ours(folder), folder
