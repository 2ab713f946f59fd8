"""Libraries that quantize weights: what they write is read as they decode it themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesaic.checkpoints import _bitsandbytes, _compressed
from moesaic.checkpoints._views import View
from tests.support.client import environment, run
from tests.support.quantized import Held

pytestmark = pytest.mark.clients
QUIET = {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
Reader = Callable[[Mapping[str, View], Mapping[str, Any], Path], Mapping[str, View]]


def read(reader: Reader, folder: Path, settings: Mapping[str, Any], module: str = "") -> dict[str, torch.Tensor]:
    """Return the weights of the modules whose names begin with ``module``, as Moesaic reads them."""
    stored = load_file(folder / "stored.safetensors")
    held = {name: Held(tensor) for name, tensor in stored.items() if name.startswith(module)}
    return {name: view.read() for name, view in reader(held, settings, folder / "config.json").items()}


def test_bitsandbytes(tmp_path):
    python = environment("bitsandbytes", "bitsandbytes==0.50.2", on_top=True)
    settings = run(python, "bitsandbytes_weights.py", str(tmp_path), **QUIET)
    found, expected = read(_bitsandbytes.weight_views, tmp_path, settings), load_file(tmp_path / "plain.safetensors")
    assert found.keys() == expected.keys()
    eight = "int8.weight"  # the library multiplies by 1 / 127, so the last bit differs
    torch.testing.assert_close(found.pop(eight), expected.pop(eight), rtol=3e-7, atol=0)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_compressed_tensors(tmp_path):
    packages = ("compressed-tensors==0.20.1", "psutil==7.1.3")
    python = environment("compressed-tensors", *packages, on_top=True)
    settings = run(python, "compressed_tensors_weights.py", str(tmp_path), **QUIET)
    expected = load_file(tmp_path / "plain.safetensors")
    assert len(expected) == len(settings)
    for module, keys in settings.items():
        found = read(_compressed.weight_views, tmp_path, keys, f"{module}.")
        weight = expected[f"{module}.weight"]  # in the dtype of the scales
        assert found.keys() == {f"{module}.weight"}
        assert torch.equal(found[f"{module}.weight"].to(weight.dtype), weight), module
