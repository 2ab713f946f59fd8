"""Fixtures: the same tiny model in transformers and here, for every option that changes the computation."""

from __future__ import annotations

import pytest

from tests.support.models import CASES, moesaic_model, transformers_model


@pytest.fixture(scope="session", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The model of transformers, ours, and the checkpoint of both."""
    model = transformers_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp("pair")
    model.save_pretrained(folder)
    return model, moesaic_model(folder), folder
