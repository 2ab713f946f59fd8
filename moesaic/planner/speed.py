"""How fast a model answers and reads prompts on a machine, estimated from bytes and operations.

A step takes as long as reading what it needs and multiplying it. Which experts it needs depends on the number of
tokens: of E experts, B tokens that each choose k touch E * (1 - (1 - k/E)^B) on average, if choices are even. No
kernel reaches the limits of its machine, so each is taken with the share that was measured: on processors the figures
of docs/results/kernels.json; for graphics cards a common share, since none has been measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.hardware import Host, Machine
from moesaic.model_sizes import ModelSizes, Weight, Weights

READING = (6.0, 11.0)
"""Tokens per second at which people read silently: 5 to 8 words a second, at 0.75 words a token."""

CARD_READ, CARD_MULTIPLY = 0.7, 0.6
"""Shares of a card's bandwidth and arithmetic that good kernels reach."""
CARD_LAYER_SECONDS, CARD_STEP_SECONDS = 12e-6, 300e-6
"""Time of a layer and of a step on a card that depends on neither bytes nor operations."""
REDUCE_SECONDS = {True: 12e-6, False: 40e-6}
"""Time in which cards add up a small result, two of which a layer needs: with NVLink, and over PCIe."""


@dataclass(frozen=True)
class Shares:
    """Shares of a processor's limits that the kernels reach with one instruction set.

    Attributes:
        read: share of the bandwidth by format, for one token.
        read_grouped: the same for formats with a float scale per group, as files of others hold them.
        multiply: share of the byte peak with integer formats, for a prompt.
        multiply_grouped: the same with formats that have a float scale per group.
        multiply_plain: share of the bfloat16 peak with unquantized weights.
        attention: share of the bandwidth when keys and values are read for one token of each sequence.
        attention_prompt: share of the bfloat16 peak in attention of a prompt.
    """

    read: Mapping[str, float]
    read_grouped: float
    multiply: float
    multiply_grouped: float
    multiply_plain: float
    attention: float
    attention_prompt: float


_AVX512 = Shares(
    {"int8": 0.98, "int4": 0.88, "int3": 0.85, "int2": 0.80, "bfloat16": 1.0, "float16": 0.9, "float32": 0.9},
    read_grouped=0.80,
    multiply=0.82,
    multiply_grouped=0.60,
    multiply_plain=0.53,
    attention=0.45,
    attention_prompt=0.30,
)
_AVX2 = Shares(
    {"int8": 0.95, "int4": 0.82, "int3": 0.57, "int2": 0.73, "bfloat16": 0.9, "float16": 0.8, "float32": 0.9},
    read_grouped=0.75,
    multiply=0.75,
    multiply_grouped=0.60,
    multiply_plain=0.6,
    attention=0.35,
    attention_prompt=0.25,
)
WIDE = ("avx512", "avx512bf16", "amx")
"""Instruction sets with vectors of 512 bits."""
LAYER_SECONDS, STEP_SECONDS, TOKEN_SECONDS = 15e-6, 250e-6, 60e-6
"""Time of a layer, of a step and of a drawn token on a processor that depends on neither bytes nor operations."""


@dataclass(frozen=True)
class Speed:
    """Expected speed.

    Attributes:
        batch: answers that run at the same time.
        context: tokens of each sequence.
        answer_tokens_s: generated tokens per second of all answers together.
        prompt_tokens_s: prompt tokens read per second, in a prompt of ``context`` tokens.
        first_token_s: seconds from a prompt of ``context`` tokens to its first token, on an idle machine.
    """

    batch: int
    context: int
    answer_tokens_s: float
    prompt_tokens_s: float
    first_token_s: float

    @property
    def per_answer(self) -> float:
        """Generated tokens per second of one answer."""
        return self.answer_tokens_s / self.batch

    @property
    def reading(self) -> str:
        """How an answer compares with reading: faster, as fast or slower."""
        slow, fast = READING
        return "faster" if self.per_answer > fast else "slower" if self.per_answer < slow else "as fast"


def experts_touched(experts: int, per_token: int, tokens: float) -> float:
    """Return the mean number of a layer's experts that ``tokens`` tokens choose, if choices are even."""
    missed: float = (1 - per_token / experts) ** tokens
    return experts * (1 - missed)


def estimate(
    sizes: ModelSizes,
    weights: Weights,
    machine: Machine,
    batch: int,
    context: int,
    *,
    cache_dtype: str = "auto",
    experts_on_host: bool = False,
) -> Speed:
    """Return the speed to expect of a model on a machine.

    Args:
        sizes: sizes of the model.
        weights: its weights in the formats that are used.
        machine: the machine; with several cards, the model is divided over all of them.
        batch: answers that run at the same time.
        context: tokens of each sequence.
        cache_dtype: dtype of the key/value cache.
        experts_on_host: whether the processor computes the experts, and cards the rest.
    """
    model = _Model(sizes, weights, sizes.cache_bytes_per_token(cache_dtype))
    step = _step_seconds(model, machine, batch, batch, context, experts_on_host)
    chunk = min(context, PROMPT_CHUNK)
    chunks = context / chunk
    prompt = chunks * _step_seconds(model, machine, chunk, 1, context / 2, experts_on_host)
    return Speed(batch, context, batch / step, context / prompt, prompt)


