"""No tensor is lost in a conversion: the new folder has all of them, or nothing is written and the error says why."""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moesaic.checkpoints import EMBEDDING, HEAD, open_checkpoint
from moesaic.checkpoints._decoder import parse_config
from moesaic.checkpoints._original import tensor_names
from moesaic.convert import convert
from moesaic.errors import CheckpointError, ConfigError
from tests.support import checkpoints
from tests.support.loading import load_model

LAYOUTS = ("hf", "mistral", "meta")
TABLE, EXTRA = "model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.weight"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the reason why a conversion of it would lose something; empty if it would not."""

    config: dict[str, Any]
    tensors: Tensors
    damage: str = ""


def flawed(kind: str, tied: bool, flaw: str, name: str | None) -> Case:
    """Return a checkpoint with one flaw, in the tensor ``name`` if the flaw concerns only one."""
    config = checkpoints.config(kind, tie_word_embeddings=tied)
    tensors = checkpoints.weights(config)
    name = name or sorted(tensors)[-1]
    if flaw == "missing":
        return Case(config, {key: tensor for key, tensor in tensors.items() if key != name}, "is missing")
    if flaw == "shape":
        return Case(config, tensors | {name: tensors[name][:-1].clone()}, "has the wrong shape")
    if flaw == "own head" and tied:
        return Case(config, tensors | {HEAD: tensors[EMBEDDING] + 1}, f"{HEAD} is unexpected")
    if flaw == "equal head" and tied:
        return Case(config, tensors | {HEAD: tensors[EMBEDDING].clone()})
    if flaw == "table":
        return Case(config, tensors | {TABLE: torch.ones(2)})
    if flaw == "extra":
        return Case(config, tensors | {EXTRA: torch.ones(3)}, "has no name in this layout")
    return Case(config, tensors)


FLAWS = ("none", "missing", "shape", "own head", "equal head", "table", "extra")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind, tied = draw(st.sampled_from(["llama", "mistral", "mixtral"])), draw(st.booleans())
    names = sorted(checkpoints.weights(checkpoints.config(kind, tie_word_embeddings=tied)))
    return flawed(kind, tied, draw(st.sampled_from(FLAWS)), draw(st.sampled_from(names)))


def rows(tensor: torch.Tensor) -> list[list[float]]:
    """Return the rows of a tensor in an order of their own: a layout may order query and key rows differently."""
    return sorted(tensor.reshape(len(tensor), -1).tolist())


def written(path: Path, layout: str, case: Case) -> Tensors:
    """Return the tensors of a written folder by classic names. One of Meta's is read here: its reader is a process."""
    if layout != "meta":
        return checkpoints.read(path)
    names = dict(tensor_names(parse_config(case.config, path)))
    stored = torch.load(path / "consolidated.00.pth", weights_only=True)
    assert stored.keys() == names.keys()
    return {names[name]: tensor for name, tensor in stored.items()}


def check(case: Case, path: Path, layout: str, shards: int) -> None:
    """Assert that the conversion keeps every tensor, or is refused for the damage and writes nothing."""
    source = checkpoints.write(path / "source", case.config, case.tensors)
    if case.damage and (layout, EXTRA in case.tensors) != ("hf", True):
        with pytest.raises(CheckpointError, match=case.damage):
            convert(source, path / "target", layout, shards)
        assert [entry.name for entry in path.iterdir()] == ["source"]
        return
    convert(source, path / "target", layout, shards)
    found = written(path / "target", layout, case)
    expected = {name: tensor for name, tensor in case.tensors.items() if name != TABLE}
    if layout != "hf" and case.config["tie_word_embeddings"]:
        expected[HEAD] = expected[EMBEDDING]
    assert found.keys() == expected.keys()
    assert all(rows(found[name]) == rows(tensor) for name, tensor in expected.items())
    if layout != "meta" and EXTRA not in found:
        load_model(path / "target")


@settings(max_examples=60)
@given(case=cases(), layout=st.sampled_from(LAYOUTS), shards=st.integers(1, 2))
def test_any_checkpoint_is_written_whole_or_refused(tmp_path_factory, case, layout, shards):
    check(case, tmp_path_factory.mktemp("any"), layout, 1 if layout == "meta" else shards)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_flaw_in_every_layout(tmp_path, layout, flaw, tied):
    check(flawed("mixtral", tied, flaw, None), tmp_path, layout, 1)


