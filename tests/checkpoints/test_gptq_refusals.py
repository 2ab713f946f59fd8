"""Quantized checkpoints that are damaged or not supported: one error, which names the file and the cause."""

from __future__ import annotations

import json

import pytest
import torch

from moesaic import checkpoints
from moesaic.convert import convert
from moesaic.errors import CheckpointError, ConfigError
from tests.support.gptq import Awq, Case, Gptq, case
from tests.support.loading import load_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def gptq() -> Case:
    return case(Gptq(act_order=True), "llama")


@pytest.fixture(scope="module")
def awq() -> Case:
    return case(Awq(), "llama")


def read_all(path):
    with checkpoints.open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"quant_method": "hqq"},
            "quant_method 'hqq' is not supported; supported: awq, bitsandbytes, compressed-tensors, gptq",
        ),
        (
            {"quant_method": ...},
            "quant_method None is not supported; supported: awq, bitsandbytes, compressed-tensors, gptq",
        ),
        ({"quant_method": ["gptq"]}, r"quant_method \['gptq'\] is not supported"),
        ({"bits": 5}, "bits 5 is not supported; supported: 2, 3, 4, 8"),
        ({"bits": "4"}, "bits '4' is not supported"),
        ({"bits": True}, "bits True is not supported"),
        ({"bits": 10**30}, "bits 1000000000000000000000000000000 is not supported"),
        ({"bits": ...}, "has no 'bits'"),
        ({"bits": None}, "has no 'bits'"),
        ({"group_size": ...}, "has no 'group_size'"),
        ({"group_size": 0}, "group_size 0 is not supported; supported: -1, and 16 or more"),
        ({"group_size": -2}, "group_size -2 is not supported"),
        ({"group_size": 32.5}, r"group_size 32\.5 is not supported"),
        ({"group_size": True}, "group_size True is not supported"),
        ({"group_size": {"x": 1}}, "group_size {'x': 1} is not supported"),
        ({"desc_act": "yes"}, "desc_act 'yes' is not supported"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported; supported: gptq, gptq_v2"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format .* is not supported"),
        ({"format": "gptq_p"}, "format 'gptq_p' is not supported"),
        ({"is_marlin_format": True}, "is_marlin_format True is not supported"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64' is not supported; supported: int32"),
        ({"rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
    ],
)
def test_settings_of_gptq_that_are_not_supported(gptq, tmp_path, settings, problem):
    with pytest.raises(ConfigError, match=f"config.json: .*{problem}") as caught:
        checkpoints.open_checkpoint(gptq.write(tmp_path, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
        ({"version": "gemv_fast"}, "version 'gemv_fast' is not supported"),
        ({"version": 3}, "version 3 is not supported"),
        ({"format": "gemv"}, "format 'gemv' is not supported"),
        ({"backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
        ({"bits": 8}, "bits 8 is not supported; supported: 4"),
        ({"zero_point": False}, "zero_point False is not supported"),
        ({"group_size": 8}, "group_size 8 is not supported"),
    ],
)
def test_settings_of_awq_that_are_not_supported(awq, tmp_path, settings, problem):
    with pytest.raises(ConfigError, match=f"config.json: .*{problem}"):
        checkpoints.open_checkpoint(awq.write(tmp_path, **settings))


@pytest.mark.parametrize("value", [True, 3, "gptq", ["gptq"]])
def test_settings_must_be_an_object(gptq, tmp_path, value):
    path = gptq.write(tmp_path)
    (path / "config.json").write_text(json.dumps(gptq.config | {"quantization_config": value}))
    with pytest.raises(ConfigError, match=r"quantization_config is .*, expected an object"):
        checkpoints.open_checkpoint(path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_settings_of_a_plain_checkpoint_are_refused(gptq, tmp_path, method):
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    path = gptq.write_plain(tmp_path)
    (path / "config.json").write_text(json.dumps(gptq.config | {"quantization_config": settings}))
    with pytest.raises(ConfigError, match=f"describes weights quantized by {method}, but there are none"):
        checkpoints.open_checkpoint(path)


def words(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"qzeros": None}, r"qzeros is missing: the module has only g_idx, qweight, scales"),
        ({"scales": None}, "scales is missing"),
        ({"g_idx": None}, "g_idx is missing"),
        ({"qweight": None}, "qweight is missing"),
        ({"weight": torch.ones(64, 64)}, r", but .*\.weight exists as well"),
        ({"qweight": words(8, 64).long()}, "qweight has the wrong dtype: expected int32"),
        ({"qweight": words(8)}, r"qweight has the wrong shape: expected a matrix, found \[8\]"),
        ({"qweight": words(0, 64)}, "qweight has the wrong shape: expected a matrix"),
        ({"qweight": words(7, 64)}, "scales has the wrong shape|g_idx has the wrong shape"),
        ({"qweight": words(8, 63), "scales": torch.ones(2, 63).half()}, "has 63 columns, expected a multiple of 8"),
        ({"qzeros": words(2, 7)}, r"qzeros has the wrong shape: expected \[2, 8\], found \[2, 7\]"),
        ({"qzeros": torch.zeros(2, 8)}, "qzeros has the wrong dtype"),
        ({"scales": torch.ones(3, 64).half()}, r"scales has the wrong shape: expected \[2, 64\]"),
        ({"scales": torch.ones(2, 64).double()}, "scales has the wrong dtype: expected float16, bfloat16, float32"),
        ({"scales": torch.ones(0, 64).half()}, "scales has the wrong shape"),
        ({"g_idx": words(63)}, r"g_idx has the wrong shape: expected \[64\], found \[63\]"),
        ({"g_idx": torch.zeros(64)}, "g_idx has the wrong dtype"),
        ({"g_idx": torch.arange(64).int() // 31}, "has group 2 in g_idx, expected 0 to 1"),
        ({"g_idx": torch.arange(64).int() // 32 - 1}, "has group -1 in g_idx, expected 0 to 1"),
        ({"g_idx": words(64) + 2**31 - 1}, "has group 2147483647 in g_idx"),
        ({"g_idx": torch.zeros(64).int()}, "has no column of group 1 in g_idx"),
    ],
)
def test_damaged_tensors_of_gptq(gptq, tmp_path, changed, problem):
    path = gptq.write(tmp_path / "source", {f"{Q}.{part}": tensor for part, tensor in changed.items()})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{Q}.*({problem})") as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=problem):
        convert(path, tmp_path / "target", "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"qzeros": None}, "qzeros is missing"),
        ({"qzeros": words(2, 9)}, r"qzeros has the wrong shape: expected \[2, 8\]"),
        ({"scales": torch.ones(1, 64).half()}, r"scales has the wrong shape: expected \[2, 64\]"),
        ({"qweight": words(40, 8), "scales": torch.ones(2, 64).half()}, "has 40 columns in groups of 32"),
        ({"g_idx": words(64)}, "g_idx is unexpected"),
    ],
)
def test_damaged_tensors_of_awq(awq, tmp_path, changed, problem):
    path = awq.write(tmp_path, {f"{Q}.{part}": tensor for part, tensor in changed.items()})
    with pytest.raises(CheckpointError, match=problem):
        load_model(path)


def test_codes_of_three_bits_need_whole_blocks(tmp_path):
    model = case(Gptq(bits=3), "llama")
    path = model.write(tmp_path / "words", {f"{Q}.qweight": words(8, 64)})
    with pytest.raises(CheckpointError, match="has 8 rows, which do not hold whole codes of 3 bits"):
        checkpoints.open_checkpoint(path)


def test_dynamic_settings_need_tensors_that_show_the_bits(tmp_path):
    model = case(Gptq(), "llama")
    for number, (changed, problem) in enumerate(
        [
            ({"g_idx": None}, "g_idx is missing: with 'dynamic' settings"),
            ({"g_idx": words(40)}, "has 8 rows for 40 columns, expected codes of 2, 3, 4 or 8 bits"),
            ({"scales": torch.ones(3, 64).half()}, r"has 3 groups for 64 columns, expected groups of 2\^n columns"),
        ]
    ):
        stored = {f"{Q}.{part}": tensor for part, tensor in changed.items()}
        with pytest.raises(CheckpointError, match=problem):
            checkpoints.open_checkpoint(model.write(tmp_path / str(number), stored, dynamic={"+:x": {"bits": 4}}))


def test_two_names_of_one_weight_are_refused(gptq, tmp_path):
    model = case(Gptq())
    experts = "model.layers.0.{}.experts.0.{}.weight"
    stored = {experts.format("mlp", "gate_proj"): torch.ones(160, 64)}
    with pytest.raises(CheckpointError, match=r"w1\.weight, which another tensor holds as well"):
        checkpoints.open_checkpoint(model.write(tmp_path, stored))
