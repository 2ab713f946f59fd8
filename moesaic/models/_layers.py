"""The layers of the models. Their arguments are numbers, never the name of a model.

Every layer takes a ``Group`` and holds its own shard (Megatron-LM, arXiv:1909.08053 §3). It also takes its name in
Hugging Face's classic scheme. Its method ``slots`` yields a ``Slot`` for each tensor of a checkpoint that fills it: the
tensor's name, and the part that the layer holds.

Legend: T tokens, d hidden size, f intermediate size, V vocabulary, H query heads, G key/value
heads, D head size, E experts, k experts per token; sizes inside a layer are those of its shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic import ops
from moesaic.formats import Packed, Slot, WeightFormat
from moesaic.models import _rope
from moesaic.ops import Batch, Group

Formats = Callable[[str, str], WeightFormat]
"""Returns the format of a weight, given its role (embedding, attention, mlp, experts or head) and its tensor's name.

For a stack of experts, the name is that of the first expert's tensor."""

ALL = slice(None)


class Linear(nn.Module):
    """Linear layer y = x W^T without bias.

    With ``split`` "out", each rank of the group holds some rows of W. With "in", each rank holds some columns, and y is
    summed over the ranks. With None, each rank holds all of W.
    """

    def __init__(
        self,
        name: str,
        out: int,
        inp: int,
        weight_format: WeightFormat,
        group: Group,
        split: Literal["out", "in"] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        rows = group.share(out, "output features") if split == "out" else slice(0, out)
        columns = group.share(inp, "input features") if split == "in" else slice(0, inp)
        self.full, self.index = (out, inp), (rows, columns)
        self.weight = weight_format.empty((rows.stop - rows.start, columns.stop - columns.start))
        self.group, self.summed = group, split == "in"

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return y in ``dtype``, or in x's if that is None."""
        y = ops.linear(x, self.weight, dtype)
        return self.group.sum(y) if self.summed else y

    def slots(self) -> Iterator[Slot]:
        yield _slot(self.name, self.full, self.index, self.weight)


class RMSNorm(nn.Module):
    """RMS normalization x / rms(x) * weight (arXiv:1910.07467); the weight stays float32."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)
        self.name, self.eps = name, eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def slots(self) -> Iterator[Slot]:
        shape = tuple(self.weight.shape)
        yield Slot(f"{self.name}.weight", shape, (ALL,), _copy(self.weight), weight=self.weight)


class Router(nn.Module):
    """Chooses k experts for each token: ids [T, k] and scores [T, k]. Its weight is float32 and never quantized."""

    def __init__(self, name: str, experts: int, k: int, size: int) -> None:
        super().__init__()
        self.name, self.k = name, k
        self.weight = nn.Parameter(torch.empty(experts, size, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.route(x, self.weight, self.k)

    def slots(self) -> Iterator[Slot]:
        shape = tuple(self.weight.shape)
        yield Slot(f"{self.name}.weight", shape, (ALL, ALL), _copy(self.weight), weight=self.weight)


class Embedding(nn.Module):
    """Lookup of the vectors [T, d] of token ids [T]; each rank holds a shard of the vocabulary."""

    def __init__(
        self, name: str, vocab: int, size: int, weight_format: WeightFormat, group: Group, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name = name
        self.share = group.share(vocab, "vocabulary entries")
        self.full = (vocab, size)
        self.weight = weight_format.empty((self.share.stop - self.share.start, size))
        self.group, self.dtype = group, dtype

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return ops.embedding(ids, self.weight, self.dtype)
        local = (ids >= self.share.start) & (ids < self.share.stop)
        x = ops.embedding(torch.where(local, ids - self.share.start, 0), self.weight, self.dtype)
        return self.group.sum(x * local[:, None])

    def slots(self) -> Iterator[Slot]:
        yield _slot(self.name, self.full, (self.share, ALL), self.weight)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads (GQA, arXiv:2305.13245).

    With a window, a token sees only the last ``window`` positions, itself included (Mistral 7B, arXiv:2310.06825 §2).
    """

    def __init__(
        self,
        name: str,
        layer: int,
        size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None,
        formats: Formats,
        group: Group,
    ) -> None:
        super().__init__()

        def linear(part: str, out: int, inp: int, split: Literal["out", "in"]) -> Linear:
            weight_format = formats("attention", f"{name}.{part}.weight")
            return Linear(f"{name}.{part}", out, inp, weight_format, group, split)

        group.share(heads, "query heads")
        share = group.share(kv_heads, "key/value heads")
        self.kv_heads, self.head_dim = share.stop - share.start, head_dim
        self.layer, self.window = layer, window
        self.wq = linear("q_proj", heads * head_dim, size, "out")
        self.wk = linear("k_proj", kv_heads * head_dim, size, "out")
        self.wv = linear("v_proj", kv_heads * head_dim, size, "out")
        self.wo = linear("o_proj", size, heads * head_dim, "in")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        q, k, v = (self._split(linear(x)) for linear in (self.wq, self.wk, self.wv))  # [T, H, D], [T, G, D], [T, G, D]
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        y = ops.attention(q, k, v, batch, self.layer, self.window)
        return self.wo(y.flatten(1))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim)

    def stages(self) -> tuple[tuple[Linear, ...], ...]:
        """Return the linear layers in the order of their inputs; those of one stage have the same input."""
        return (self.wq, self.wk, self.wv), (self.wo,)

    def slots(self) -> Iterator[Slot]:
        for linear in (self.wq, self.wk, self.wv, self.wo):
            yield from linear.slots()


