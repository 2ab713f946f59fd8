"""Settings of a training run, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moesaic.adapters import AdapterConfig
from moesaic.errors import InvalidParameter


@dataclass(frozen=True)
class Settings:
    """How an adapter is trained. A run with other settings does not continue one that was stopped.

    Attributes:
        adapter: rank, scale and weights of the adapter.
        epochs: number of passes over the examples.
        steps: number of optimizer steps; None: as many as ``epochs`` take.
        batch: examples in an optimizer step.
        micro_batch_tokens: tokens that are computed at once, which bounds the memory; a step has as many such parts as
            its examples need. Results do not depend on it, except for rounding.
        max_length: maximum tokens of an example; longer ones are cut.
        learning_rate: the largest learning rate.
        warmup: fraction of the steps in which the learning rate grows to the largest.
        weight_decay: weight decay of AdamW (arXiv:1711.05101).
        clip: largest norm of the gradient.
        router_loss: factor of the load-balancing loss of the router (arXiv:2101.03961 §2.2); 0: none.
        checkpointing: whether activations within a layer are computed again in the backward pass (arXiv:1604.06174).
        seed: seed of the order of examples, and of the first values of the adapter.
        evaluate_every: steps between evaluations on the held-out examples.
        patience: evaluations without an improvement after which training stops; None: it never stops early.
        save_every: steps between saves of the state from which a stopped run continues.
        beta: strength of the preference loss (arXiv:2305.18290, equation 7); only for preferences.

    Raises:
        InvalidParameter: a value is out of range.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 8
    micro_batch_tokens: int = 4096
    max_length: int = 2048
    learning_rate: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    router_loss: float = 0.0
    checkpointing: bool = True
    seed: int = 0
    evaluate_every: int = 100
    patience: int | None = None
    save_every: int = 50
    beta: float = 0.1

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch_tokens", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")
        for name in ("epochs", "learning_rate", "clip", "beta"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected a positive number")
        for name in ("weight_decay", "router_loss"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected 0 or more")
        for name in ("steps", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")
        if self.max_length < 2:
            raise InvalidParameter("max_length", f"is {self.max_length}, expected at least 2 tokens")
        if not 0 <= self.warmup <= 1:
            raise InvalidParameter("warmup", f"is {self.warmup}, expected 0 to 1")

    def total_steps(self, examples: int) -> int:
        """Return the number of optimizer steps with this number of examples."""
        return self.steps or max(1, math.ceil(self.epochs * examples / self.batch - 1e-9))

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step, 0 .. total - 1: a linear warm-up, then a half cosine down to 0."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return self.learning_rate * step / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
