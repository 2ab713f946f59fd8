"""Prepares a model for training: adapters, activation checkpointing, and the balance of the router.

Legend: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moesaic import adapters
from moesaic.formats import Slot
from moesaic.models import Decoder
from moesaic.models._layers import Block, Router
from moesaic.ops import Batch
from moesaic.train.settings import Settings


class CheckpointedBlock(nn.Module):
    """A layer whose activations are computed again in the backward pass (arXiv:1604.06174), so that none are stored."""

    def __init__(self, base: Block) -> None:
        super().__init__()
        self.base = base

    @property
    def attention(self) -> nn.Module:
        return self.base.attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return self.base(x, cos, sin, batch)  # type: ignore[no-any-return]
        return checkpoint(self.base, x, cos, sin, batch, use_reentrant=False)  # type: ignore[no-any-return]

    def slots(self) -> Iterator[Slot]:
        return self.base.slots()


class BalancedRouter(nn.Module):
    """A router that keeps its probabilities, from which the load-balancing loss is computed."""

    def __init__(self, base: Router) -> None:
        super().__init__()
        self.base = base
        self.kept: tuple[Tensor, Tensor] | None = None
        """Probabilities [T, E] and chosen experts [T, k] of the last forward pass."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), self.base.weight)
        best, ids = logits.topk(self.base.k, dim=-1)
        probabilities = logits.softmax(-1)  # in each pass: activation checkpointing wants the second like the first
        if self.kept is None:
            self.kept = probabilities, ids
        return ids, best.softmax(-1)

    def slots(self) -> Iterator[Slot]:
        return self.base.slots()


def prepare(model: Decoder, settings: Settings) -> None:
    """Attach adapters to ``model`` and make it ready for training; nothing but the adapters is trained.

    Raises:
        InvalidParameter: the model has none of the weights that the adapter is for.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters.attach(model, settings.adapter, settings.seed)
    if settings.router_loss:
        for module in list(model.blocks.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Router):
                    setattr(module, name, BalancedRouter(child))
    if settings.checkpointing:
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            model.blocks[index] = CheckpointedBlock(block)


def router_loss(model: Decoder) -> Tensor | None:
    """Return the load-balancing loss of the last forward pass (arXiv:2101.03961 §2.2); None for a dense model.

    It is E times the sum over experts of the fraction of choices that an expert gets times its mean probability, each
    over the tokens of all layers. With balanced experts, it is k.
    """
    routers = [module for module in model.blocks.modules() if isinstance(module, BalancedRouter)]
    kept = [router.kept for router in routers if router.kept is not None]
    if not kept:
        return None
    probabilities, ids = (torch.cat(parts) for parts in zip(*kept, strict=True))
    experts = probabilities.shape[1]
    fractions = F.one_hot(ids, experts).float().sum(1).mean(0)  # [E], sums to k
    return experts * (fractions * probabilities.mean(0)).sum()


def forget_routing(model: Decoder) -> None:
    """Let the routers keep the probabilities of the next forward pass."""
    for module in model.blocks.modules():
        if isinstance(module, BalancedRouter):
            module.kept = None