class Experts(nn.Module):
    """E SwiGLU expert networks as three stacks of weights.

    Each rank holds a shard of the intermediate size of every expert.
    """

    def __init__(self, name: str, experts: int, size: int, inner: int, formats: Formats, group: Group) -> None:
        super().__init__()

        def stack(part: str, *shape: int) -> Packed:
            return formats("experts", f"{name}.0.{part}.weight").empty((experts, *shape))

        self.share = group.share(inner, "intermediate features")
        local = self.share.stop - self.share.start
        self.name, self.experts, self.size, self.inner, self.group = name, experts, size, inner, group
        self.gate = stack("w1", local, size)  # [E, f, d]
        self.up = stack("w3", local, size)  # [E, f, d]
        self.down = stack("w2", size, local)  # [E, d, f]

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return self.group.sum(ops.experts(x, self.gate, self.up, self.down, ids, scores))

    def slots(self) -> Iterator[Slot]:
        name = self.name
        wide, tall = (self.inner, self.size), (self.size, self.inner)
        for e in range(self.experts):
            yield _slot(f"{name}.{e}.w1", wide, (self.share, ALL), self.gate, e)
            yield _slot(f"{name}.{e}.w2", tall, (ALL, self.share), self.down, e)
            yield _slot(f"{name}.{e}.w3", wide, (self.share, ALL), self.up, e)


class Block(nn.Module):
    """A transformer layer with normalization first: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, name: str, attention: Attention, mlp: nn.Module, size: int, eps: float) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_norm = RMSNorm(f"{name}.input_layernorm", size, eps)
        self.mlp_norm = RMSNorm(f"{name}.post_attention_layernorm", size, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        x = ops.add(x, self.attention(self.attention_norm(x), cos, sin, batch))
        return ops.add(x, self.mlp(self.mlp_norm(x)))

    def slots(self) -> Iterator[Slot]:
        for module in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            yield from module.slots()  # type: ignore[operator]


@dataclass(frozen=True)
class Shape:
    """The sizes that all decoders have. They are those of the whole model, not of a shard."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float
    rope: _rope.Rope
    window: int | None
    tied: bool
    labels: tuple[str, ...] = ()
    """Class names of a sequence-classification head; empty for a language model."""


