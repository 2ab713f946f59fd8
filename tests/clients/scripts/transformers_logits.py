"""Writes the logits [T, V] of a model in float32, as transformers computes them, to logits.npy in its folder.

Arguments: the folder, the token ids as JSON, and "dequantize" to decode the weights when they are loaded, or
"compressed". The last line of the output is the names of the quantized modules.
"""

import json
import sys
from pathlib import Path

import numpy
import torch
import transformers

folder, ids = Path(sys.argv[1]), json.loads(sys.argv[2])
options = {}
if sys.argv[3] == "dequantize":
    options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
quantized = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
with torch.inference_mode():
    numpy.save(folder / "logits.npy", model(torch.tensor([ids])).logits[0].float().numpy())
print(json.dumps(quantized))
