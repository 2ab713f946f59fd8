"""Adapters, and tensors that a wrapper renamed, are refused by what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic import LLM
from moesaic import checkpoints as opened
from moesaic.convert import convert
from moesaic.errors import CheckpointError
from tests.support import checkpoints
from tests.support.loading import load_model

LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return checkpoints.weights(checkpoints.config())


def refused(path: Path, pattern: str) -> None:
    """Assert that loading and converting refuse the folder with the same one line, and write nothing."""
    for attempt in (
        lambda: load_model(path),
        lambda: convert(path, path.parent / "target", "hf"),
    ):
        with pytest.raises(CheckpointError, match=pattern) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("beside_model", [False, True])
def test_an_adapter_is_refused_and_its_model_is_named(tmp_path, tensors, weights, beside_model):
    path = tmp_path / "adapter"
    if beside_model:
        checkpoints.write(path, checkpoints.config(), tensors)
    path.mkdir(exist_ok=True)
    save_file({LORA: torch.ones(2, 16)}, path / weights)
    refused(path, rf"{weights}: is a PEFT adapter, not a whole model: merge it .*merge_and_unload")
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    refused(path, "is a PEFT adapter for 'some/model', not a whole model")
    with pytest.raises(CheckpointError, match="is a PEFT adapter"):  # before the error that there is no tokenizer
        LLM.load(path)


def test_the_configuration_of_an_adapter_alone_is_refused_only_without_weights(tmp_path, tensors):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("[]")
    refused(path, r"adapter_config\.json: describes a PEFT adapter, and the folder holds no weights of a model")
    load_model(checkpoints.write(path, checkpoints.config(), tensors))


@pytest.mark.parametrize(
    ("prefix", "meaning"),
    [
        ("base_model.model.", r"'base_model\.model' .* PEFT adapter: merge it"),
        ("_orig_mod.", r"'_orig_mod' .* torch\.compile: save its _orig_mod"),
        ("module.", "'module' .* DataParallel or DeepSpeed: save its module"),
        ("module._orig_mod.", "'_orig_mod' .* torch"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("_forward_module.", "Lightning"),
        ("language_model.", "'language_model' .* a model of more than text"),
        ("model.", r"inside another one: their names begin with 'model\.', such as model\.model\.embed_tokens"),
        ("net.lm.", r"their names begin with 'net\.lm\.'"),
    ],
)
def test_prefixed_names_are_refused_by_what_they_are(tmp_path, tensors, prefix, meaning):
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    refused(checkpoints.write(tmp_path / "model", checkpoints.config(), renamed), meaning)


def test_a_wrapper_around_a_part_is_found(tmp_path, tensors):
    renamed = {name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): t for name, t in tensors.items()}
    refused(checkpoints.write(tmp_path / "model", checkpoints.config(), renamed), "activation checkpointing")


def test_an_adapter_that_was_not_merged_is_found(tmp_path, tensors):
    renamed = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in tensors.items()}
    refused(checkpoints.write(tmp_path / "model", checkpoints.config(), renamed), "'base_layer' .* PEFT adapter")


def test_a_decoder_without_its_head_is_found(tmp_path, tensors):
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    refused(checkpoints.write(tmp_path / "model", checkpoints.config(), bare), "a decoder without a head")


def test_names_of_the_other_layouts_are_found(tmp_path, tensors):
    path = checkpoints.write(tmp_path / "model", checkpoints.config(), {"tok_embeddings.weight": torch.ones(24, 16)})
    refused(path, r"names of Meta's and Mistral's own files, which need params\.json")


@pytest.mark.parametrize("layout", ["mistral", "meta"])
def test_prefixed_names_are_found_in_every_layout(tmp_path, tensors, layout):
    path, prefix = tmp_path / layout, "_orig_mod."
    convert(checkpoints.write(tmp_path / "source", checkpoints.config(), tensors), path, layout)
    file = next(path.glob("consolidated*"))
    if layout == "meta":
        stored = torch.load(file, weights_only=True)
        torch.save({prefix + name: tensor for name, tensor in stored.items()}, file)
    else:
        with opened.open_checkpoint(tmp_path / "source") as source:
            save_file({prefix + name: torch.ones(1) for name in source.tensors}, file)
    with pytest.raises(CheckpointError, match=r"'_orig_mod' .* torch\.compile"):
        opened.open_checkpoint(path)
