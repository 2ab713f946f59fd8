"""What is trained: answers of conversations, or preferences between answers. Both have one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.models import Decoder
from moesaic.train import losses
from moesaic.train.examples import Example, Pair


class Task(Protocol):
    """Items to learn from, and their loss."""

    @property
    def kind(self) -> str:
        """Name of the task, for the state of a run."""

    def __len__(self) -> int:
        """Return the number of items."""

    def tokens(self, item: int) -> int:
        """Return the number of tokens that an item takes to compute."""

    def weight(self, item: int) -> int:
        """Return what an item counts in the mean of the losses."""

    def loss(self, model: Decoder, items: Sequence[int]) -> tuple[Tensor, float]:
        """Return the sum of the losses of some items, and how many of them the model gets right.

        What is right is defined for preferences only; otherwise the number is 0.
        """


@dataclass(frozen=True)
class Supervised:
    """Answers to learn: the loss is the mean of -log p over their tokens."""

    examples: Sequence[Example]
    kind: str = "sft"

    def __len__(self) -> int:
        return len(self.examples)

    def tokens(self, item: int) -> int:
        return len(self.examples[item].ids)

    def weight(self, item: int) -> int:
        return self.examples[item].targets

    def loss(self, model: Decoder, items: Sequence[int]) -> tuple[Tensor, float]:
        return losses.supervised(model, [self.examples[item] for item in items]), 0.0


@dataclass(frozen=True)
class Preferences:
    """Preferences to learn: the loss is the mean over the pairs. A pair is right if the better answer gains more."""

    pairs: Sequence[Pair]
    beta: float
    kind: str = "dpo"

    def __len__(self) -> int:
        return len(self.pairs)

    def tokens(self, item: int) -> int:
        pair = self.pairs[item]
        return len(pair.chosen.ids) + len(pair.rejected.ids)

    def weight(self, item: int) -> int:  # noqa: ARG002
        return 1

    def loss(self, model: Decoder, items: Sequence[int]) -> tuple[Tensor, float]:
        loss, margins = losses.preference(model, [self.pairs[item] for item in items], self.beta)
        return loss, float((margins > 0).sum())


@torch.no_grad()
def evaluate(model: Decoder, task: Task, parts: Sequence[Sequence[int]]) -> float:
    """Return the mean loss of all items of ``task``, which are computed in these parts."""
    total = sum(float(task.loss(model, part)[0]) for part in parts)
    return total / max(1, sum(task.weight(item) for part in parts for item in part))
