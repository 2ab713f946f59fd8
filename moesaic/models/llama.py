"""Llama 2, Llama 3 and Mistral 7B: the dense decoder with a SwiGLU feed-forward network.

Llama 2, arXiv:2307.09288; The Llama 3 Herd of Models, arXiv:2407.21783; Mistral 7B,
arXiv:2310.06825, which is the same with a sliding window. SwiGLU is arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic import ops
from moesaic.formats import Slot
from moesaic.models import _shape
from moesaic.models._config import Keys
from moesaic.models._layers import Decoder, Formats, Linear, Shape
from moesaic.ops import Group

MODEL_TYPES = {
    "llama": _shape.Defaults(rope_theta=1e4, kv_heads=None, norm_eps=1e-6),
    "mistral": _shape.Defaults(rope_theta=1e4, kv_heads=8, norm_eps=1e-6, window=4096),
}


@dataclass(frozen=True)
class Config:
    """The sizes of a dense decoder."""

    shape: Shape


class SwiGLU(nn.Module):
    """A SwiGLU feed-forward network (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, name: str, size: int, inner: int, formats: Formats, group: Group) -> None:
        super().__init__()

        def linear(part: str, out: int, inp: int, split: Literal["out", "in"]) -> Linear:
            return Linear(f"{name}.{part}", out, inp, formats("mlp", f"{name}.{part}.weight"), group, split)

        self.gate = linear("gate_proj", inner, size, "out")
        self.up = linear("up_proj", inner, size, "out")
        self.down = linear("down_proj", size, inner, "in")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))  # type: ignore[no-any-return]

    def stages(self) -> tuple[tuple[Linear, ...], ...]:
        """Return the linear layers in the order of their inputs; those of one stage have the same input."""
        return (self.gate, self.up), (self.down,)

    def slots(self) -> Iterator[Slot]:
        for linear in (self.gate, self.up, self.down):
            yield from linear.slots()


def configure(keys: Keys) -> Config:
    """Return the sizes of the model, read from its configuration ``keys``."""
    keys.only("mlp_bias", False)
    return Config(_shape.read(keys, MODEL_TYPES))


def build(config: Config, formats: Formats, group: Group, dtype: torch.dtype) -> Decoder:
    """Return the model of ``config``, with uninitialized weights on torch's default device.

    ``dtype`` is that of the activations; the other arguments are as for ``Decoder``.
    """
    size, inner = config.shape.hidden_size, config.shape.intermediate_size

    def mlp(layer: str) -> SwiGLU:
        return SwiGLU(f"{layer}.mlp", size, inner, formats, group)

    return Decoder(config.shape, mlp, formats, group, dtype)
