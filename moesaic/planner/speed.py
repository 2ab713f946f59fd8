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

import torch

from moesaic.formats._plain import Plain
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
    """What the kernels of one kind of processor make of its limits.

    Attributes:
        unpack: bytes of weights that are unpacked while the processor could do one operation on bytes, by format; it
            bounds reading where memory is faster. Unquantized weights are not unpacked.
        unpack_grouped: the same for formats with a float scale per group, as files of others hold them.
        multiply: share of the byte peak with integer formats, for a prompt.
        multiply_grouped: the same with formats that have a float scale per group.
        multiply_plain: share of the bfloat16 peak with unquantized weights.
        attention: share of the bfloat16 peak when one token of each sequence reads its keys and values, by the dtype of
            the cache.
        attention_prompt: share of the bfloat16 peak in attention of a prompt.
    """

    unpack: Mapping[str, float]
    unpack_grouped: float
    multiply: float
    multiply_grouped: float
    multiply_plain: float
    attention: Mapping[torch.dtype, float]
    attention_prompt: float


_ATTENTION = {torch.bfloat16: 0.09, torch.float16: 0.06, torch.float32: 0.035, torch.int8: 0.11}
_AVX512 = Shares(
    {"int8": 0.059, "int4": 0.053, "int3": 0.052, "int2": 0.050},
    unpack_grouped=0.046,
    multiply=0.82,
    multiply_grouped=0.60,
    multiply_plain=0.53,
    attention=_ATTENTION,
    attention_prompt=0.28,
)
_AVX2 = Shares(
    {"int8": 0.090, "int4": 0.079, "int3": 0.055, "int2": 0.071},
    unpack_grouped=0.065,
    multiply=0.75,
    multiply_grouped=0.60,
    multiply_plain=0.60,
    attention=_ATTENTION,
    attention_prompt=0.28,
)
READ, READ_SMALL = 0.95, 0.45
"""Shares of the measured bandwidth that kernels reach with weights, and ops with activations, such as norms."""
ACTIVATIONS = (20, 8)
"""Times that the ops of a layer read or write a token's hidden state, and the intermediate state of an expert."""
WIDE = ("avx512", "avx512bf16", "amx")
"""Instruction sets with vectors of 512 bits."""
LAYER_SECONDS, STEP_SECONDS, TOKEN_SECONDS = 50e-6, 700e-6, 60e-6
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
    dtype = sizes.spec.dtype if cache_dtype == "auto" else getattr(torch, cache_dtype)
    model = _Model(sizes, weights, dtype, sizes.cache_bytes_per_token(cache_dtype))
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
    cache_dtype: torch.dtype
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

    def activation_bytes(self, tokens: int) -> float:
        """Return the bytes of activations that the ops of all layers read and write."""
        sizes, (hidden, inner) = self.sizes, ACTIVATIONS
        used = max(1, sizes.experts_per_token)
        each = hidden * sizes.shape.hidden_size + inner * used * sizes.shape.intermediate_size
        return float(tokens * sizes.shape.num_layers * each * sizes.spec.dtype.itemsize)


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
    share = shares.attention[model.cache_dtype] if tokens == sequences else shares.attention_prompt
    seconds += _overlapped(
        model.attention_bytes(sequences, length) / (host.read_gb_s * 1e9 * READ),
        model.attention_operations(tokens, length) / (host.bf16_gop_s * 1e9 * share),
    )
    seconds += model.activation_bytes(tokens) / (host.read_gb_s * 1e9 * READ_SMALL)
    return seconds + LAYER_SECONDS * model.sizes.shape.num_layers + STEP_SECONDS + TOKEN_SECONDS * sequences


def _matrix_on_host(model: _Model, host: Host, group: Weight, tokens: int, sequences: int) -> float:
    shares, name = shares_of(host), group.format.name
    if isinstance(group.format, Plain):
        rate, peak = math.inf, host.bf16_gop_s * shares.multiply_plain
    else:
        rate = host.int8_gop_s * shares.unpack.get(name, shares.unpack_grouped)
        peak = host.int8_gop_s * (shares.multiply if name in shares.unpack else shares.multiply_grouped)
    return _overlapped(
        model.read(group, tokens) / (min(host.read_gb_s * READ, rate) * 1e9),
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
