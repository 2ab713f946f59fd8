"""Tiny random models of transformers, the independent reference implementation."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from moesaic import checkpoints, formats, models
from moesaic.formats import Slot

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RANKS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
"""Sizes that are divisible by 8 model-parallel ranks."""
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral-top1-of-4": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "mixtral-top2-of-8": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-top3-of-8": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "mixtral-mha": ("Mixtral", {"num_key_value_heads": 4}),
    "mixtral-window": ("Mixtral", {"sliding_window": 9}),
    "mixtral-wide-heads": ("Mixtral", {"head_dim": 24}),
    "mixtral-tied": ("Mixtral", {"tie_word_embeddings": True}),
    "llama-gqa": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-3.1-rope": ("Llama", {"rope_parameters": LLAMA31}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
}
"""Configurations that change the computation: a model family and its settings, by name."""


def transformers_model(
    family: str, changes: dict[str, object], head: str = "ForCausalLM"
) -> transformers.PreTrainedModel:
    """Return a tiny random transformers model in float32, with weights that are large enough to change its output."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def moesaic_model(folder: Path, weight_format: str = "float32") -> models.Decoder:
    """Return Moesaic's model of the checkpoint in ``folder``."""
    with checkpoints.open_checkpoint(folder) as checkpoint:
        dtype = getattr(torch, weight_format)
        model = models.build(checkpoint.config, folder, formats.load(weight_format), dtype=dtype)
        checkpoints.load_weights(model.slots(), checkpoint)
    return model


class Tiny:
    """Builders of tiny models and of their weights."""

    @staticmethod
    def build(kind: str = "mixtral", **changes: object) -> torch.nn.Module:
        """Return a tiny random transformers model."""
        torch.manual_seed(7)
        sizes = {**RANKS, **changes}
        if kind == "mixtral":
            config = transformers.MixtralConfig(**{"num_local_experts": 4, **sizes})
            return transformers.MixtralForCausalLM(config)
        if kind == "mistral":
            return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    @staticmethod
    def truth(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights of a transformers model under their classic names."""
        weights = {}
        for name, tensor in model.state_dict().items():
            if name.endswith("mlp.gate.weight"):
                weights[name.replace("mlp.gate", "block_sparse_moe.gate")] = tensor
            elif name.endswith("gate_up_proj"):
                stem = name.replace("mlp.experts.gate_up_proj", "block_sparse_moe.experts")
                for e, expert in enumerate(tensor):
                    weights[f"{stem}.{e}.w1.weight"], weights[f"{stem}.{e}.w3.weight"] = expert.chunk(2)
            elif name.endswith("experts.down_proj"):
                stem = name.replace("mlp.experts.down_proj", "block_sparse_moe.experts")
                weights.update({f"{stem}.{e}.w2.weight": expert for e, expert in enumerate(tensor)})
            else:
                weights[name] = tensor
        return weights

    @staticmethod
    def slots(
        weights: dict[str, torch.Tensor], out: dict[str, torch.Tensor], index: tuple[slice, ...] = ()
    ) -> list[Slot]:
        """Return slots for ``weights`` that store into ``out``."""

        def store(name: str):
            return lambda tensor: out.__setitem__(name, tensor.clone())

        return [Slot(name, tuple(weight.shape), index, store(name)) for name, weight in weights.items()]

    @staticmethod
    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        """Assert that two sets of weights are equal bit for bit."""
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            assert torch.equal(one[name], other[name]), name
