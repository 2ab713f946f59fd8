"""Checkpoints written with the integers of GPTQ and compressed-tensors, decoded again bit by bit with numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moesaic import packed
from moesaic.checkpoints._packed_integers import pack_integers
from moesaic.convert import convert
from moesaic.errors import CheckpointError
from tests.support import checkpoints, gptq
from tests.support.gguf_files import TinyFile
from tests.support.gptq import Awq, Gptq, case
from tests.support.loading import load_model
from tests.support.quantized import Bitsandbytes, Compressed, files

Tensors = Mapping[str, torch.Tensor]
LINEAR = "model.layers.0.self_attn.q_proj"
CONVERTIBLE = {
    "GPTQ": Gptq(),
    "GPTQ, groups of 64": Gptq(group_size=64, symmetric=True),
    "GPTQ, one group": Gptq(group_size=-1),
    "GPTQ, act-order": Gptq(act_order=True),
    "GPTQ, act-order, groups of 64": Gptq(group_size=64, act_order=True, symmetric=True),
    "GPTQ, act-order, one group": Gptq(group_size=-1, act_order=True),
    "GPTQ, 8 bits": Gptq(bits=8, version="gptq_v2"),
    "GPTQ, 3 bits": Gptq(bits=3),
    "GPTQ, 2 bits": Gptq(bits=2, scale=torch.bfloat16),
    "AWQ": Awq(),
    "AWQ, one group": Awq(-1),
    "compressed-tensors": Compressed(group=32),
    "compressed-tensors, zero points": Compressed(group=64, symmetric=False),
    "compressed-tensors, rows": Compressed(strategy="channel"),
    "compressed-tensors, int8": Compressed("int-quantized", 8, strategy="channel"),
    "Q4_0": "Q4_0",
    "Q5_0": "Q5_0",
    "Q8_0": "Q8_0",
}


def write(method: object, path: Path, kind: str = "mixtral") -> Path:
    """Write a random quantized model."""
    if isinstance(method, str):
        return TinyFile(method, 3 if kind == "mixtral" else 0).write(path.with_suffix(".gguf"))
    return (case(method, kind) if isinstance(method, Gptq | Awq) else files(method, kind)).write(path)


def settings(path: Path) -> dict[str, Any]:
    """Return the ``quantization_config`` of a folder."""
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def parts(tensors: Tensors, module: str = LINEAR) -> dict[str, torch.Tensor]:
    return {name[len(module) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}


def modules(tensors: Tensors, part: str) -> list[str]:
    return [name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")]


def gptq_weight(tensors: Tensors, module: str, keys: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of a module in GPTQ's layout, as its description says."""
    bits = keys.get("dynamic", {}).get(f"+:^{module.replace('.', chr(92) + '.')}$", keys)["bits"]
    method = Gptq(bits, keys["group_size"], version=keys["checkpoint_format"])
    return method.weight(parts(tensors, module))


