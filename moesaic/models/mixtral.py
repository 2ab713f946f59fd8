"""Mixtral: a Mistral decoder whose feed-forward network is a sparse mixture of experts.

Mixtral of Experts, arXiv:2401.04088. 8x7B and 8x22B differ only in their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.formats import Slot
from moesaic.models import _shape
from moesaic.models._config import Keys
from moesaic.models._layers import Decoder, Experts, Formats, Router, Shape
from moesaic.ops import Group

MODEL_TYPES = {"mixtral": _shape.Defaults(rope_theta=1e6, kv_heads=8, norm_eps=1e-5)}


@dataclass(frozen=True)
class Config:
    """The sizes of a Mixtral model."""

    shape: Shape
    num_experts: int
    experts_per_token: int


class MixtureOfExperts(nn.Module):
    """Sparse feed-forward network: each token goes to the k experts with its highest router logits.

    The experts' outputs are weighted by the softmax over those k logits (arXiv:2401.04088 §2.1, eq. 1-2).
    """

    def __init__(self, name: str, config: Config, formats: Formats, group: Group) -> None:
        super().__init__()
        size, inner = config.shape.hidden_size, config.shape.intermediate_size
        self.gate = Router(f"{name}.gate", config.num_experts, config.experts_per_token, size)
        self.experts = Experts(f"{name}.experts", config.num_experts, size, inner, formats, group)

    def forward(self, x: Tensor) -> Tensor:
        ids, scores = self.gate(x)  # [T, k]
        return self.experts(x, ids, scores)  # type: ignore[no-any-return]

    def stages(self) -> tuple[tuple[Experts]]:
        """Return the layers whose weights may be quantized, in the order of their inputs: the experts."""
        return ((self.experts,),)

    def slots(self) -> Iterator[Slot]:
        yield from self.gate.slots()
        yield from self.experts.slots()


def configure(keys: Keys) -> Config:
    """Return the sizes of the model, read from its configuration ``keys``."""
    shape = _shape.read(keys, MODEL_TYPES)
    experts = keys.integer("num_local_experts", 8)
    chosen = keys.integer("num_experts_per_tok", 2)
    if chosen > experts:
        raise keys.fail(f"num_experts_per_tok is {chosen}, but there are only {experts} experts")
    return Config(shape, experts, chosen)


def build(config: Config, formats: Formats, group: Group, dtype: torch.dtype) -> Decoder:
    """Return the model of ``config``, with uninitialized weights on torch's default device.

    ``dtype`` is that of the activations; the other arguments are as for ``Decoder``.
    """

    def mlp(layer: str) -> MixtureOfExperts:
        return MixtureOfExperts(f"{layer}.block_sparse_moe", config, formats, group)

    return Decoder(config.shape, mlp, formats, group, dtype)
