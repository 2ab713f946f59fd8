"""Losses of a model on examples, with gradients for its adapters.

Legend: T tokens, R rows whose next token is learned, d hidden size, V vocabulary, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moesaic.adapters import switched_off
from moesaic.models import Decoder
from moesaic.ops import Batch
from moesaic.train.examples import Example, Pair

LOGIT_ROWS = 512
"""Rows whose logits exist at once: 100 MB for a vocabulary of 49,152 in float32."""


def supervised(model: Decoder, examples: Sequence[Example]) -> Tensor:
    """Return the sum of -log p over the learned tokens of the examples."""
    return token_losses(model, examples).sum()


def token_losses(model: Decoder, examples: Sequence[Example]) -> Tensor:
    """Return -log p of each learned token: [R], example after example."""
    device = model.norm.weight.device
    batch = Batch.whole([example.ids for example in examples], device)
    learned = torch.tensor([flag for example in examples for flag in example.learned], device=device)
    learned[torch.tensor(batch.starts[:-1], device=device)] = False  # nothing predicts the first token
    places = learned.nonzero()[:, 0]
    hidden, targets = model(batch)[places - 1], batch.tokens[places]
    losses = [
        _chunk(model, rows, wanted)
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def _chunk(model: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    def compute(hidden: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")

    if not hidden.requires_grad:
        return compute(hidden)
    return checkpoint(compute, hidden, use_reentrant=False)  # type: ignore[no-any-return]


def preference(model: Decoder, pairs: Sequence[Pair], beta: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the preference losses (DPO, arXiv:2305.18290, equation 7), and the margins of the rewards [n].

    The reference model is the model without its adapters.
    """
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    with torch.no_grad(), switched_off(model):
        before = _sums(token_losses(model, examples), examples)
    gains = before - _sums(token_losses(model, examples), examples)  # log p after - log p before, of each answer
    margins = beta * (gains[0::2] - gains[1::2])
    return -F.logsigmoid(margins).sum(), margins.detach()


def _sums(losses: Tensor, examples: Sequence[Example]) -> Tensor:
    """Return the sum of the losses of each example."""
    return torch.stack([part.sum() for part in losses.split([example.targets for example in examples])])
