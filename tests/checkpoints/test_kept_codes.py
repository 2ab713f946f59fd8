"""Models keep the codes and scales of quantized checkpoints, whichever program wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moesaic import ops, packed
from moesaic.errors import CheckpointError, InvalidParameter
from moesaic.formats import Packed
from tests.support import checkpoints
from tests.support.gguf_files import TinyFile
from tests.support.gptq import Awq, Gptq, case
from tests.support.loading import load_model
from tests.support.quantized import Bitsandbytes, Compressed, as_bytes, files, stacked_files

KEPT = {
    "GPTQ, 4 bits": Gptq(),
    "GPTQ, 3 bits, one group": Gptq(3, -1),
    "GPTQ, 8 bits, version 2": Gptq(8, 64, version="gptq_v2"),
    "GPTQ, act-order": Gptq(act_order=True),
    "GPTQ, 3 bits, act-order, groups of 128": Gptq(3, 128, act_order=True),
    "AWQ": Awq(32),
    "compressed-tensors, 4 bits": Compressed(group=32),
    "compressed-tensors, 4 bits, asymmetric rows": Compressed(strategy="channel", symmetric=False),
    "compressed-tensors, act-order": Compressed(group=32, order=True),
    "compressed-tensors, act-order, asymmetric": Compressed(bits=8, group=32, order=True, symmetric=False),
    "compressed-tensors, int8": Compressed("int-quantized", 8, strategy="channel"),
    "bitsandbytes, NF4": Bitsandbytes("nf4"),
    "bitsandbytes, FP4 with quantized scales": Bitsandbytes("fp4", nested=True),
}
DECODED = {
    "compressed-tensors, float8": Compressed("float-quantized", 8, strategy="channel"),
}


def folders(method: object, kind: str, path: Path) -> tuple[Path, Path]:
    """Return a quantized model, and the same model with plain weights."""
    model = case(method, kind) if isinstance(method, Gptq | Awq) else files(method, kind)
    return model.write(path / "quantized"), model.write_plain(path / "plain")


def weights(path: Path) -> dict[str, Packed]:
    return {name: part for name, part in load_model(path).model.named_modules() if isinstance(part, Packed)}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", KEPT)
def test_codes_and_scales_are_kept(name, kind, tmp_path):
    quantized, plain = folders(KEPT[name], kind, tmp_path)
    kept, expected = weights(quantized), weights(plain)
    assert kept.keys() == expected.keys()
    for key, weight in kept.items():
        assert torch.equal(weight.dequantize(), expected[key].dequantize()), key
    grouped = {key for key, weight in kept.items() if weight.name.startswith("grouped")}
    assert grouped == {key for key in kept if not key.startswith(("embed", "head"))}


@pytest.mark.parametrize("name", DECODED)
def test_weights_that_no_format_keeps_are_decoded(name, tmp_path):
    quantized, plain = folders(DECODED[name], "mixtral", tmp_path)
    for key, weight in weights(quantized).items():
        assert weight.name == "float32"
        assert torch.equal(weight.dequantize(), weights(plain)[key].dequantize()), key


STACKED = {
    "compressed-tensors, 4 bits": (Compressed(group=32), "."),
    "compressed-tensors, 4 bits, gate_up_proj_packed": (Compressed(group=32, symmetric=False), "_"),
    "compressed-tensors, act-order": (Compressed(group=32, order=True), "."),
    "compressed-tensors, int8, gate_up_proj": (Compressed("int-quantized", 8, strategy="channel"), "_"),
    "compressed-tensors, int8, one scale": (Compressed("int-quantized", 8, strategy="tensor", flat_scale=True), "."),
    "compressed-tensors, float8": (Compressed("float-quantized", 8, strategy="channel"), "_"),
    "bitsandbytes, NF4": (Bitsandbytes("nf4"), "."),
    "bitsandbytes, FP4 with quantized scales": (Bitsandbytes("fp4", nested=True), "."),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacks_of_quantized_experts_are_kept(name, tmp_path):
    variant, separator = STACKED[name]
    model = stacked_files(variant, separator)
    quantized, plain = model.write(tmp_path / "quantized"), model.write_plain(tmp_path / "plain")
    read = checkpoints.read(quantized)
    assert read.keys() == model.plain.keys()
    assert all(torch.equal(read[key], weight) for key, weight in model.plain.items())
    kept, expected = weights(quantized), weights(plain)
    for key, weight in kept.items():
        assert torch.equal(weight.dequantize(), expected[key].dequantize()), key
        assert weight.name.startswith("grouped") == ("experts" in key and "float8" not in name), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_up_proj.weight_packed": torch.ones(3, 192, dtype=torch.int32)}, "gate_up_proj is no stack of experts"),
        ({"gate_up_proj.weight_packed": torch.ones(1 << 20, 0, 8).int()}, "gate_up_proj is no stack of experts"),
        ({"gate_up_proj.weight_packed": torch.ones(1 << 16, 1, 8).int()}, "gate_up_proj is no stack of experts"),
        ({"gate_up_proj_packed": torch.ones(3, 192, 8).int()}, "holds weight_packed, which another tensor holds"),
        ({"gate_up_proj.weight_packed": None}, "gate_up_proj is no stack of experts"),
        ({"gate_up_proj.weight_scale": torch.ones(2, 192, 2).bfloat16()}, "expected 3 experts in the first axis"),
        ({"gate_up_proj.weight_scale": torch.ones(3, 7, 2).bfloat16()}, r"gate_up_proj.weight_scale is \[7, 2\]"),
        ({"gate_up_proj.weight_shape": torch.tensor([3, 192, 63])}, "gate_up_proj.weight has the wrong|wrong shape"),
        ({"gate_up_proj.weight_scale": None}, "gate_up_proj.*(unexpected|missing|packed)"),
    ],
)
def test_damaged_stacks_of_experts(changes, message, tmp_path):
    model = stacked_files(Compressed(group=32))
    for name, tensor in changes.items():
        model.stored.pop(f"model.layers.0.mlp.experts.{name}", None)
        if tensor is not None:
            model.stored[f"model.layers.0.mlp.experts.{name}"] = tensor
    with pytest.raises(CheckpointError, match=message):
        load_model(model.write(tmp_path / "model"))


MIXED = {
    ("Q4_K", "Q5_K"): "grouped:bits=5:scale=super:offset=value",
    ("Q4_0", "Q8_0"): "grouped:bits=8",
    ("Q5_1", "Q4_1"): "grouped:bits=5:offset=value",
    ("Q4_K", "Q6_K"): None,
    ("Q4_0", "Q4_1"): None,
    ("IQ4_NL", "Q4_0"): None,
    ("Q4_0", "F16"): None,
}


@pytest.mark.parametrize("kinds", MIXED, ids="-".join)
def test_experts_of_several_types_share_a_format_that_holds_all(kinds, tmp_path):
    """The file has one tensor for each expert, and the last expert has another type."""
    tiny, other = (TinyFile(kind, experts=3, seed=number) for number, kind in enumerate(kinds))
    for file in (tiny, other):
        file.split_experts()
    tiny.tensors |= {name: tensor for name, tensor in other.tensors.items() if ".2.weight" in name}
    tiny.weights |= {name: weight for name, weight in other.weights.items() if ".experts.2." in name}
    loaded = load_model(tiny.write(tmp_path / "tiny.gguf"))
    groups = [group for group in loaded.weights if group.role == "experts"]
    assert {group.stored for group in groups} == {{"F16": "float16"}.get(kind, kind) for kind in kinds}
    assert {(group.format, group.error) for group in groups} == {(MIXED[kinds] or "float32", 0)}
    for layer, block in enumerate(loaded.model.blocks):
        for number, stack in (("w1", block.mlp.experts.gate), ("w2", block.mlp.experts.down)):
            for expert in range(3):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{number}.weight"
                assert torch.equal(stack.dequantize(index=expert), tiny.weights[name])


def test_experts_with_other_bits_groups_and_orders_share_a_format(tmp_path):
    model, other = case(Gptq(act_order=True)), case(Gptq(bits=8, group_size=64, scale=torch.bfloat16))
    for mine, others in ((model.stored, other.stored), (model.weights, other.weights)):
        mine.update({name: tensor for name, tensor in others.items() if ".experts.1." in name})
    quantized, plain = model.write(tmp_path / "quantized", dynamic={"+:.*": {}}), model.write_plain(tmp_path / "plain")
    kept, expected = weights(quantized), weights(plain)
    for key, weight in kept.items():
        assert torch.equal(weight.dequantize(), expected[key].dequantize()), key
        if ".experts." in key:
            assert weight.name == "grouped:bits=8:scale=float32:offset=zero:order=act"


@pytest.mark.parametrize("shape", [[576, 64], [3, 192, 0], [1025, 1, 64], [3, 192, 65]])
def test_damaged_stacks_of_bitsandbytes(shape, tmp_path):
    model, name = stacked_files(Bitsandbytes()), "model.layers.0.mlp.experts.gate_up_proj"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    model.stored[state] = as_bytes(json.loads(bytes(model.stored[state].tolist())) | {"shape": shape})
    with pytest.raises(CheckpointError, match=r"gate_up_proj(.quant_state.bitsandbytes__nf4)? .*(shape|bytes)"):
        load_model(model.write(tmp_path / "model"))


def test_a_format_may_be_chosen_for_weights_that_the_file_does_not_quantize(tmp_path):
    quantized, _ = folders(KEPT["AWQ"], "mixtral", tmp_path)
    assert load_model(quantized, format="head=int8").model.head.weight.name == "int8"
    with pytest.raises(InvalidParameter, match="int8 would round the experts weights of"):
        load_model(quantized, format="experts=int8")


def formats(path: Path, **options: object) -> dict[str, set[str]]:
    """Return the formats in memory of the weights of each role."""
    found: dict[str, set[str]] = {}
    for group in load_model(path, **options).weights:
        found.setdefault(group.role, set()).add(group.format)
    return found


def test_roles_that_are_not_named_keep_their_codes(tmp_path):
    path = TinyFile("Q4_K", experts=3).write(tmp_path / "tiny.gguf")
    codes = {"grouped:scale=super:offset=value"}
    with pytest.raises(InvalidParameter, match="int2 would round the experts weights of"):
        load_model(path, format="experts=int2")
    kept = formats(path, format="experts=int2", requantize=True)
    assert kept == {"experts": {"int2"}, "attention": codes, "embedding": codes, "head": codes}
    everything = formats(path, format="q4", requantize=True)
    assert everything == {"experts": {"int4"}, "attention": {"int4"}, "embedding": codes, "head": {"int8"}}
    assert formats(path, format="attention=float32")["experts"] == codes


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("mlp=int4", "grouped:bits=8"),
        ("q4", "grouped:bits=8"),
        ("head=int8", "grouped:bits=8"),
        ("float32", "float32"),
        ("head=float32", "float32"),
    ],
)
def test_a_tied_head_is_the_embedding(chosen, expected, tmp_path):
    """An embedding is never quantized, so only a plain format of the head changes it."""
    tiny = TinyFile("Q4_1", tied=True)
    loaded = load_model(tiny.write(tmp_path / "tiny.gguf"), format=chosen, requantize=True)
    assert loaded.model.head.weight is loaded.model.embed.weight and loaded.model.head.weight.name == expected
    assert torch.equal(loaded.model.embed.weight.dequantize(), tiny.weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["GPTQ, act-order", "compressed-tensors, act-order"])
def test_a_packed_folder_keeps_codes_and_their_order(name, tmp_path):
    folder, _ = folders(KEPT[name], "mixtral", tmp_path)
    packed.pack(folder, tmp_path / "packed")
    mapped, read = (dict(load_model(path).model.named_parameters()) for path in (tmp_path / "packed", folder))
    assert mapped.keys() == read.keys() and any(key.endswith("order") for key in read)
    assert all(torch.equal(mapped[key], part) for key, part in read.items())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", ["GPTQ, 4 bits", "GPTQ, act-order", "compressed-tensors, act-order"])
def test_a_model_with_codes_answers_as_the_plain_one(name, kind, tmp_path):
    folder, plain = folders(KEPT[name], kind, tmp_path)
    for path in (folder, plain):  # all experts are chosen: no near tie between two of them changes the logits
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(
            json.dumps(config | ({"num_experts_per_tok": 3} if kind == "mixtral" else {}))
        )
    with torch.inference_mode():
        kept, exact = (
            model.logits(model(ops.Batch.whole([[1, 5, 9, 3, 2, 7]])))
            for model in (load_model(folder).model, load_model(plain, format="float32").model)
        )
    assert (kept - exact).norm() <= 0.03 * exact.norm()  # activations are rounded to eight bits