class Decoder(nn.Module):
    """A decoder: embedding, blocks, norm, and a head over the vocabulary or, with labels, over classes.

    ``model(batch)`` returns normalized hidden states [T, d]; ``model.logits(hidden)`` returns float32 scores [R, V], or
    [R, labels]. The class implements ``moesaic.engine.runner.Model``.
    """

    def __init__(
        self,
        shape: Shape,
        mlp: Callable[[str], nn.Module],
        formats: Formats,
        group: Group,
        dtype: torch.dtype,
    ) -> None:
        """Create a decoder with uninitialized weights.

        Args:
            shape: the sizes of the whole model.
            mlp: returns the feed-forward network of a layer, given the layer's name.
            formats: returns the format of each weight.
            group: the ranks that share the model.
            dtype: dtype of the activations.
        """
        super().__init__()
        self.shape, self.group, self.dtype = shape, group, dtype
        name = "model.embed_tokens"
        weight_format = formats("embedding", f"{name}.weight")
        self.embed = Embedding(name, shape.vocab_size, shape.hidden_size, weight_format, group, dtype)
        self.blocks = nn.ModuleList(self._block(layer, mlp, formats) for layer in range(shape.num_layers))
        self.norm = RMSNorm("model.norm", shape.hidden_size, shape.norm_eps)
        self.head = self._head(formats)
        self.frequencies: Tensor | None = None
        self.recordable = group.size == 1  # ranks that exchange results do more than call ops
        """Whether steps may be recorded and replayed. Without this, forward hooks see every step."""

    def _block(self, layer: int, mlp: Callable[[str], nn.Module], formats: Formats) -> Block:
        s, name = self.shape, f"model.layers.{layer}"
        sizes = (s.hidden_size, s.num_heads, s.num_kv_heads, s.head_dim, s.window)
        attention = Attention(f"{name}.self_attn", layer, *sizes, formats, self.group)
        return Block(name, attention, mlp(name), s.hidden_size, s.norm_eps)

    def _head(self, formats: Formats) -> Linear:
        name = "score" if self.shape.labels else "lm_head"
        weight_format = formats("head", f"{name}.weight")
        if self.shape.labels:  # too few rows to split over ranks
            return Linear(name, len(self.shape.labels), self.shape.hidden_size, weight_format, Group())
        head = Linear(name, self.shape.vocab_size, self.shape.hidden_size, weight_format, self.group, "out")
        if self.shape.tied:
            head.weight = self.embed.weight
        return head

    def forward(self, batch: Batch) -> Tensor:
        cos, sin = self.rotary_tables(batch.positions)
        x = self.embed(batch.tokens)
        for block in self.blocks:
            x = block(x, cos, sin, batch)
        return self.norm(x)  # type: ignore[no-any-return]

    def rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cos and sin [T, D/2] of the rotary angles at ``positions`` [T]."""
        if self.frequencies is None:  # not a buffer: it must stay float32 and off the meta device
            self.frequencies = self.shape.rope.frequencies(self.shape.head_dim).to(positions.device)
        return ops.rotary(self.frequencies, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 scores of hidden states [R, d]: logits [R, V] of tokens, or scores [R, labels] of classes."""
        scores: Tensor = self.head(hidden, torch.float32)
        return scores if self.shape.labels else self.group.gather(scores)

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a sequence, prompt and answer together."""
        return self.shape.max_length

    @property
    def window(self) -> int | None:
        """Largest attention window of any layer; None if a layer has no window."""
        return self.shape.window

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """(key/value heads, head size) of each layer's cache, for the shard that this rank holds."""
        return [(block.attention.kv_heads, block.attention.head_dim) for block in self.blocks]  # type: ignore[union-attr, misc]

    def slots(self) -> Iterator[Slot]:
        """Yield a slot for every tensor that a checkpoint of this model must have, in the order of the layers."""
        yield from self.embed.slots()
        for block in self.blocks:
            yield from block.slots()  # type: ignore[operator]
        yield from self.norm.slots()
        if self.shape.labels or not self.shape.tied:
            yield from self.head.slots()


def _copy(target: Tensor) -> Callable[[Tensor], None]:
    def store(tensor: Tensor) -> None:
        with torch.no_grad():
            target.copy_(tensor)

    return store


def _slot(
    name: str, shape: tuple[int, ...], index: tuple[slice, ...], weight: Packed, entry: int | None = None
) -> Slot:
    """Return the slot of a weight, or of ``entry`` in a stack of weights, which the layer ``name`` has."""
    store = functools.partial(ops.quantize, weight, index=entry)
    store_codes = functools.partial(ops.store_codes, weight, index=entry)
    return Slot(f"{name}.weight", shape, index, store, weight.format, store_codes, weight, entry)
