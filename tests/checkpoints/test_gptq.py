"""GPTQ and AWQ checkpoints give the floats, the codes and the logits that the description of their layouts implies."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic import checkpoints, ops
from moesaic.checkpoints import _awq, _gptq
from moesaic.checkpoints._grouped_weight import GroupedWeight
from moesaic.checkpoints._views import InMemory, bounds, sizes
from moesaic.convert import convert
from moesaic.errors import CheckpointError, ConfigError
from tests.support import gptq
from tests.support.gptq import Awq, Gptq, case
from tests.support.loading import load_model
from tests.support.models import moesaic_model

GPTQ = {
    "4 bits": Gptq(),
    "4 bits, act-order": Gptq(act_order=True),
    "4 bits, act-order, groups of 128": Gptq(group_size=128, act_order=True),
    "4 bits, one group": Gptq(group_size=-1),
    "4 bits, one group, act-order": Gptq(group_size=-1, act_order=True),
    "4 bits, version 2": Gptq(version="gptq_v2", act_order=True),
    "4 bits, symmetric": Gptq(group_size=64, symmetric=True),
    "4 bits, without g_idx": Gptq(group_size=128, g_idx=False),
    "4 bits, GPTQModel": Gptq(quantizer="gptqmodel:7.6.0"),
    "3 bits": Gptq(bits=3, group_size=128),
    "3 bits, act-order": Gptq(bits=3, group_size=64, act_order=True),
    "3 bits, version 2": Gptq(bits=3, version="gptq_v2"),
    "3 bits, GPTQModel 5": Gptq(bits=3, quantizer="gptqmodel:5.8.0"),
    "3 bits, GPTQModel 7": Gptq(bits=3, quantizer="gptqmodel:7.0.0-dev"),
    "8 bits": Gptq(bits=8, group_size=64),
    "8 bits, act-order, version 2": Gptq(bits=8, act_order=True, version="gptq_v2"),
    "8 bits, GPTQModel": Gptq(bits=8, quantizer="gptqmodel:1.4.0"),
    "2 bits": Gptq(bits=2, scale=torch.bfloat16),
    "2 bits, GPTQModel": Gptq(bits=2, quantizer="gptqmodel:1.4.0", scale=torch.float32),
}
AWQ = {"AWQ": Awq(), "AWQ, groups of 128": Awq(128), "AWQ, one group": Awq(-1)}
METHODS = GPTQ | AWQ
PARTS = [(), (slice(32, 40),), (slice(0, 64), slice(96, 160)), (slice(3, 50), slice(5, 101)), (slice(7, 7),)]
"""Parts of a weight [64, 160]: as tensor parallelism cuts it, and with borders inside of words and groups."""


def view_of(method: gptq.Method, rows: int = 64, columns: int = 160) -> tuple[GroupedWeight, torch.Tensor]:
    """Return the view of a random weight, and the weight itself."""
    tensors = method.tensors(rows, columns, np.random.default_rng(1))
    stored = {f"layer.{part}": InMemory(tensor, Path("model.safetensors")) for part, tensor in tensors.items()}
    module = _awq if isinstance(method, Awq) else _gptq
    views = module.weight_views(stored, method.settings, Path("config.json"))
    assert views.keys() == {"layer.weight"}
    view = views["layer.weight"]
    assert isinstance(view, GroupedWeight)
    return view, method.weight(tensors)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_any_part_of_a_weight_is_decoded(method):
    view, weight = view_of(method)
    assert view.info.shape == weight.shape and view.info.dtype == torch.float32
    for index in PARTS:
        assert torch.equal(view.read(index), weight[index]), index


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_codes_stand_for_the_same_weight(method):
    view, weight = view_of(method)
    act_order = getattr(method, "act_order", False) and method.group_size != -1
    assert view.format is not None and view.format.order == ("act" if act_order else "none")
    assert view.kind == f"{method.bits} bits" + (", act-order" if act_order else "")
    assert view.format.bits == method.bits and view.format.group == 32  # 128 and 160 columns have 32 in common
    part = (slice(8, 24), slice(0, 160) if act_order else slice(32, 128))
    for index in ((), part):
        codes, expected = view.codes(index), weight[index]
        assert torch.equal(view.format.dequantize(codes), expected)
        assert torch.equal(view.format.unpack(view.format.adopt(codes), tuple(expected.shape), torch.float32), expected)


def test_columns_in_act_order_are_not_cut():
    view, weight = view_of(Gptq(act_order=True))
    assert torch.equal(view.read((slice(None), slice(32, 128))), weight[:, 32:128])
    with pytest.raises(CheckpointError, match=r"model.safetensors: has weights in act-order.* columns 32 to 128"):
        view.codes((slice(None), slice(32, 128)))


def test_groups_of_unequal_size_are_decoded(tmp_path):
    model, name = case(Gptq(act_order=True), "llama"), "model.layers.0.self_attn.q_proj"
    g_idx = model.stored[f"{name}.g_idx"].clone()
    g_idx[g_idx.argmax()] = 0  # one of 32 columns
    path = model.write(tmp_path, {f"{name}.g_idx": g_idx})
    with checkpoints.open_checkpoint(path) as checkpoint:
        changed = {part: model.stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")} | {"g_idx": g_idx}
        assert torch.equal(checkpoint.read(f"{name}.weight"), Gptq(act_order=True).weight(changed))
        assert checkpoint.stored_type(f"{name}.weight") == "4 bits, act-order, groups of unequal size"
    kept = {str(group) for group in load_model(path).weights if "unequal" in group.stored}
    assert len(kept) == 1 and "-> float32" in kept.pop()


@pytest.mark.parametrize(("stored", "kept"), [(32, 32), (64, 64), (128, 128), (256, 128), (-1, 128), (48, 16)])
def test_groups_become_groups_that_the_format_has(stored, kept):
    for method in (Gptq(group_size=stored), Gptq(group_size=stored, act_order=True), Awq(stored)):
        view, weight = view_of(method, columns=768)
        assert view.format is not None and view.format.group == kept
        assert torch.equal(view.format.dequantize(view.codes()), weight)
        assert torch.equal(view.read((slice(None), slice(384, 576))), weight[:, 384:576])


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
@pytest.mark.parametrize("name", [gptq.older_name, gptq.newer_name])
@pytest.mark.parametrize("method", [GPTQ["4 bits, act-order"], GPTQ["3 bits"], AWQ["AWQ"]], ids=repr)
def test_logits_are_those_of_the_plain_weights(tmp_path, kind, name, method):
    model = case(method, kind, name)
    ids = ops.Batch.whole([[1, 5, 9, 30, 2, 7]])
    logits = []
    for folder in (model.write(tmp_path / "quantized"), model.write_plain(tmp_path / "plain")):
        decoder = moesaic_model(folder)
        with torch.inference_mode():
            logits.append(decoder.logits(decoder(ids)))
    assert torch.equal(*logits) and logits[0].std() > 0.1


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_weight_of_a_mixtral_is_read(tmp_path, method):
    model = case(method, name=gptq.newer_name)
    with checkpoints.open_checkpoint(model.write(tmp_path)) as checkpoint:
        assert "quantization_config" not in checkpoint.config and checkpoint.preferred_dtype == "float32"
        assert checkpoint.tensors.keys() == model.weights.keys()
        for name, weight in model.weights.items():
            assert torch.equal(checkpoint.read(name), weight), name


class Counting(InMemory):
    """View that adds up the numbers that are read from it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor, Path("model.safetensors"))
        self.count = 0

    def read(self, index=None):
        self.count += math.prod(sizes(bounds(index, self.info.shape)))
        return super().read(index)


