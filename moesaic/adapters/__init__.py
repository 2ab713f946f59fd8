"""Low-rank adapters (LoRA, arXiv:2106.09685): small trained matrices beside weights that stay as they are.

A weight W [out, in] gets two matrices, A [r, in] and B [out, r]. Its product with x becomes W x + (alpha / r) B A x.
Each expert of a mixture has matrices of its own. B is zero at first, so that a new adapter changes nothing.

This module attaches adapters to a model and finds them there. ``peft`` reads and writes their files.

Legend: T tokens, r rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.adapters._layers import AdaptedExperts as AdaptedExperts
from moesaic.adapters._layers import AdaptedLinear as AdaptedLinear
from moesaic.errors import InvalidParameter
from moesaic.models import Decoder, Experts
from moesaic.models._layers import Linear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("w1", "w2", "w3")
TARGETS = (*ATTENTION, *DENSE, *EXPERTS)
"""Names of the weights that can have an adapter, as the last part of their names in Hugging Face's classic scheme."""
MAX_RANK = 512

Adapted = AdaptedLinear | AdaptedExperts


@dataclass(frozen=True)
class AdapterConfig:
    """The sizes of an adapter.

    Attributes:
        rank: r.
        alpha: the scale of the change is alpha / r.
        targets: names among ``TARGETS`` of the weights with an adapter.

    Raises:
        InvalidParameter: a value is out of range, or a name is unknown.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise InvalidParameter("rank", f"is {self.rank}, expected 1 to {MAX_RANK}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InvalidParameter("alpha", f"is {self.alpha}, expected a positive number")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise InvalidParameter("targets", f"are {', '.join(self.targets)}; expected some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """The factor of the change."""
        return self.alpha / self.rank


def attach(model: Decoder, config: AdapterConfig, seed: int = 0) -> None:
    """Give an adapter to each weight of ``model`` that ``config`` names. All other parameters stay as they are.

    A is drawn uniformly from +-1/sqrt(in), as PEFT does, and B is zero.

    Raises:
        InvalidParameter: the model has none of these weights, or has adapters already.
    """
    if any(True for _ in adapted(model)):
        raise InvalidParameter("adapter", "cannot be attached: the model has one already")
    generator = torch.Generator().manual_seed(seed)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            new: Adapted | None = None
            if isinstance(child, Linear) and child.name.rpartition(".")[2] in config.targets:
                new = AdaptedLinear(child, config.rank, config.scale, generator)
            elif isinstance(child, Experts) and (parts := [name for name in EXPERTS if name in config.targets]):
                new = AdaptedExperts(child, parts, config.rank, config.scale, generator)
            if new is not None:
                setattr(module, name, new)
    if not any(True for _ in adapted(model)):
        raise InvalidParameter("targets", f"are {', '.join(config.targets)}, but the model has no such weight")
    model.recordable = False  # the products with A and B are not ops


def adapted(model: Decoder) -> Iterator[Adapted]:
    """Yield the layers of ``model`` that have an adapter."""
    for module in model.blocks.modules():
        if isinstance(module, AdaptedLinear | AdaptedExperts):
            yield module


def matrices(model: Decoder) -> dict[str, nn.Parameter]:
    """Return the matrices of the adapters of ``model`` by name: the name of the weight with ".a" or ".b".

    Those of experts are stacks [E, ...]; their names are those of the layer's experts with ".w1.a" and so on.
    """
    return {name: parameter for layer in adapted(model) for name, parameter in layer.matrices().items()}


def by_weight(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each weight by its name, for ``tensors`` with the names of ``matrices``.

    Each expert has a name of its own, such as ``experts.3.w1``.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, a in tensors.items():
        weight, _, side = name.rpartition(".")
        if side != "a":
            continue
        b = tensors[f"{weight}.b"]
        stack, _, part = weight.rpartition(".")
        if part in EXPERTS:
            found |= {f"{stack}.{expert}.{part}": (a[expert], b[expert]) for expert in range(len(a))}
        else:
            found[weight] = a, b
    return found


@torch.no_grad()
def load(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the matrices of the adapters of ``model`` with ``tensors``, which have the names of ``matrices``.

    Raises:
        InvalidParameter: a name is missing or unknown, or a shape differs.
    """
    own = matrices(model)
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())
        raise InvalidParameter("adapter", f"does not fit the model: {different[0]} is only in one of them")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            found, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            raise InvalidParameter("adapter", f"does not fit the model: {name} is {found}, expected {expected}")
        parameter.copy_(tensors[name])


@contextmanager
def switched_off(model: Decoder) -> Iterator[None]:
    """Make the model compute without its adapters until the ``with`` block ends."""
    layers = list(adapted(model))
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
