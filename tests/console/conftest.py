"""Fixtures: a loaded model, and a model whose logits overflow."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.llm import LLM


@pytest.fixture(scope="session")
def llm(talker: Path) -> Iterator[LLM]:
    with LLM.load(talker, context=128) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def overflowing(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with finite weights, so that it can be loaded, but infinite logits."""
    path = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(talker, path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