@pytest.mark.parametrize(
    ("method", "words"),
    [(Gptq(act_order=True), (16, 16)), (Gptq(), (16, 16)), (Gptq(bits=3), (12, 16)), (Awq(), (128, 2))],
    ids=repr,
)
def test_only_the_words_of_a_part_are_read(method, words):
    tensors = method.tensors(64, 160, np.random.default_rng(1))
    stored = {f"layer.{part}": Counting(tensor) for part, tensor in tensors.items()}
    module = _awq if isinstance(method, Awq) else _gptq
    view = module.weight_views(stored, method.settings, Path("config.json"))["layer.weight"]
    assert all(part.count == 0 for part in stored.values())
    view.read((slice(16, 32), slice(0, 128)))
    assert stored["layer.qweight"].count == math.prod(words)
    assert stored["layer.scales"].count == 16 * (5 if getattr(method, "act_order", False) else 4)


def test_a_g_idx_of_zeros_means_consecutive_groups_without_act_order(tmp_path):
    model = case(Gptq(), "llama")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.stored.items() if name.endswith("g_idx")}
    with checkpoints.open_checkpoint(model.write(tmp_path / "plain", zeros)) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), weight) for name, weight in model.weights.items())
    with (
        checkpoints.open_checkpoint(model.write(tmp_path / "order", zeros, desc_act=True)) as checkpoint,
        pytest.raises(CheckpointError, match=r"q_proj\.qweight has no column of group 1 in g_idx"),
    ):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")


