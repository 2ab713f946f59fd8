"""Checkpoints of bitsandbytes, compared with a decoder of our own from the published layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoints._bitsandbytes import weight_views
from moesaic.convert import convert
from moesaic.errors import CheckpointError
from tests.support import checkpoints
from tests.support.quantized import Bitsandbytes, Held, as_bytes, assert_equals_plain, files, view_of

VARIANTS = {
    "nf4": Bitsandbytes(),
    "fp4": Bitsandbytes("fp4"),
    "nf4, nested": Bitsandbytes(nested=True),
    "fp4, nested, blocks of 128": Bitsandbytes("fp4", 128, nested=True),
    "nf4, blocks of 32, float16": Bitsandbytes(block=32, scale=torch.float16),
    "nf4, blocks of 512": Bitsandbytes(block=512),
    "nf4, stored as bfloat16": Bitsandbytes(storage=torch.bfloat16),
    "int8": Bitsandbytes("int8"),
}
SHAPES = {
    "blocks of one row": (24, 128),
    "half a block": (12, 96),
    "an even number of columns": (8, 50),
    "an odd number of columns": (12, 37),
    "an odd number of weights": (5, 33),
}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_equals_the_one_with_plain_weights(name, kind, tmp_path):
    assert_equals_plain(files(VARIANTS[name], kind), tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_parts_are_read(name, shape):
    rows, columns = SHAPES[shape]
    variant = VARIANTS[name]
    if variant.storage != torch.uint8 and math.prod(SHAPES[shape]) % 4:
        rows = 4
    view, _, weight = view_of(weight_views, variant, rows, columns)
    assert torch.equal(view.read(), weight)
    for index in ((slice(1, 3),), (slice(0, rows), slice(3, 19)), (slice(3, 4), slice(16, 33)), (slice(2, 2),)):
        assert torch.equal(view.read(index), weight[index])


def test_scales_of_later_blocks_are_read():
    view, _, weight = view_of(weight_views, VARIANTS["nf4, nested"], 128, 512)  # 1024 scales, which share 4 scales
    assert torch.equal(view.read((slice(40, 100),)), weight[40:100])


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_rows_are_read(name):
    view, held, _ = view_of(weight_views, VARIANTS[name], 64, 128)
    codes = held["m.weight"]
    view.read((slice(8, 16),))
    assert codes.read_elements == codes.tensor.numel() // 8


@pytest.mark.parametrize("name", VARIANTS)
def test_the_codes_are_kept(name):
    variant = VARIANTS[name]
    for columns in (256, 96, 48):  # blocks of 64 begin in the middle of a row of 96 or 48 columns
        view, _, weight = view_of(weight_views, variant, 40, columns)
        assert view.format.group == math.gcd(columns, 128 if variant.levels == "int8" else variant.block, 128)
        packed = view.format.unpack(view.format.adopt(view.codes()), (40, columns), torch.float32)
        assert torch.equal(packed, weight)
        part = (slice(8, 16), slice(0, view.format.group))
        assert torch.equal(view.format.dequantize(view.codes(part)), weight[part])
    view, _, _ = view_of(weight_views, variant, 40, 50)
    assert view.format is None


def test_scales_that_were_saved_after_a_forward_pass_on_a_cpu():
    variant = Bitsandbytes(scale=torch.bfloat16, turned=True)
    view, _, weight = view_of(weight_views, variant, 32, 192)
    assert torch.equal(view.read(), weight)
    assert torch.equal(view.read((slice(3, 9), slice(70, 80))), weight[3:9, 70:80])


def test_a_copy_has_plain_weights(tmp_path):
    model = files(VARIANTS["nf4, nested"], "mixtral")
    convert(model.write(tmp_path / "source"), tmp_path / "target", "hf")
    assert "quantization_config" not in (tmp_path / "target/config.json").read_text()
    read = checkpoints.read(tmp_path / "target")
    assert all(torch.equal(read[key], weight) for key, weight in model.plain.items())


def test_weights_that_are_not_quantized_stay_plain():
    plain = {"m.weight": Held(torch.ones(2, 2)), "m.bias": Held(torch.ones(2))}
    assert weight_views(plain, Bitsandbytes().settings(), Path("config.json")) == plain


def test_unknown_settings_are_refused():
    with pytest.raises(CheckpointError, match="'surprise' is unknown"):
        weight_views({}, Bitsandbytes().settings() | {"surprise": 1}, Path("config.json"))


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nf4", {"weight": None}, r"m\.weight is missing, but the file has its"),
        ("nf4", {STATE: None}, r"expected SCB, or exactly one of quant_state\.bitsandbytes__nf4"),
        ("nf4", {"weight.quant_state.bitsandbytes__fp4": as_bytes({})}, "expected SCB, or exactly one"),
        ("nf4", {"SCB": torch.ones(8)}, "expected SCB, or exactly one"),
        ("nf4", {"weight.absmax": None}, r"m\.weight\.absmax is missing"),
        ("nf4", {"weight.quant_map": None}, r"m\.weight\.quant_map is missing"),
        ("nf4", {"weight.quant_map": torch.linspace(-1, 1, 16)}, "other levels than those of nf4"),
        ("nf4", {"weight.quant_map": torch.full((16,), math.nan)}, "other levels than those of nf4"),
        ("nf4", {"weight.quant_map": torch.ones(15)}, r"quant_map is \[15\] float32, expected \[16\]"),
        ("nf4", {"weight.absmax": torch.ones(3)}, r"absmax is \[3\] float32, expected \[4\]"),
        ("nf4", {"weight.absmax": torch.ones(4).int()}, "absmax is"),
        ("nf4", {"weight": torch.ones(127, 1, dtype=torch.uint8)}, "expected 128 bytes in one column"),
        ("nf4", {"weight": torch.ones(1, 128, dtype=torch.uint8)}, "expected 128 bytes in one column"),
        ("nf4", {"weight": torch.tensor(1, dtype=torch.uint8)}, "expected 128 bytes in one column"),
        ("nf4, nested", {"weight.nested_absmax": None}, r"nested_absmax is missing"),
        ("nf4, nested", {"weight.nested_quant_map": None}, r"nested_quant_map is missing"),
        ("nf4, nested", {"weight.nested_quant_map": torch.ones(16)}, r"nested_quant_map is \[16\]"),
        ("nf4, nested", {"weight.nested_absmax": torch.ones(2)}, r"nested_absmax is \[2\]"),
        ("nf4, nested", {"weight.absmax": torch.ones(3, dtype=torch.uint8)}, r"absmax is \[3\]"),
        ("int8", {"SCB": None, "weight_format": None}, "holds int8, but its SCB or quant_state is missing"),
        ("int8", {"SCB": torch.ones(7)}, r"m\.SCB is \[7\]"),
        ("int8", {"weight": torch.ones(8, 32)}, r"m\.weight is \[8, 32\] float32, expected \[8, 32\] int8"),
        ("int8", {"weight": torch.ones(8, dtype=torch.int8)}, "expected rows and columns"),
        ("int8", {"weight_format": torch.tensor(3, dtype=torch.uint8)}, "an unsupported weight_format"),
        ("int8", {"weight_format": torch.ones(0, dtype=torch.uint8)}, "an unsupported weight_format"),
    ],
)
def test_tensors_that_do_not_fit(name, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_one(VARIANTS[name], changes)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.tensor([123, 34], dtype=torch.uint8), "is not JSON"),
        (torch.tensor([255, 254], dtype=torch.uint8), "is not JSON"),
        (torch.tensor([91] * 60_000, dtype=torch.uint8), "is not JSON"),
        (torch.zeros(1 << 17, dtype=torch.uint8), "at most 65536 bytes"),
        (torch.zeros(2, 2, dtype=torch.uint8), "is not a uint8 vector"),
        (torch.zeros(2), "is not a uint8 vector"),
        (as_bytes([1]), "is not a JSON object"),
        ({"shape": None}, "has no 'shape'"),
        ({"shape": [8, 32, 1]}, r"has the shape \[8, 32, 1\]"),
        ({"shape": [8, -32]}, "has the shape"),
        ({"shape": [8.0, 32]}, "has the shape"),
        ({"shape": "832"}, "has the shape"),
        ({"shape": [2**62, 2**62]}, "bytes in one column"),
        ({"shape": [8, 31]}, "expected 124 bytes in one column"),
        ({"blocksize": None}, "has no 'blocksize'"),
        ({"blocksize": 0}, "blocksize is 0"),
        ({"blocksize": 48}, "has the blocksize 48"),
        ({"blocksize": 2**70}, "has the blocksize"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
        ({"nested_offset": "1"}, "has the nested_offset '1'"),
        ({"nested_offset": math.inf}, "has the nested_offset inf"),
        ({"nested_offset": math.nan}, "has the nested_offset nan"),
        ({"nested_blocksize": -1}, "nested_blocksize is -1"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ],
)
def test_states_that_do_not_fit(state, message):
    if isinstance(state, dict):
        usual = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 32]}
        state = torch.tensor(list(json.dumps(usual | state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=message):
        open_one(VARIANTS["nf4"], {STATE: state})


def open_one(variant: Bitsandbytes, changes: dict[str, Any]) -> Any:
    """Return the view of a matrix [8, 32] with some tensors replaced, or removed if they are None."""
    parts: dict[str, Any] = variant.matrix(8, 32, torch.Generator().manual_seed(2))[0] | changes
    held = {f"m.{part}": Held(tensor) for part, tensor in parts.items() if tensor is not None}
    return weight_views(held, variant.settings(), Path("config.json"))["m.weight"]
