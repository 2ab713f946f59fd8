"""Checkpoints of compressed-tensors, compared with a decoder of our own from the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoints._compressed import weight_views
from moesaic.convert import convert
from moesaic.errors import CheckpointError
from tests.support import checkpoints
from tests.support.quantized import NAMINGS, Compressed, Held, assert_equals_plain, files, view_of

VARIANTS = {
    "4 bits, groups of 32": Compressed(group=32),
    "4 bits, groups of 16, asymmetric": Compressed(group=16, symmetric=False, scale=torch.float16),
    "4 bits, rows": Compressed(strategy="channel"),
    "4 bits, rows, asymmetric": Compressed(strategy="channel", symmetric=False),
    "4 bits, order": Compressed(group=32, order=True),
    "4 bits, order, asymmetric": Compressed(group=32, order=True, symmetric=False),
    "4 bits, older zero points": Compressed(group=32, symmetric=False, plain_zeros=True),
    "4 bits, one scale": Compressed(strategy="tensor", scale=torch.float32),
    "2 bits": Compressed(bits=2, group=16),
    "8 bits, groups": Compressed(bits=8, group=32),
    "8 bits, rows, asymmetric": Compressed(bits=8, strategy="channel", symmetric=False, scale=torch.float32),
    "int8 rows": Compressed("int-quantized", 8, strategy="channel"),
    "int8 rows, asymmetric": Compressed("int-quantized", 8, strategy="channel", symmetric=False),
    "int8, one scale": Compressed("int-quantized", 8, strategy="tensor", flat_scale=True),
    "int8, naive": Compressed("naive-quantized", 8, strategy="channel", flat_scale=True),
    "float8 rows": Compressed("float-quantized", 8, strategy="channel"),
    "float8, one scale": Compressed("float-quantized", 8, strategy="tensor", flat_scale=True),
    "float8 blocks": Compressed("float-quantized", 8, strategy="block", block=(24, 40)),
}
SHAPES = {"groups": (24, 96), "narrow": (7, 20), "wide": (5, 300)}
"""Shapes of single matrices: the second and third have rows that end within words and groups."""


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_equals_the_one_with_plain_weights(name, kind, tmp_path):
    assert_equals_plain(files(VARIANTS[name], kind), tmp_path)


@pytest.mark.parametrize("naming", NAMINGS)
def test_experts_have_three_names(naming, tmp_path):
    model = files(Compressed(group=32), "mixtral", NAMINGS[naming])
    read = checkpoints.read(model.write(tmp_path / "model"))
    assert read.keys() == model.plain.keys()
    assert all(torch.equal(read[key], weight) for key, weight in model.plain.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_parts_are_read(name, shape):
    rows, columns = SHAPES[shape]
    view, _, weight = view_of(weight_views, VARIANTS[name], rows, columns)
    assert torch.equal(view.read(), weight)
    for index in ((slice(2, 5),), (slice(0, rows), slice(3, 19)), (slice(1, 4), slice(16, 20)), (slice(3, 3),)):
        assert torch.equal(view.read(index), weight[index])


@pytest.mark.parametrize("name", ["4 bits, groups of 32", "8 bits, rows, asymmetric", "float8 rows"])
def test_only_the_part_is_read(name):
    view, held, _ = view_of(weight_views, VARIANTS[name], 64, 256)
    [codes] = [tensor for key, tensor in held.items() if key in ("m.weight", "m.weight_packed")]
    whole = codes.tensor.numel()
    for index, share in (((slice(8, 16),), 8), ((slice(0, 64), slice(128, 256)), 2)):
        before = codes.read_elements
        view.read(index)
        assert codes.read_elements - before == whole // share


@pytest.mark.parametrize("name", VARIANTS)
def test_the_codes_are_kept(name):
    variant = VARIANTS[name]
    view, _, weight = view_of(weight_views, variant, 40, 320)
    if variant.kind == "float":
        assert view.format is None
        return
    assert view.format.group == {32: 32, 16: 16, None: 64}[variant.group]
    assert view.format.order == ("act" if variant.order else "none")
    packed = view.format.unpack(view.format.adopt(view.codes()), (40, 320), torch.float32)
    assert torch.equal(packed, weight)
    rows, columns = slice(8, 16), slice(None) if variant.order else slice(64, 192)
    assert torch.equal(view.format.dequantize(view.codes((rows, columns))), weight[rows, columns])


def test_groups_of_unequal_size_are_decoded():
    variant = Compressed(group=16, order=True)
    parts, _ = variant.matrix(8, 32, torch.Generator().manual_seed(2))
    g_idx = parts["weight_g_idx"].clone()
    g_idx[g_idx.argmax()] = 0
    view = open_one(variant.settings(), variant, weight_g_idx=g_idx)
    level = (parts["weight_packed"][:, :, None] >> torch.arange(0, 32, 4)).flatten(1) % 16 - 8
    assert torch.equal(view.read(), level * parts["weight_scale"].float()[:, g_idx])
    assert view.format is None and view.kind == "4 bits, act-order, groups of unequal size"
    with pytest.raises(CheckpointError, match="cannot be cut at columns 16 to 32"):
        open_one(variant.settings(), variant).codes((slice(None), slice(16, 32)))


def test_columns_that_no_group_divides_have_no_format():
    view, _, weight = view_of(weight_views, Compressed(strategy="channel"), 8, 20)
    assert view.format is None and torch.equal(view.read(), weight)


def test_an_order_without_groups_means_consecutive_columns():
    parts, weight = Compressed(group=16).matrix(4, 32, torch.Generator().manual_seed(1))
    for order in (torch.full((32,), -1), torch.arange(32) // 16):
        held = {f"m.{part}": Held(tensor) for part, tensor in (parts | {"weight_g_idx": order.int()}).items()}
        view = weight_views(held, Compressed(group=16).settings(), Path("config.json"))["m.weight"]
        assert view.format is not None and torch.equal(view.read(), weight)


def test_the_tensors_tell_the_config_group():
    kinds = {"a": Compressed(group=32), "b": Compressed(bits=8, strategy="channel"), "c": Compressed(group=16)}
    groups, held, weights = {}, {}, {}
    for name, variant in kinds.items():
        groups[name] = variant.settings()["config_groups"]["group_0"]
        parts, weights[f"{name}.weight"] = variant.matrix(16, 64, torch.Generator().manual_seed(5))
        held |= {f"{name}.{part}": Held(tensor) for part, tensor in parts.items()}
    float8 = Compressed("float-quantized", 8, strategy="channel")
    groups["d"] = float8.settings()["config_groups"]["group_0"] | {"format": "float-quantized"}
    parts, weights["d.weight"] = float8.matrix(16, 64, torch.Generator().manual_seed(5))
    held |= {f"d.{part}": Held(tensor) for part, tensor in parts.items()}
    views = weight_views(held, {"format": "pack-quantized", "config_groups": groups}, Path("config.json"))
    assert views.keys() == weights.keys()
    assert all(torch.equal(views[name].read(), weight) for name, weight in weights.items())


def test_scales_of_activations_and_of_the_cache_are_ignored(tmp_path):
    model = files(VARIANTS["float8 rows"], "llama")
    model.config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    layer = "model.layers.0.self_attn"
    for part in ("q_proj.input_scale", "k_proj.output_scale", "k_scale", "v_scale", "q_proj.input_zero_point"):
        model.stored[f"{layer}.{part}"] = torch.ones(1)
    assert checkpoints.read(model.write(tmp_path / "model")).keys() == model.plain.keys()


def test_a_copy_has_plain_weights(tmp_path):
    model = files(VARIANTS["4 bits, order"], "mixtral")
    convert(model.write(tmp_path / "source"), tmp_path / "target", "hf")
    assert "quantization_config" not in (tmp_path / "target/config.json").read_text()
    read = checkpoints.read(tmp_path / "target")
    assert all(torch.equal(read[key], weight) for key, weight in model.plain.items())


def test_the_older_key_of_the_settings(tmp_path):
    model = files(Compressed(group=32), "llama")
    model.config["compression_config"] = model.config.pop("quantization_config")
    assert checkpoints.read(model.write(tmp_path / "model")).keys() == model.plain.keys()


GROUP: dict[str, Any] = Compressed(group=16).settings()["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' of quantized weights is not supported"),
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"format": None}, "format None"),
        ({"format": ["pack-quantized"]}, "is not supported"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"sparsity_config": 7}, "expected an object"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "'transform_config' is unknown"),
        ({"moe_sparsity_config": {"method": "prune"}}, "'moe_sparsity_config' is unknown"),
        ({"surprise": 1}, "'surprise' is unknown"),
        ({"config_groups": None}, "no 'config_groups'"),
        ({"config_groups": ["a"]}, "expected an object"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "expected an object"),
        ({"config_groups": {}}, "no config group describes any"),
        ({"config_groups": {"g": GROUP | {"weights": None}}}, "no config group describes any"),
        ({"config_groups": {"g": GROUP | {"surprise": 1}}}, "'surprise' is unknown"),
    ],
)
def test_settings_that_are_not_supported(changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_one({**Compressed(group=16).settings(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, "'int' with 3 bits are not supported"),
        ({"num_bits": 4.0}, "4.0 bits"),
        ({"num_bits": 10**30}, "bits are not supported"),
        ({"num_bits": True}, "True bits"),
        ({"type": "float"}, "'float' with 4 bits"),
        ({"type": ["int"]}, "type"),
        ({"symmetric": "yes"}, "symmetric is 'yes'"),
        ({"dynamic": True}, "dynamic is True"),
        ({"strategy": "tensor_group"}, "strategy 'tensor_group'"),
        ({"strategy": ["group"]}, "strategy"),
        ({"group_size": "16"}, "group_size is '16'"),
        ({"group_size": -2}, "group_size is -2"),
        ({"group_size": 0}, "needs a group_size"),
        ({"group_size": None}, "needs a group_size"),
        ({"group_size": 10**30}, "weight_scale is"),
        ({"strategy": "block", "block_structure": 5}, "needs a block_structure"),
        ({"strategy": "block", "block_structure": [1, 0]}, "needs a block_structure"),
        ({"strategy": "block", "block_structure": "2x4"}, "needs a block_structure"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ],
)
def test_weights_that_are_not_supported(changes, message):
    settings = Compressed(group=16).settings()
    settings["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(CheckpointError, match=message):
        open_one(settings)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (Compressed(group=16), {"weight_packed": None}, "m.weight_packed is missing"),
        (Compressed(group=16), {"weight_scale": None}, "m.weight_scale is missing"),
        (Compressed(group=16), {"weight": torch.ones(8, 32)}, "m.weight is unexpected"),
        (Compressed(group=16), {"weight_shape": torch.tensor([8, -32])}, "expected positive numbers"),
        (Compressed(group=16), {"weight_shape": torch.tensor([8, 2**60])}, "m.weight_packed is"),
        (Compressed(group=16), {"weight_shape": torch.tensor([8, 40])}, "m.weight_packed is"),
        (Compressed(group=16), {"weight_shape": torch.ones(2)}, "m.weight_shape is"),
        (Compressed(group=16), {"weight_packed": torch.ones(8, 4)}, "m.weight_packed is .* float32"),
        (Compressed(group=16), {"weight_packed": torch.ones(2, 8, 4, dtype=torch.int32)}, "m.weight_packed is"),
        (Compressed(group=16), {"weight_scale": torch.ones(8, 3)}, "m.weight_scale is"),
        (Compressed(group=16), {"weight_scale": torch.ones(8, 2, dtype=torch.int32)}, "m.weight_scale is"),
        (Compressed(group=16, symmetric=False), {"weight_zero_point": None}, "zero_point is missing"),
        (Compressed(group=16, symmetric=False), {"weight_zero_point": torch.ones(2, 2).int()}, "zero_point is"),
        (
            Compressed(group=16, order=True),
            {"weight_g_idx": torch.full((32,), 2).int()},
            "has group 2 in g_idx, expected 0 to 1",
        ),
        (Compressed(group=16, order=True), {"weight_g_idx": torch.full((32,), -5).int()}, "has group -5 in g_idx"),
        (Compressed(group=16, order=True), {"weight_g_idx": torch.zeros(32).int()}, "no column of group 1"),
        (Compressed(group=16, order=True), {"weight_g_idx": torch.zeros(31).int()}, "m.weight_g_idx is"),
        (Compressed(group=16, order=True), {"weight_g_idx": torch.zeros(32)}, "m.weight_g_idx is"),
        (VARIANTS["int8 rows"], {"weight": torch.ones(8, 32)}, "m.weight is .* float32, expected .* int8"),
        (VARIANTS["int8 rows"], {"weight": torch.ones(8, dtype=torch.int8)}, "expected rows and columns"),
        (VARIANTS["int8 rows"], {"weight_scale": None}, "holds int8, but its weight_scale is missing"),
        (VARIANTS["int8 rows"], {"weight": None}, "m.weight is missing"),
        (VARIANTS["float8 rows"], {"weight": torch.ones(8, 32).to(torch.float8_e5m2)}, "expected .* float8_e4m3fn"),
        (VARIANTS["float8 rows"], {"weight_zero_point": torch.zeros(8, 1)}, "not supported for weights of type float"),
    ],
)
def test_tensors_that_do_not_fit(variant, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_one(variant.settings(), variant, **changes)


def test_without_a_shape_rows_fill_whole_words():
    variant = Compressed(group=16)
    whole, inferred = open_one(variant.settings()), open_one(variant.settings(), weight_shape=None)
    assert inferred.info == whole.info and torch.equal(inferred.read(), whole.read())


def test_zero_points_beyond_the_bits_are_refused():
    variant = Compressed(group=16, symmetric=False, plain_zeros=True)
    view = open_one(variant.settings(), variant, weight_zero_point=torch.full((8, 2), 9, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="numbers of more than 4 bits"):
        view.read()


def test_groups_that_differ_only_in_blocks_are_refused():
    settings = Compressed("float-quantized", 8, strategy="block", block=(8, 16)).settings()
    other = Compressed("float-quantized", 8, strategy="block", block=(8, 17)).settings()
    settings["config_groups"]["other"] = other["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match="fits several config groups"):
        open_one(settings, Compressed("float-quantized", 8, strategy="block", block=(8, 16)))


def open_one(settings: dict[str, Any], variant: Compressed | None = None, **changes: torch.Tensor | None) -> Any:
    """Return the view of a matrix [8, 32] with some tensors replaced, or removed if they are None."""
    parts: dict[str, Any] = {**(variant or Compressed(group=16)).matrix(8, 32, torch.Generator().manual_seed(2))[0]}
    parts |= changes
    held = {f"m.{part}": Held(tensor) for part, tensor in parts.items() if tensor is not None}
    return weight_views(held, settings, Path("config.json"))["m.weight"]
