"""Hidden states of the calibration tokens, and their way through a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moesaic.models import Decoder
from moesaic.models._layers import Block
from moesaic.ops import Batch

CHUNK_TOKENS = 2048
"""Tokens that a layer computes at once, but at least one sequence."""


class _InputReached(Exception):
    """Ends a forward pass when the input of a module is known."""


@dataclass
class Chunk:
    """Some sequences of the calibration tokens, and their hidden states [T, d] before the next layer."""

    batch: Batch
    cos: Tensor
    sin: Tensor
    hidden: Tensor


def chunks(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[Chunk]:
    """Return the sequences in chunks, with the embeddings of their tokens as float32 hidden states."""
    groups: list[list[Sequence[int]]] = []
    for ids in sequences:
        if not groups or sum(map(len, groups[-1])) + len(ids) > CHUNK_TOKENS:
            groups.append([])
        groups[-1].append(ids)
    batches = [Batch.whole(group) for group in groups]
    return [Chunk(batch, *model.rotary_tables(batch.positions), model.embed(batch.tokens).float()) for batch in batches]


def inputs(module: nn.Module, run: Callable[[Chunk], object], state: Chunk) -> tuple[Tensor, ...]:
    """Return the arguments with which ``run`` calls ``module``; what follows this call is not computed."""
    found: list[tuple[Tensor, ...]] = []

    def stop(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments)
        raise _InputReached

    handle = module.register_forward_pre_hook(stop)
    try:
        run(state)
    except _InputReached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("the module was not called")


def attended(block: Block, state: Chunk) -> Tensor:
    """Return what the attention of a layer adds to the hidden states."""
    return block.attention(block.attention_norm(state.hidden), state.cos, state.sin, state.batch)  # type: ignore[no-any-return]


def fed_forward(block: Block, state: Chunk) -> Tensor:
    """Return what the feed-forward network of a layer adds to the hidden states."""
    return block.mlp(block.mlp_norm(state.hidden))  # type: ignore[no-any-return]


def advance(block: Block, states: Sequence[Chunk]) -> None:
    """Replace the hidden states by those after a layer whose weights are all quantized."""
    for state in states:
        state.hidden = state.hidden + attended(block, state)
        state.hidden = state.hidden + fed_forward(block, state)
