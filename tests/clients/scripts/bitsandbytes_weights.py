"""Quantizes random weights with bitsandbytes; writes its tensors, and what it decodes them to, to a folder.

Its kernel for AVX-512 (0.50.2) gives wrong weights where blocks run over the end of a row, so its decoder in Python is
the reference.
"""

import json
import sys
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from safetensors.torch import save_file

folder = Path(sys.argv[1])
stored: dict[str, torch.Tensor] = {}
plain: dict[str, torch.Tensor] = {}
torch.manual_seed(1)


def decode(packed: torch.Tensor, state: functional.QuantState) -> torch.Tensor:
    """Return the float32 weights of a matrix."""
    scale = state.absmax
    if state.nested:
        scale = functional.dequantize_blockwise(scale, state.state2) + state.offset
    table = _get_4bit_code(state.quant_type, packed.device)
    return _dequantize_4bit_compute(packed.flatten(), scale, table, state.blocksize, state.shape, torch.float32)


for levels in ("nf4", "fp4"):
    for nested in (False, True):
        for rows, columns in ((64, 128), (40, 96), (6, 50), (5, 33)):
            name = f"{levels}-{nested}-{rows}"
            linear = bitsandbytes.nn.Linear4bit(
                columns, rows, bias=False, compress_statistics=nested, quant_type=levels, quant_storage=torch.uint8
            ).to("cpu")
            stored |= {f"{name}.{part}": tensor for part, tensor in linear.state_dict().items()}
            plain[f"{name}.weight"] = decode(linear.weight.data, linear.weight.quant_state)

for block in (32, 128, 1024):
    packed, state = functional.quantize_4bit(torch.randn(48, 160), blocksize=block, quant_type="nf4")
    stored |= {f"block-{block}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    stored[f"block-{block}.weight"] = packed
    plain[f"block-{block}.weight"] = decode(packed, state)

linear = bitsandbytes.nn.Linear8bitLt(96, 40, bias=False, has_fp16_weights=False).to("cpu")
linear(torch.randn(2, 96))  # quantizes the weight
stored |= {f"int8.{part}": tensor for part, tensor in linear.state_dict().items()}
plain["int8.weight"] = functional.int8_vectorwise_dequant(stored["int8.weight"], stored["int8.SCB"])

save_file({name: tensor.contiguous().clone() for name, tensor in stored.items()}, folder / "stored.safetensors")
save_file({name: tensor.contiguous().clone() for name, tensor in plain.items()}, folder / "plain.safetensors")
print(json.dumps({"quant_method": "bitsandbytes", "load_in_4bit": True}))