def compressed_weight(tensors: Tensors, module: str, keys: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of a module in the format pack-quantized, as its description says."""
    found = parts(tensors, module)
    groups = keys["config_groups"].values()
    [named] = [group for group in groups if module in group["targets"]] or [
        group for group in groups if group["targets"] == ["Linear"]
    ]
    bits, (rows, columns) = named["weights"]["num_bits"], found["weight_shape"].tolist()
    levels = gptq.unpack(found["weight_packed"].T, bits).T[:rows, :columns]
    scale, zeros = found["weight_scale"].float().numpy(), np.full(found["weight_scale"].shape, 1 << (bits - 1))
    assert ("weight_zero_point" in found) == (not named["weights"]["symmetric"])
    if "weight_zero_point" in found:
        zeros = gptq.unpack(found["weight_zero_point"], bits)[:rows]
    size = named["weights"]["group_size"] or columns
    order = np.arange(columns) // size
    return torch.from_numpy(scale[:, order] * (levels - zeros[:, order]).astype(np.float32))


WEIGHTS = {"gptq": (gptq_weight, "qweight"), "compressed-tensors": (compressed_weight, "weight_packed")}


def check(source: Path, path: Path, to: str) -> None:
    """Assert that a converted folder holds exactly the weights of ``source``, and their codes."""
    expected, found = checkpoints.read(source), checkpoints.read(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), weight.float()) for name, weight in expected.items())
    decode, part = WEIGHTS[to]
    stored = load_file(path / "model.safetensors")
    names = modules(stored, part)
    assert {name.split(".")[-1] for name in names} >= {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    for name in names:
        assert torch.equal(decode(stored, name, settings(path)), expected[f"{name}.weight"]), name


@pytest.mark.parametrize("to", WEIGHTS)
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_integers_are_written_exactly(name, to, tmp_path):
    source = write(CONVERTIBLE[name], tmp_path / "source")
    if to == "compressed-tensors" and name in ("GPTQ, act-order", "GPTQ, act-order, groups of 64"):
        with pytest.raises(CheckpointError, match=r"their groups are no consecutive columns \(act-order\)"):
            convert(source, tmp_path / "new", to)
        assert [file.name for file in tmp_path.iterdir()] == ["source"]
        return
    convert(source, tmp_path / "new", to)
    check(source, tmp_path / "new", to)


@pytest.mark.parametrize("to", WEIGHTS)
@pytest.mark.parametrize("name", ["GPTQ", "AWQ, one group", "Q8_0"])
def test_a_packed_folder_is_written_exactly(name, to, tmp_path):
    source = write(CONVERTIBLE[name], tmp_path / "source")
    packed.pack(source, tmp_path / "packed", dtype="float32")
    convert(tmp_path / "packed", tmp_path / "new", to)
    check(source, tmp_path / "new", to)


@pytest.mark.parametrize("name", ["GPTQ", "GPTQ, act-order", "GPTQ, 3 bits", "GPTQ, 8 bits"])
def test_gptq_to_gptq_keeps_the_codes(name, tmp_path):
    method = CONVERTIBLE[name]
    source = write(method, tmp_path / "source")
    convert(source, tmp_path / "new", "gptq")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    assert before.keys() == after.keys()
    other = ("qzeros",) if settings(tmp_path / "new")["checkpoint_format"] != method.version else ()
    for key, tensor in before.items():
        assert (other and key.endswith(other)) or torch.equal(tensor, after[key]), key


def test_the_codes_come_back_through_another_program(tmp_path):
    source = write(Gptq(group_size=64, symmetric=True), tmp_path / "source")
    convert(source, tmp_path / "one", "compressed-tensors")
    convert(tmp_path / "one", tmp_path / "two.gguf", "gguf")
    convert(tmp_path / "two.gguf", tmp_path / "three", "gptq")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "three" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("qweight"))


def test_settings_of_gptq(tmp_path):
    convert(write(Gptq(symmetric=True), tmp_path / "one"), tmp_path / "symmetric", "gptq")
    found = settings(tmp_path / "symmetric")
    assert (found["bits"], found["group_size"], found["sym"], found["desc_act"]) == (4, 32, True, False)
    assert found["checkpoint_format"] == "gptq" and found["lm_head"] is False
    assert set(found["dynamic"]) == {r"-:^lm_head$", r"-:^model\.layers\.0\.block_sparse_moe\.gate$"}
    convert(write(Gptq(group_size=-1, act_order=True), tmp_path / "two"), tmp_path / "rows", "gptq")
    found = settings(tmp_path / "rows")
    assert (found["group_size"], found["sym"], found["desc_act"]) == (-1, False, False)
    assert found["checkpoint_format"] == "gptq_v2"  # a zero point of 0 cannot be stored minus one
    convert(write(Gptq(act_order=True), tmp_path / "three"), tmp_path / "ordered", "gptq")
    assert settings(tmp_path / "ordered")["desc_act"] is True


def test_settings_of_compressed_tensors(tmp_path):
    convert(write(Awq(-1), tmp_path / "one"), tmp_path / "rows", "compressed-tensors")
    found = settings(tmp_path / "rows")
    [group] = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert sorted(found["ignore"]) == ["lm_head", "model.layers.0.block_sparse_moe.gate"]
    weights = group["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("channel", None, False)


@pytest.mark.parametrize("to", WEIGHTS)
def test_modules_with_different_bits(to, tmp_path):
    tiny, other = TinyFile("Q4_0"), TinyFile("Q8_0", seed=1)
    tiny.tensors["blk.1.ffn_up.weight"] = other.tensors["blk.1.ffn_up.weight"]
    tiny.tensors["blk.0.attn_v.weight"] = TinyFile("F16", seed=2).tensors["blk.0.attn_v.weight"]
    source = tiny.write(tmp_path / "tiny.gguf")
    convert(source, tmp_path / "new", to)
    expected, found = checkpoints.read(source), checkpoints.read(tmp_path / "new")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    stored = load_file(tmp_path / "new" / "model.safetensors")
    decode, part = WEIGHTS[to]
    names = modules(stored, part)
    assert "model.layers.1.mlp.up_proj" in names and "model.layers.0.self_attn.v_proj" not in names
    assert all(torch.equal(decode(stored, n, settings(tmp_path / "new")), expected[f"{n}.weight"]) for n in names)
    plain = "model.layers.0.self_attn.v_proj"
    listed = settings(tmp_path / "new")
    assert (
        (plain in listed["ignore"])
        if to != "gptq"
        else (f"-:^{plain.replace('.', chr(92) + '.')}$" in listed["dynamic"])
    )


REFUSED = {
    "Q4_1": ("Q4_1", "their offsets are no whole multiples of their scales"),
    "Q4_K": ("Q4_K", "their offsets are no whole multiples of their scales"),
    "IQ4_NL": ("IQ4_NL", "they have the levels of iq4_nl, not integers"),
    "NF4": (Bitsandbytes("nf4"), "they have the levels of nf4, not integers"),
    "float8": (Compressed("float-quantized", 8, strategy="channel"), "they have no integer codes"),
}


@pytest.mark.parametrize("to", WEIGHTS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_integer_is_refused(name, to, tmp_path):
    method, reason = REFUSED[name]
    source = write(method, tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"cannot be written exactly as integers of {to}") as caught:
        convert(source, tmp_path / "new", to)
    assert reason in str(caught.value) and "--decode" in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [source.name]
    with pytest.raises(CheckpointError, match="has no quantized weights that can be written as"):
        convert(source, tmp_path / "new", to, decode=True)
    assert [file.name for file in tmp_path.iterdir()] == [source.name]


def test_scales_that_gptq_cannot_hold_are_refused(tmp_path):
    source = write("Q6_K", tmp_path / "source")  # the scale of a group is a product of two numbers
    with pytest.raises(CheckpointError, match="their scales are no float16 or bfloat16 numbers"):
        convert(source, tmp_path / "new", "gptq")
    convert(source, tmp_path / "new", "compressed-tensors")
    check(source, tmp_path / "new", "compressed-tensors")


@pytest.mark.parametrize("to", WEIGHTS)
def test_with_decode_only_what_is_inexact_becomes_floats(to, tmp_path):
    tiny = TinyFile("Q4_0")
    tiny.tensors["blk.1.ffn_up.weight"] = TinyFile("Q4_K").tensors["blk.1.ffn_up.weight"]
    source = tiny.write(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight \(Q4_K\)"):
        convert(source, tmp_path / "new", to)
    convert(source, tmp_path / "new", to, decode=True)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert [name for name in stored if name.endswith("up_proj.weight")] == ["model.layers.1.mlp.up_proj.weight"]
    found = checkpoints.read(tmp_path / "new")
    assert all(torch.equal(found[name], weight) for name, weight in checkpoints.read(source).items())


@pytest.mark.parametrize("to", WEIGHTS)
def test_plain_weights_are_refused(to, tmp_path):
    source = checkpoints.write(tmp_path / "source", checkpoints.config())
    with pytest.raises(
        CheckpointError, match=f"has no quantized weights that can be written as {to}; convert it to hf"
    ):
        convert(source, tmp_path / "new", to)


@pytest.mark.parametrize("to", WEIGHTS)
def test_the_folder_loads_and_keeps_its_codes(to, tmp_path):
    convert(write("Q8_0", tmp_path / "source"), tmp_path / "new", to, shards=2)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 2
    model = load_model(tmp_path / "new").model
    assert model.blocks[0].attention.wq.weight.name.startswith("grouped:bits=8")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_integers_are_packed_as_a_string_of_bits(bits, axis):
    integers = torch.randint(0, 1 << bits, (64, 96), dtype=torch.uint8)
    expected = gptq.pack(integers.numpy() if axis == 0 else integers.T.numpy(), bits)
    assert torch.equal(pack_integers(integers, axis, bits), expected if axis == 0 else expected.T)