def test_modules_may_differ_from_the_settings_if_these_are_dynamic(tmp_path):
    model, other = case(Gptq(), "llama"), case(Gptq(bits=8, group_size=64), "llama")
    changed = {name: tensor for name, tensor in other.stored.items() if ".down_proj." in name}
    with checkpoints.open_checkpoint(model.write(tmp_path / "dynamic", changed, dynamic={"+:.*down": {}})) as found:
        for name in model.weights:
            assert torch.equal(found.read(name), (other if "down_proj" in name else model).weights[name]), name
    with pytest.raises(CheckpointError, match=r"down_proj\.scales has the wrong shape"):
        checkpoints.open_checkpoint(model.write(tmp_path / "static", changed))


@pytest.mark.parametrize(
    ("method", "file", "renamed"),
    [
        (Gptq(act_order=True), "quantize_config.json", {}),
        (Awq(), "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"}),
    ],
)
def test_settings_in_a_file_of_their_own_are_read(tmp_path, method, file, renamed):
    model = case(method, "llama")
    settings = model.config.pop("quantization_config")
    model.write_plain(tmp_path)
    gptq.checkpoints.write(tmp_path, model.config, model.stored)
    with checkpoints.open_checkpoint(tmp_path) as checkpoint:
        assert "model.layers.0.mlp.up_proj.qweight" in checkpoint.tensors
    del settings["quant_method"]
    older = {renamed.get(name, name): value for name, value in settings.items()}
    (tmp_path / file).write_text(json.dumps(older | ({"version": "GEMM"} if renamed else {})))
    with checkpoints.open_checkpoint(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), weight) for name, weight in model.weights.items())
    (tmp_path / file).write_text(json.dumps(older | {"bits": 5, "w_bit": 5}))
    with pytest.raises(ConfigError, match=f"{file}: quantization with bits 5 is not supported"):
        checkpoints.open_checkpoint(tmp_path)


def test_a_bias_of_zeros_is_ignored_and_another_is_not(tmp_path):
    model, name = case(Gptq(), "llama"), "model.layers.0.self_attn.o_proj.bias"
    load_model(model.write(tmp_path / "zeros", {name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=f"{name} is unexpected"):
        load_model(model.write(tmp_path / "ones", {name: torch.ones(64)}))


def test_a_quantized_router_is_read_with_a_warning(tmp_path, caplog):
    model, name = case(Awq()), "model.layers.0.block_sparse_moe.gate"
    router = Awq().tensors(8, 64, np.random.default_rng(0))
    stored = {f"{name}.{part}": tensor for part, tensor in router.items()} | {f"{name}.weight": None}
    with caplog.at_level(logging.WARNING), checkpoints.open_checkpoint(model.write(tmp_path, stored)) as checkpoint:
        assert torch.equal(checkpoint.read(f"{name}.weight"), Awq().weight(router))
    assert [record.message for record in caplog.records if "the router is quantized" in record.message]


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("method", [Gptq(act_order=True), Awq()], ids=repr)
def test_convert_writes_the_decoded_weights(tmp_path, layout, method):
    model = case(method)
    convert(model.write(tmp_path / "source"), tmp_path / "target", layout)
    found = gptq.checkpoints.read(tmp_path / "target")
    assert found.keys() == model.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in model.weights.items())
    load_model(tmp_path / "target")


def test_convert_refuses_a_checkpoint_that_lacks_a_weight(tmp_path):
    model, name = case(Gptq()), "model.layers.0.block_sparse_moe.experts.1.w2"
    lost = {key: None for key in model.stored if key.startswith(name)}
    with pytest.raises(CheckpointError, match=rf"{name}\.weight is missing"):
        convert(model.write(tmp_path / "source", lost), tmp_path / "target", "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_a_large_model_is_loaded_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.checkpoints._decoder.LARGE", 1)
    assert load_model(case(Gptq(), "llama").write(tmp_path)).model.dtype == torch.bfloat16