PROMPT_CHUNK = 512
"""Tokens of a prompt that a step reads; the engine's default."""


@dataclass(frozen=True)
class _Model:
    sizes: ModelSizes
    weights: Weights
    cache_bytes: int
    """Bytes of the keys and values of a token."""

    def read(self, group: Weight, tokens: int) -> float:
        """Return the bytes of a group of weights that a step of ``tokens`` tokens reads."""
        sizes = self.sizes
        if group.role == "experts":
            return group.nbytes * experts_touched(sizes.experts, sizes.experts_per_token, tokens) / sizes.experts
        return 0.0 if group.role == "embedding" and not sizes.shape.tied else group.nbytes

    def operations(self, group: Weight, tokens: int, sampled: int) -> float:
        """Return the operations of a group of weights in a step; only ``sampled`` tokens get logits."""
        sizes = self.sizes
        if group.role == "experts":
            return 2.0 * tokens * group.count * sizes.experts_per_token / sizes.experts
        if group.role in ("embedding", "head"):
            return 2.0 * sampled * group.count if group.role == "head" or sizes.shape.tied else 0.0
        return 2.0 * tokens * group.count

    def attention_operations(self, tokens: int, length: float) -> float:
        shape = self.sizes.shape
        return 4.0 * tokens * min(length, shape.window or length) * shape.num_heads * shape.head_dim * shape.num_layers

    def attention_bytes(self, sequences: int, length: float) -> float:
        return self.cache_bytes * sequences * min(length, self.sizes.shape.window or length)


def _step_seconds(
    model: _Model, machine: Machine, tokens: int, sequences: int, length: float, experts_on_host: bool
) -> float:
    """Return the duration of a step with ``tokens`` tokens of ``sequences`` sequences, each of ``length`` tokens."""
    groups = model.weights.groups
    if machine.card is None:
        assert machine.host is not None
        return _on_host(model, machine.host, groups, tokens, sequences, length)
    if experts_on_host:
        assert machine.host is not None
        outside = [group for group in groups if group.role == "experts"]
        rest = tuple(group for group in groups if group.role != "experts")
        seconds = sum(_matrix_on_host(model, machine.host, group, tokens, sequences) for group in outside)
        return seconds + _on_cards(model, machine, rest, tokens, sequences, length)
    return _on_cards(model, machine, groups, tokens, sequences, length)


def _on_host(
    model: _Model, host: Host, groups: tuple[Weight, ...], tokens: int, sequences: int, length: float
) -> float:
    shares = shares_of(host)
    seconds = sum(_matrix_on_host(model, host, group, tokens, sequences) for group in groups)
    seconds += _overlapped(
        model.attention_bytes(sequences, length) / (host.read_gb_s * 1e9 * shares.attention),
        model.attention_operations(tokens, length) / (host.bf16_gop_s * 1e9 * shares.attention_prompt),
    )
    return seconds + LAYER_SECONDS * model.sizes.shape.num_layers + STEP_SECONDS + TOKEN_SECONDS * sequences


def _matrix_on_host(model: _Model, host: Host, group: Weight, tokens: int, sequences: int) -> float:
    shares, name = shares_of(host), group.format.name
    read = shares.read.get(name, shares.read_grouped)
    if name in ("bfloat16", "float16", "float32"):
        peak = host.bf16_gop_s * shares.multiply_plain
    else:
        peak = host.int8_gop_s * (shares.multiply if name in shares.read else shares.multiply_grouped)
    return _overlapped(
        model.read(group, tokens) / (host.read_gb_s * 1e9 * read),
        model.operations(group, tokens, sequences) / (peak * 1e9),
    )


def _on_cards(
    model: _Model, machine: Machine, groups: tuple[Weight, ...], tokens: int, sequences: int, length: float
) -> float:
    card, cards, shape = machine.card, machine.cards, model.sizes.shape
    assert card is not None
    nbytes = sum(model.read(group, tokens) for group in groups) + model.attention_bytes(sequences, length)
    operations = sum(model.operations(group, tokens, sequences) for group in groups)
    operations += model.attention_operations(tokens, length)
    seconds = max(
        nbytes / (cards * card.read_gb_s * 1e9 * CARD_READ),
        operations / (cards * card.bf16_top_s * 1e12 * CARD_MULTIPLY),
    )
    seconds += CARD_LAYER_SECONDS * shape.num_layers + CARD_STEP_SECONDS
    if cards > 1:
        sent = 2 * tokens * shape.hidden_size * 2 * (cards - 1) / cards  # ring: each card sends this much for each sum
        seconds += 2 * shape.num_layers * (REDUCE_SECONDS[card.fast_link] + sent / (card.link_gb_s * 1e9))
    return seconds


def _overlapped(reading: float, multiplying: float) -> float:
    """Return the time of reading and multiplying, which overlap in part: the root of the sum of their squares."""
    return math.hypot(reading, multiplying)


def shares_of(host: Host) -> Shares:
    """Return the shares of the limits of a processor that the kernels reach on it."""
    return _AVX512 if host.instruction_set is None or host.instruction_set in WIDE else _AVX2