def stored_tensors(path: Path, layout: str, change: dict[str, torch.Tensor | None]) -> None:
    """Change the tensors in the file of a folder; None removes a tensor."""
    file = next(path.glob("consolidated*"))
    if layout == "meta":
        stored = torch.load(file, weights_only=True)
    else:
        from safetensors.torch import load_file

        stored = load_file(file)
    stored = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
    torch.save(stored, file) if layout == "meta" else save_file(stored, file)


@pytest.mark.parametrize("layout", ["mistral", "meta"])
def test_the_way_back_is_checked_too(tmp_path, layout):
    convert(checkpoints.write(tmp_path / "hf", checkpoints.config()), tmp_path / "source", layout)
    stored_tensors(tmp_path / "source", layout, {"norm.weight": torch.ones(5)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the wrong shape"):
        convert(tmp_path / "source", tmp_path / "back", "hf")
    stored_tensors(tmp_path / "source", layout, {"norm.weight": None})
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing"):
        convert(tmp_path / "source", tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"some_new_trick": 3},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"attention_bias": True},
    ],
)
def test_a_model_that_cannot_run_here_is_copied_whole_or_refused(tmp_path, changes):
    config = checkpoints.config()
    tensors = checkpoints.weights(config) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}
    convert(checkpoints.write(tmp_path / "source", config | changes, tensors), tmp_path / "target", "hf", 2)
    assert checkpoints.read(tmp_path / "target").keys() == tensors.keys()
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        convert(checkpoints.write(tmp_path / "source", config | changes, tensors), tmp_path / "other", "hf")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("changes", [{"model_type": "other"}, {"quantization": {"bits": 4}}])
def test_tensors_of_an_unknown_architecture_are_copied(tmp_path, changes):
    tensors = {"body.qweight": torch.ones(4, 4, dtype=torch.int32), "language_model.w": torch.ones(2)}
    convert(checkpoints.write(tmp_path / "source", checkpoints.config() | changes, tensors), tmp_path / "target", "hf")
    assert checkpoints.read(tmp_path / "target").keys() == tensors.keys()
    with pytest.raises((ConfigError, CheckpointError)):
        convert(tmp_path / "source", tmp_path / "mistral", "mistral")


def test_a_classifier_keeps_its_head(tmp_path):
    config = checkpoints.config(architectures=["LlamaForSequenceClassification"], num_labels=3)
    source = checkpoints.write(tmp_path / "source", config)
    convert(source, tmp_path / "target", "hf", 2)
    assert checkpoints.read(tmp_path / "target")["score.weight"].shape == (3, 16)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        convert(source, tmp_path / "mistral", "mistral")


def test_types_that_a_layout_cannot_hold_are_refused(tmp_path):
    config = checkpoints.config()
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in checkpoints.weights(config).items()}
    source = checkpoints.write(tmp_path / "source", config, tensors)
    with pytest.raises(
        CheckpointError, match=r"is stored as torch\.float8_e4m3fn, which cannot be written in the meta"
    ):
        convert(source, tmp_path / "meta", "meta")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "mistral", "mistral")
    assert all(tensor.dtype == torch.float8_e4m3fn for tensor in checkpoints.read(tmp_path / "mistral").values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path, layout):
    source = checkpoints.write(tmp_path / "source", checkpoints.config())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            convert(source, tmp_path / "new" / "folder" / "target", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v11", "tekken_240911.json", "merges.txt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_of_a_tokenizer_is_copied(tmp_path, layout):
    source = checkpoints.write(tmp_path / "source", checkpoints.config())
    for name in TOKENIZER_FILES:
        (source / name).write_text(name)
    convert(source, tmp_path / "target", layout)
    for name in TOKENIZER_FILES:
        assert (tmp_path / "target" / name).read_text() == name


def test_generation_settings_are_kept_as_they_are(tmp_path):
    source = checkpoints.write(tmp_path / "source", checkpoints.config(eos_token_id=[2, 3]))
    (source / "generation_config.json").write_text(json.dumps({"top_k": -1, "temperature": "0.6"}))
    convert(source, tmp_path / "mistral", "mistral")
    with open_checkpoint(tmp_path / "mistral") as checkpoint:
        assert checkpoint.generation == {"top_k": -1, "temperature": "0.6", "eos_token_id": [2, 3]}
