"""Which files of a folder are read if older files, or files of another layout, lie beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moesaic.checkpoints import detect_layout, open_checkpoint
from moesaic.convert import convert
from moesaic.errors import CheckpointError
from tests.support import checkpoints

INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = checkpoints.read(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def leftover_index(
    path: Path, name: str = INDEX, files: tuple[str, ...] = ("model-00001-of-00002.safetensors",)
) -> None:
    (path / name).write_text(json.dumps({"weight_map": {f"model.{file}": file for file in files}}))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return checkpoints.weights(checkpoints.config())


@pytest.fixture
def single(tmp_path, tensors) -> Path:
    return checkpoints.write(tmp_path / "single", checkpoints.config(), tensors)


@pytest.fixture
def sharded(single, tmp_path) -> Path:
    convert(single, tmp_path / "sharded", "hf", 3)
    return tmp_path / "sharded"


def test_a_leftover_index_beside_the_whole_file_is_passed_over(single, tensors):
    leftover_index(single)
    same(single, tensors)
    leftover_index(single, BIN_INDEX, ("pytorch_model-00001-of-00002.bin",))
    same(single, tensors)


def test_some_leftover_shards_beside_the_whole_file_are_passed_over(single, sharded, tensors):
    for name in (INDEX, "model-00001-of-00003.safetensors"):
        shutil.copy(sharded / name, single)
    same(single, tensors)
    (single / INDEX).unlink()
    same(single, tensors)


def test_an_index_may_list_the_whole_file(single, tensors):
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    same(single, tensors)


@pytest.mark.parametrize("with_index", [True, False])
def test_two_complete_sets_are_refused(single, sharded, with_index):
    for file in sharded.glob("model*" if with_index else "model*.safetensors"):
        shutil.copy(file, single)
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors and also model-00001-of-00003\.safetensors"):
        open_checkpoint(single)


def test_an_index_without_any_file_names_the_missing_one(single):
    (single / "model.safetensors").unlink()
    leftover_index(single)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: cannot be read"):
        open_checkpoint(single)


@pytest.mark.parametrize("first", [0, 1])
def test_shards_without_an_index_are_read(sharded, tensors, first):
    (sharded / INDEX).unlink()
    for number in range(1, 4) if first == 0 else ():
        file = sharded / f"model-{number:05d}-of-00003.safetensors"
        file.rename(sharded / f"model-{number - 1:05d}-of-00003.safetensors")
    same(sharded, tensors)


def test_an_index_of_other_shards_is_passed_over(sharded, tensors):
    leftover_index(sharded)
    same(sharded, tensors)


def test_a_missing_shard_without_an_index_is_told(sharded):
    (sharded / INDEX).unlink()
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is one of 3 files, but the folder holds only 2 of them"):
        open_checkpoint(sharded)


def test_of_two_sets_of_shards_the_complete_one_is_read(single, sharded, tensors, tmp_path):
    convert(single, tmp_path / "two", "hf", 2)
    for folder in (sharded, tmp_path / "two"):
        (folder / INDEX).unlink()
    shutil.copy(tmp_path / "two" / "model-00001-of-00002.safetensors", sharded)
    same(sharded, tensors)
    shutil.copy(tmp_path / "two" / "model-00002-of-00002.safetensors", sharded)
    with pytest.raises(CheckpointError, match=r"holds two sets of weights, beginning with model-00001-of-0000"):
        open_checkpoint(sharded)


def test_safetensors_files_are_read_before_torch_files(single, sharded, tensors):
    for folder in (single, sharded):
        torch.save({"model.norm.weight": torch.ones(1)}, folder / "pytorch_model.bin")
        leftover_index(folder, BIN_INDEX, ("pytorch_model-00001-of-00002.bin",))
        same(folder, tensors)
    (sharded / INDEX).unlink()
    same(sharded, tensors)


def test_torch_files_are_read_if_only_an_index_is_left_of_the_others(single, tensors):
    (single / "model.safetensors").unlink()
    leftover_index(single)
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:])):
        file = single / f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, file)
    same(single, tensors)


def test_a_git_lfs_pointer_is_named(single):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (single / "model.safetensors").unlink(missing_ok=True)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4000\n"
        (single / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=f"{name}: is a Git LFS pointer"):
            open_checkpoint(single)


@pytest.fixture
def both(single, tmp_path) -> Path:
    """A folder in two layouts, as Mistral publishes its models."""
    convert(single, tmp_path / "both", "mistral")
    for file in single.iterdir():
        shutil.copy(file, tmp_path / "both")
    return tmp_path / "both"


def test_of_two_layouts_the_complete_one_is_read(both, tensors):
    assert detect_layout(both).__name__.endswith(".hf")
    (both / "config.json").rename(both / "moved")
    assert detect_layout(both).__name__.endswith(".mistral")
    (both / "moved").rename(both / "config.json")
    (both / "model.safetensors").unlink()
    assert detect_layout(both).__name__.endswith(".mistral")
    leftover_index(both)
    assert detect_layout(both).__name__.endswith(".mistral")
    same(both, tensors)


def test_half_a_layout_beside_a_whole_one_is_passed_over(both, sharded, tensors):
    (both / "model.safetensors").unlink()
    shutil.copy(sharded / "model-00003-of-00003.safetensors", both)
    same(both, tensors)
    shutil.copy(sharded / INDEX, both)
    same(both, tensors)


def test_files_of_another_layout_without_its_configuration_change_nothing(both, tensors):
    (both / "params.json").unlink()
    assert detect_layout(both).__name__.endswith(".hf")
    same(both, tensors)
