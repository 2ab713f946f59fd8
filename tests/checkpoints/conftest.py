"""Tiny random checkpoints, written by transformers, and slots that keep the tensors stored in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moesaic.formats import Slot
from tests.tiny import RANKS


class Tiny:
    """Helpers of the tests in this folder."""

    @staticmethod
    def build(kind: str = "mixtral", **changes: object) -> torch.nn.Module:
        """Return a tiny random model of transformers."""
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


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral written by save_pretrained in several shards; tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("mixtral")
    Tiny.build().save_pretrained(path, max_shard_size="40KB")
    return path
