"""Fixtures: a small Mixtral with random weights, and a greedy oracle without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moesaic import formats, models
from moesaic.formats import Packed
from moesaic.models._layers import Decoder
from moesaic.ops import Batch

Oracle = Callable[[Decoder, Sequence[int], int], list[int]]
CONFIG: dict[str, object] = {
    "model_type": "mixtral",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def _empty(name: str, **changes: object) -> Decoder:
    """Return a model with weights of a format that have no values yet."""
    return models.build(CONFIG | changes, Path("config.json"), formats.load(name), dtype=torch.float32)


@pytest.fixture(scope="session")
def build() -> Callable[..., Decoder]:
    """A factory of models with the same weights; keyword arguments change configuration keys."""

    def make(**changes: object) -> Decoder:
        model = _empty("float32", **changes)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.4 if weight.ndim > 1 else 1.0))
        return model

    return make


@pytest.fixture(scope="session")
def model(build: Callable[..., Decoder]) -> Decoder:
    return build()


@pytest.fixture(scope="session")
def exact(model: Decoder) -> Decoder:
    """The same model in int8, whose bits do not depend on the other tokens of a step: torch's float products do."""
    quantized = _empty("int8")
    for target, source in zip(quantized.slots(), model.slots(), strict=True):
        weight = source.weight
        target.store(weight.dequantize(torch.float32, source.entry) if isinstance(weight, Packed) else weight)
    return quantized


@pytest.fixture(scope="session")
def windowed(build: Callable[..., Decoder]) -> Decoder:
    return build(sliding_window=9)


@pytest.fixture(scope="session")
def greedy() -> Oracle:
    """Greedy decoding that recomputes the whole sequence for each token, without a cache."""

    def run(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(model.logits(model(Batch.whole([ids]))[-1:]).argmax()))
        return ids[len(prompt) :]

    return run


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Prompts of many lengths, some with a common prefix."""
    draw = torch.Generator().manual_seed(3)
    common = torch.randint(61, (20,), generator=draw).tolist()
    tails = [torch.randint(61, (n,), generator=draw).tolist() for n in (1, 2, 5, 11, 17, 23, 31)]
    return [tuple(common[: 4 * i] + tail) for i, tail in enumerate(tails)] + [tuple(common), tuple(common[:16])]
