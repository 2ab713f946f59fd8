"""Quantizes random weights with compressed-tensors; writes its tensors, and what it decodes them to, to a folder.

The last line of the output is the settings of each module.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

folder = Path(sys.argv[1])
stored: dict[str, torch.Tensor] = {}
plain: dict[str, torch.Tensor] = {}
settings = {}
torch.manual_seed(1)
GROUP, ROWS = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}
CASES = {
    "int4": ("pack-quantized", {"num_bits": 4, **GROUP}),
    "int4-asymmetric": ("pack-quantized", {"num_bits": 4, "symmetric": False, **GROUP}),
    "int4-rows": ("pack-quantized", {"num_bits": 4, "symmetric": False, **ROWS}),
    "int4-tensor": ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
    "int2": ("pack-quantized", {"num_bits": 2, **GROUP}),
    "int8-packed": ("pack-quantized", {**INT8, **GROUP}),
    "int8-packed-rows": ("pack-quantized", {**INT8, "symmetric": False, **ROWS}),
    "int8": ("int-quantized", {**INT8, **ROWS}),
    "int8-asymmetric": ("int-quantized", {**INT8, "symmetric": False, **ROWS}),
    "naive-int8": ("naive-quantized", {**INT8, **GROUP}),
    "naive-float8": ("naive-quantized", {**FLOAT8, **ROWS}),
    "float8": ("float-quantized", {**FLOAT8, **ROWS}),
    "float8-tensor": ("float-quantized", {**FLOAT8, "strategy": "tensor"}),
    "float8-blocks": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [16, 24]}),
}


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest weight of each block, in the shape that the library has for scales."""
    rows, columns = weight.shape
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(2)
    elif args.strategy == "group":
        blocks = weight.unflatten(1, (-1, args.group_size))
    else:
        blocks = weight[:, None] if args.strategy == "channel" else weight.flatten()[None]
    return blocks.amin(-1), blocks.amax(-1)


for name, (form, arguments) in CASES.items():
    for dtype in (torch.bfloat16, torch.float32):
        module = f"{name}-{str(dtype).removeprefix('torch.')}"
        weight = (torch.randn(40, 96) * 0.1).to(dtype)
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        scale, zero = calculate_qparams(*extremes(weight, args), args)
        state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        stored |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
        plain[f"{module}.weight"] = compressor.decompress(packed, scheme)["weight"]
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, quantization_status="compressed")
        settings[module] = config.model_dump(mode="json")

save_file({name: tensor.contiguous().clone() for name, tensor in stored.items()}, folder / "stored.safetensors")
save_file({name: tensor.contiguous().clone() for name, tensor in plain.items()}, folder / "plain.safetensors")
print(json.dumps(settings))
