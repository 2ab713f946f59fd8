"""Export the training state as a checkpoint: the model tales in the hf layout, in bfloat16.

python recipes/tales/export.py --data WORK --state WORK/run/state.pt --out moesaic/builtin/tales
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from train import CONFIG

GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": 1024,
}
NAMES = {
    r"embed\.weight\.weight": "model.embed_tokens.weight",
    r"norm\.weight": "model.norm.weight",
    r"blocks\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blocks\.(\d+)\.mlp_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blocks\.(\d+)\.attention\.w([qkvo])\.weight\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blocks\.(\d+)\.mlp\.gate\.weight": r"model.layers.\1.block_sparse_moe.gate.weight",
}
EXPERTS = {"gate": "w1", "down": "w2", "up": "w3"}


def tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights with Hugging Face's tensor names; the head is tied to the embedding."""
    for name, tensor in state.items():
        stack = re.fullmatch(r"blocks\.(\d+)\.mlp\.experts\.(gate|down|up)\.weight", name)
        if stack:
            for index, expert in enumerate(tensor):
                yield f"model.layers.{stack[1]}.block_sparse_moe.experts.{index}.{EXPERTS[stack[2]]}.weight", expert
        elif not name.startswith("head."):
            [(pattern, replacement)] = [pair for pair in NAMES.items() if re.fullmatch(pair[0], name)]
            yield re.sub(pattern, replacement, name), tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--state", type=Path, required=True, help="state file that train.py saved")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    args = parser.parse_args()
    state = torch.load(args.state, weights_only=True)["model"]
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors(state)}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", CONFIG), ("generation_config", GENERATION), ("tokenizer_config", TOKENIZER)):
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(args.data / "tokenizer.json", args.out)
    print(f"{sum(file.stat().st_size for file in args.out.iterdir()):,} bytes in {args.out}")


if __name__ == "__main__":
    main()
