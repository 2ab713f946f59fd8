"""Sizes of a model in any format, counted on the real module on torch's meta device, where tensors take no memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moesaic import formats, models, ops
from moesaic.errors import InvalidParameter
from moesaic.formats import WeightFormat
from moesaic.model_spec import ModelSpec
from moesaic.models import Decoder, Experts, Shape

STEP_TOKENS, STEP_ROWS = 512, 64
"""Tokens of a step and rows of logits at most, with the engine's default limits."""
MAX_SHARDS = 16
"""Largest number of cards that a model is divided over; more are several hosts."""


@dataclass(frozen=True)
class Weight:
    """Matrices of one role in one format.

    Attributes:
        role: embedding, attention, mlp, experts or head.
        format: format in memory.
        count: number of weights (parameters).
        nbytes: bytes in this format.
    """

    role: str
    format: WeightFormat
    count: int
    nbytes: int


@dataclass(frozen=True)
class Weights:
    """All weights of a model in the chosen formats.

    Attributes:
        groups: the matrices, by role and format.
        other_bytes: bytes of the router and the norms, which are always float32.
    """

    groups: tuple[Weight, ...]
    other_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.other_bytes + sum(group.nbytes for group in self.groups)

    @property
    def bits(self) -> float:
        """Mean bits of a weight in the matrices, scales included."""
        return 8 * sum(group.nbytes for group in self.groups) / sum(group.count for group in self.groups)

    def of(self, role: str) -> tuple[Weight, ...]:
        """Return the groups of a role."""
        return tuple(group for group in self.groups if group.role == role)


@dataclass(frozen=True)
class ModelSizes:
    """What counts for memory and speed in a model.

    Attributes:
        spec: description that the model is built from.
        shape: sizes of the layers.
        matrices: role, format as planned, and logical shape of each matrix that a checkpoint has.
        other_bytes: bytes of the router and the norms.
        cache_shapes: key/value heads and head size of each layer.
        experts: experts of a layer; 0 in a dense model.
        experts_per_token: experts that a token is sent to; 0 in a dense model.
    """

    spec: ModelSpec
    shape: Shape
    matrices: tuple[tuple[str, WeightFormat, tuple[int, ...]], ...]
    other_bytes: int
    cache_shapes: tuple[tuple[int, int], ...]
    experts: int
    experts_per_token: int

    @classmethod
    def count(cls, spec: ModelSpec, model: Decoder | None = None) -> ModelSizes:
        """Return the sizes of the model of ``spec``, which is built on the meta device if it is not given.

        Raises:
            ConfigError: the configuration is not understood.
        """
        model = model or spec.build("meta")
        matrices, other = [], 0
        for slot in model.slots():
            role = models.role(slot.name)
            if slot.format is None or role is None:
                other += 4 * math.prod(slot.shape)
            else:
                matrices.append((role, slot.format, tuple(slot.shape)))
        experts = next((module.experts for module in model.modules() if isinstance(module, Experts)), 0)
        chosen = int(spec.config.get("num_experts_per_tok", 0)) if experts else 0
        return cls(spec, model.shape, tuple(matrices), other, tuple(model.cache_shapes), experts, chosen)

    @property
    def parameters(self) -> int:
        """Number of parameters, counted as before quantization."""
        return sum(math.prod(shape) for _, _, shape in self.matrices) + self.other_bytes // 4

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied by: those of the chosen experts, without a separate embedding."""
        return round(sum(self._active(role) * math.prod(shape) for role, _, shape in self.matrices))

    def _active(self, role: str) -> float:
        """Return the fraction of the weights of a role that one token is multiplied by."""
        if role == "experts":
            return self.experts_per_token / self.experts
        return 0.0 if role == "embedding" and not self.shape.tied else 1.0

    def weights(self, text: str | None = None) -> Weights:
        """Return the weights in the formats of ``text``, as ``models.named`` reads it; None: as the spec says.

        Raises:
            InvalidParameter: the text names an unknown format.
        """
        named = {} if text is None else {role: formats.load(name) for role, name in models.named(text).items()}
        found: dict[tuple[str, WeightFormat], list[tuple[int, ...]]] = {}
        for role, planned, shape in self.matrices:
            found.setdefault((role, named.get(role, planned)), []).append(shape)
        return Weights(tuple(self._groups(found)), self.other_bytes)

    @staticmethod
    def _groups(found: Mapping[tuple[str, WeightFormat], list[tuple[int, ...]]]) -> Iterator[Weight]:
        for (role, weight_format), shapes in found.items():
            sizes = {shape: weight_format.nbytes(shape) for shape in set(shapes)}  # a model repeats few shapes
            yield Weight(role, weight_format, sum(map(math.prod, shapes)), sum(sizes[shape] for shape in shapes))

    def cache_bytes_per_token(self, dtype: str = "auto") -> int:
        """Return the bytes of the keys and values of a token in all layers; auto is the dtype of activations."""
        cache = self.spec.dtype if dtype == "auto" else getattr(torch, dtype)
        return ops.Cache.bytes_per_token(list(self.cache_shapes), cache)

    def cache_length(self, context: int) -> int:
        """Return the tokens of a sequence of ``context`` tokens that stay in the cache."""
        return min(context, self.shape.window or context)

    def workspace_bytes(self, tokens: int = STEP_TOKENS, rows: int = STEP_ROWS) -> int:
        """Return the bytes that a step of ``tokens`` tokens with ``rows`` rows of logits computes in."""
        shape = self.shape
        heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        routed = max(1, self.experts_per_token) * 3 * shape.intermediate_size
        size = self.spec.dtype.itemsize
        return tokens * (4 * shape.hidden_size + heads + routed) * size + 3 * rows * shape.vocab_size * 4

    def shards(self) -> tuple[int, ...]:
        """Return the numbers of ranks, up to ``MAX_SHARDS``, that the model can be divided over."""
        return tuple(size for size in range(1, MAX_SHARDS + 1) if self._divisible(size))

    def _divisible(self, size: int) -> bool:
        shape, group = self.shape, ops.Group(size=size)
        divided = (shape.num_heads, shape.num_kv_heads, shape.intermediate_size, shape.vocab_size)
        try:
            for total in divided:
                group.share(total, "items")
        except InvalidParameter:
            return False
        return True
