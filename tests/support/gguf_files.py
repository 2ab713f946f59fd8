"""Tiny GGUF files, written and decoded by the ``gguf`` package, the reference implementation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType

from tests.support.models import Tiny

FLOATS = ("F32", "F16", "BF16")
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
"""Where the float16 numbers of a block lie, by the name of its type."""
KINDS = (*FLOATS, *SCALES)
HEAD_DIM = 64
SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "head_dim": HEAD_DIM,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
METADATA = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 64,
    "llama.vocab_size": 96,
}
MIXTURE = {"llama.expert_count": 4, "llama.expert_used_count": 2}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
Array = np.ndarray[Any, Any]


def reference(family: str = "llama", **changes: object) -> torch.nn.Module:
    """Return a tiny model of transformers with the sizes of the files here."""
    return Tiny.build(family, **{**SIZES, **changes}).eval()


def blocks(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Return random data of a type: floats, or bytes whose scales give weights of about 0.1."""
    if kind in FLOATS:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        return gguf.quantize(values, GGMLQuantizationType[kind])
    elements, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), dtype=np.uint8)
    for begin in SCALES[kind]:
        scale = random.uniform(0.5, 1, data.shape[:-1]) / (4096 if kind.endswith("_K") or kind == "IQ4_XS" else 256)
        data[..., begin : begin + 2] = scale.astype("<f2")[..., None].view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = random.integers(120, 124, data.shape[:-1])
    return data.reshape(*shape[:-1], -1)


class TinyFile:
    """Random tensors under GGUF's names, the weights they decode to under classic names, and metadata."""

    def __init__(self, kind: str = "F32", experts: int = 0, *, tied: bool = False, seed: int = 0) -> None:
        self.metadata: dict[str, Any] = METADATA | (MIXTURE | {"llama.expert_count": experts} if experts else {})
        self.tensors: dict[str, tuple[Array, str]] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self._random = np.random.default_rng(seed)
        self._add("token_embd", "model.embed_tokens", (96, 256), "Q8_0" if kind == "Q4_1" else kind)
        self._add("output_norm", "model.norm", (256,), "F32")
        if not tied:
            self._add("output", "lm_head", (96, 256), kind)
        for layer in range(2):
            shapes = {name: (256, 256) for name in LAYER if not (name.startswith("ffn_") and experts)}
            shapes |= {"attn_k": (128, 256), "attn_v": (128, 256), "attn_norm": (256,), "ffn_norm": (256,)}
            shapes |= {"ffn_gate_inp": (experts, 256)} if experts else {}
            for name, shape in shapes.items():
                plain = len(shape) == 1 or name == "ffn_gate_inp"
                if name != "ffn_gate_inp" or experts:
                    self._add(
                        f"blk.{layer}.{name}", f"model.layers.{layer}.{LAYER[name]}", shape, "F32" if plain else kind
                    )
            for name, number in (("gate", "w1"), ("down", "w2"), ("up", "w3")) if experts else ():
                self._add_stack(f"blk.{layer}.ffn_{name}_exps", layer, number, experts, kind)

    def _add(self, name: str, classic: str, shape: tuple[int, ...], kind: str) -> None:
        data = blocks(kind, shape, self._random)
        if len(shape) == 1:
            data += 1.0
        self.tensors[f"{name}.weight"] = data, kind
        weight = gguf.dequantize(data, GGMLQuantizationType[kind])
        if name.endswith(("attn_q", "attn_k")):  # the rows of a pair are next to each other in the file
            weight = weight.reshape(-1, HEAD_DIM // 2, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
        self.weights[f"{classic}.weight"] = torch.from_numpy(np.ascontiguousarray(weight, np.float32))

    def _add_stack(self, name: str, layer: int, number: str, experts: int, kind: str) -> None:
        data = blocks(kind, (experts, 256, 256), self._random)
        self.tensors[f"{name}.weight"] = data, kind
        for expert, weight in enumerate(gguf.dequantize(data, GGMLQuantizationType[kind])):
            classic = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{number}.weight"
            self.weights[classic] = torch.from_numpy(weight.astype(np.float32))

    def split_experts(self) -> None:
        """Store each expert as a tensor of its own, as llama.cpp did until spring 2024."""
        for name in [name for name in self.tensors if "_exps" in name]:
            data, kind = self.tensors.pop(name)
            for expert, part in enumerate(data):
                self.tensors[name.replace("_exps", f".{expert}")] = part, kind

    def merge_experts(self) -> None:
        """Store gate and up rows of the experts in one tensor, as llama.cpp does since spring 2026."""
        for name in [name for name in self.tensors if "ffn_gate_exps" in name]:
            gate, kind = self.tensors.pop(name)
            up, _ = self.tensors.pop(name.replace("gate", "up"))
            self.tensors[name.replace("gate", "gate_up")] = np.concatenate((gate, up), 1), kind

    def write(self, path: Path, architecture: str = "llama") -> Path:
        return write(path, self.metadata, self.tensors, architecture)

    def write_split(self, folder: Path, parts: int) -> list[Path]:
        """Write the tensors into several files, of which only the first has the metadata."""
        names = list(self.tensors)
        paths = [folder / f"tiny-{number + 1:05d}-of-{parts:05d}.gguf" for number in range(parts)]
        for number, path in enumerate(paths):
            split = {"split.no": np.uint16(number), "split.count": np.uint16(parts), "split.tensors.count": len(names)}
            chosen = {name: self.tensors[name] for name in names[number::parts]}
            write(path, (self.metadata if number == 0 else {}) | split, chosen)
        return paths

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give a model of transformers these weights."""
        with torch.no_grad():
            for name, tensor in Tiny.truth(model).items():
                tensor.copy_(self.weights[name if name in self.weights else "model.embed_tokens.weight"])
        return model


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Array, str]],
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file; the type of a value in Python is the type in the file, and an int is an unsigned one."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case np.uint16():
                writer.add_uint16(key, int(value))
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the logits [T, V] that a model of transformers gives."""
    assert isinstance(model, transformers.PreTrainedModel)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]
