"""The model that every engine of the benchmark runs: a Mixtral of any size with random weights, on disk.

The model is written as a Hugging Face checkpoint, one tensor in memory at a time, with a tokenizer of meaningless
pieces. The same shape always gives the same file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import tokenizers
import torch
from torch import Tensor

from moesaic import checkpoints
from moesaic.checkpoints import _safetensors
from moesaic.checkpoints._views import Index, TensorInfo

WEIGHT_STD = 0.02
"""Standard deviation of the random weights, as in the initialization of Mixtral."""
SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mixtral; by default those of 8x7B with two layers.

    ``inner`` is the feed-forward size of an expert, and ``chosen`` the number of experts that compute each token.
    """

    hidden: int = 4096
    inner: int = 14336
    experts: int = 8
    chosen: int = 2
    layers: int = 2
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000

    @property
    def name(self) -> str:
        """Name of a folder for this shape, made of all its sizes."""
        return "mixtral-" + "-".join(str(value) for value in vars(self).values())

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def expert_parameters(self) -> int:
        """Number of parameters of all experts in all layers."""
        return self.layers * self.experts * 3 * self.hidden * self.inner

    @property
    def other_parameters(self) -> int:
        """Number of parameters of attention, routers and head, which every step reads; without the embedding."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (attention + self.experts * self.hidden) + self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key/value cache per token, over all layers, at two bytes per value."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    def experts_read(self, tokens: int) -> float:
        """Return the expected number of distinct experts of a layer that ``tokens`` tokens choose at random."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** tokens)

    def operations(self, tokens: int, context: float, heads: int) -> float:
        """Return the number of multiplications and additions of one step.

        Args:
            tokens: number of tokens that the step computes.
            context: average number of tokens that each of them attends to.
            heads: number of tokens whose logits are computed.
        """
        chosen = self.expert_parameters * self.chosen / self.experts
        per_token = chosen + self.other_parameters - self.vocab * self.hidden
        attention = 2 * self.layers * self.heads * self.head_size * context
        return 2 * (tokens * (per_token + attention) + heads * self.vocab * self.hidden)


def shape_of(path: Path) -> Shape:
    """Return the sizes of the model in a GGUF file; a dense model counts as one expert.

    Raises:
        NotFound: there is no such file.
        CheckpointError: the file is damaged, or not supported.
    """
    with checkpoints.open_checkpoint(path) as checkpoint:
        config = checkpoint.config
    return Shape(
        config["hidden_size"],
        config["intermediate_size"],
        config.get("num_local_experts", 1),
        config.get("num_experts_per_tok", 1),
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["vocab_size"],
    )


def write(shape: Shape, folder: Path) -> Path:
    """Write the model as a checkpoint inside ``folder``, if it does not exist; return the checkpoint's folder."""
    target = folder / "hf"
    if not target.exists():
        part = folder / "hf.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
        _tokenizer(shape.vocab).save(str(part / "tokenizer.json"))
        file = part / "model.safetensors"
        _safetensors.write_file(file, {name: _Random(name, size, file) for name, size in _tensors(shape)})
        part.rename(target)
    return target


class _Random:
    """A tensor with random values that are generated when it is read; weights of norms are ones."""

    def __init__(self, name: str, shape: tuple[int, ...], file: Path) -> None:
        self.info = TensorInfo(shape, torch.bfloat16, file)
        self._seed = crc32(name.encode())

    def read(self, index: Index | None = None) -> Tensor:
        assert index is None
        if len(self.info.shape) == 1:
            return torch.ones(self.info.shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(self._seed)
        return torch.empty(self.info.shape, dtype=torch.bfloat16).normal_(0, WEIGHT_STD, generator=generator)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        yield f"{name}.input_layernorm.weight", (shape.hidden,)
        yield f"{name}.self_attn.q_proj.weight", (queries, shape.hidden)
        yield f"{name}.self_attn.k_proj.weight", (keys, shape.hidden)
        yield f"{name}.self_attn.v_proj.weight", (keys, shape.hidden)
        yield f"{name}.self_attn.o_proj.weight", (shape.hidden, queries)
        yield f"{name}.post_attention_layernorm.weight", (shape.hidden,)
        yield f"{name}.block_sparse_moe.gate.weight", (shape.experts, shape.hidden)
        for expert in range(shape.experts):
            part = f"{name}.block_sparse_moe.experts.{expert}"
            yield f"{part}.w1.weight", (shape.inner, shape.hidden)
            yield f"{part}.w2.weight", (shape.hidden, shape.inner)
            yield f"{part}.w3.weight", (shape.inner, shape.hidden)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.chosen,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokenizer(vocab: int) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer with ``vocab`` pieces, so that every id has a text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *letters, *(f"piece{token_id}" for token_id in range(len(SPECIAL) + len(letters), vocab))][
        :vocab
    ]
    model = tokenizers.models.BPE(vocab={piece: token_id for token_id, piece in enumerate(pieces)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
