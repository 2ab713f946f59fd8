"""Requests, events, and the state of one running sequence.

This module validates every sampling parameter. It does not depend on text, torch or time: prompts are token ids, and
``Sampling.stop`` is only passed on to the layer that converts ids to text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moesaic.errors import InvalidParameter

if TYPE_CHECKING:  # importing numpy takes longer than a command needs to print its help
    import numpy as np
    from numpy.typing import NDArray

    from moesaic.engine.drafter import Drafter

MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIAS_ENTRIES = 300
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_BAD_WORDS = 256
MAX_TEMPERATURE = 100.0
GREEDY_BELOW = 1e-4
"""Below this temperature the largest logit has all the probability mass, so sampling is greedy."""

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. ``sampler`` documents the order in which they are applied.

    Raises:
        InvalidParameter: a field is out of range or has the wrong type; ``param`` names it.
    """

    temperature: float = 1.0
    """Divides the logits; 0 (or less than 1e-4) selects the likeliest token. At most 100."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep only the fewest likeliest tokens that reach probability p (nucleus sampling, arXiv:1904.09751); 0 < p <=
    1."""
    min_p: float = 0.0
    """Keep only tokens at least p times as likely as the likeliest (arXiv:2407.01082); 0 <= p <= 1."""
    typical_p: float = 1.0
    """Keep only the tokens whose -log probability is nearest to the entropy, with total probability p (typical
    sampling, arXiv:2202.00666); 0 < p <= 1."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies others, of the tokens in prompt or answer (arXiv:1909.05858);
    more than 0, at most 100; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit for each occurrence of its token in the answer; -2 .. 2."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the answer; -2 .. 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Number to add to the logit of each of these token ids; -100 .. 100, at most 300 entries."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; at most 16 of 1 .. 256 bytes. The engine ignores them; ``Reply`` finds them in the
    text."""
    bad_words: tuple[str, ...] = ()
    """Words that the answer must not have as whole tokens, with or without a space in front; at most 256 of 1 .. 256
    bytes. The engine ignores them; ``LLM.submit`` turns them into ``Request.forbidden``."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only token ids that may be generated, stop ids included; None: all."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, in addition to the request's ``eos_ids``."""
    max_tokens: int | None = None
    """Maximum number of tokens to generate; None: up to the context length, which always limits it."""
    min_tokens: int = 0
    """Minimum number of tokens before EOS or a stop id, unless a grammar allows nothing else."""
    n: int = 1
    """Number of answers; 1 .. 128."""
    seed: int | None = None
    """Seed of the random draws. A draw depends only on the seed, the index of the answer and the position in the
    answer. None: a random seed."""
    logprobs: int | None = None
    """Report the log-probability of each token and this number of likeliest tokens beside it; 0 .. 20; None: off."""
    prompt_logprobs: int | None = None
    """Like ``logprobs``, for the tokens of the prompt. Such a request does not read the prefix cache, except before
    ``Request.prompt_logprobs_start``."""
    ignore_eos: bool = False
    """Continue after EOS, up to the maximum length."""
    speculation: bool = True
    """Whether the engine may propose tokens and verify several in a step, if it is loaded with speculation. Answers do
    not depend on it. Those with a grammar are never speculated."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _integer("top_k", self.top_k, 0)
        for name in ("top_p", "typical_p"):
            _number(name, getattr(self, name), 0.0, 1.0, exclusive=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, exclusive=True)
        for name in ("frequency_penalty", "presence_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        _strings("stop", self.stop, MAX_STOPS)
        _strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        _integer("min_tokens", self.min_tokens, 0)
        _integer("n", self.n, 1, MAX_N)
        self._check_optional()

    def _check_optional(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidParameter("min_tokens", f"{self.min_tokens} is more than max_tokens, {self.max_tokens}")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise InvalidParameter("allowed_token_ids", "is empty; at least one token is needed")
        for name in ("ignore_eos", "speculation"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameter(name, f"is {getattr(self, name)!r}, expected true or false")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without drawing."""
        return self.temperature < GREEDY_BELOW


def _number(name: str, value: Any, low: float, high: float, *, exclusive: bool = False) -> None:
    """Raise InvalidParameter unless ``value`` is a finite number in [low, high], or in (low, high] if ``exclusive``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidParameter(name, f"is {value!r}, expected a finite number")
    if value < low or value > high or (exclusive and value == low):
        raise InvalidParameter(
            name, f"is {value!r}, expected {'more than' if exclusive else 'at least'} {low:g} and at most {high:g}"
        )


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(name, f"is {value!r}, expected a whole number")
    if value < low or (high is not None and value > high):
        raise InvalidParameter(
            name, f"is {value}, expected {f'{low} to {high}' if high is not None else f'at least {low}'}"
        )


def _bias(bias: Any) -> dict[int, float]:
    """Return a checked copy of ``Sampling.logit_bias``, which the caller of ``Sampling`` cannot change later."""
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIAS_ENTRIES:
        raise InvalidParameter("logit_bias", f"expected at most {MAX_BIAS_ENTRIES} pairs of token id and number")
    for token_id, value in bias.items():
        _integer("logit_bias", token_id, 0)
        _number("logit_bias", value, -100.0, 100.0)
    return dict(bias)


def _strings(name: str, strings: Any, most: int) -> None:
    if not isinstance(strings, tuple) or len(strings) > most:
        raise InvalidParameter(name, f"expected a tuple of at most {most} strings")
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES:
            raise InvalidParameter(name, f"expected strings of 1 to {MAX_STOP_BYTES} bytes")


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    """Return ``ids`` as a tuple; raise InvalidParameter for the argument ``name`` if they are not token ids.

    ``Engine.submit`` checks that the model's vocabulary has them.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InvalidParameter(name, f"is {ids!r}, expected a list of token ids")
    out = tuple(ids)
    for token_id in out:
        _integer(name, token_id, 0)
    return out


def _answers(value: Any, n: int) -> tuple[tuple[int, ...], ...]:
    """Return the value of ``Request.resume`` as tuples; raise InvalidParameter if it has more than ``n`` answers."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidParameter("resume", f"is {value!r}, expected the token ids of each answer")
    out = tuple(_ids("resume", ids) for ids in value)
    if len(out) > n:
        raise InvalidParameter("resume", f"has the tokens of {len(out)} answers, but n is {n}")
    return out


class Constraint(Protocol):
    """A grammar, and the position of one answer in it.

    Each answer of a request has its own constraint, used by one thread at a time: first the submitting thread, which
    enters the tokens that the answer already has, then the engine's thread. A constraint covers text only.
    ``Request.stop_ids`` names the ids that end an answer; the constraint says when the answer may end.
    """

    def mask(self) -> NDArray[np.int32]:
        """Return the allowed next tokens as a bit mask: token t is bit t % 32 of word t // 32.

        The mask has a word of 32 bits for each 32 tokens of the vocabulary, rounded up.

        Raises:
            GrammarError: the mask cannot be computed; the answer ends with this error.
        """

    def accept(self, token_id: int) -> None:
        """Advance the grammar by ``token_id``, the next token of the answer.

        The engine calls it for every token except a stop id. It must not raise.
        """

    @property
    def may_end(self) -> bool:
        """Whether the answer so far is complete, so that a stop id may follow."""

    @property
    def done(self) -> bool:
        """Whether the answer so far is complete, and the grammar allows no further token."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    Raises:
        InvalidParameter: the prompt is empty, or a value is not a token id.
    """

    ids: tuple[int, ...]
    """Token ids of the prompt; at least one."""
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    """Token ids that end an answer: all EOS ids of generation_config.json."""
    priority: int = 0
    """Lower numbers run first; requests of equal priority run in the order of arrival."""
    salt: str = ""
    """Requests share cached prefixes only if their salts are equal. The server sets one per tenant; a client cannot."""
    constraint: Callable[[], Constraint] | None = None
    """Function that creates the constraint (grammar) of each of the n answers; None: no grammar."""
    resume: tuple[tuple[int, ...], ...] = ()
    """Tokens that each of the n answers already has, for example from another process. They count as generated and
    are the first tokens of the answer's stream. With the same seed and model, the continuation is the same as in one
    uninterrupted run."""
    finished: frozenset[int] = frozenset()
    """Indexes of answers that ended after their tokens in ``resume`` for a reason outside the engine, such as a stop
    string. Each ends with the reason "cancelled"."""
    forbidden: Callable[[Listing[int]], Collection[int]] | None = None
    """Function that returns the token ids that must not follow the generated tokens that it gets. It depends on nothing
    else. None: none is forbidden."""
    prompt_logprobs_start: int = 0
    """With ``Sampling.prompt_logprobs``: index of the first prompt token whose log-probability is computed. Tokens
    before it get none, so that their keys and values may come from the prefix cache. The first token never has one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _ids("prompt", self.ids))
        object.__setattr__(self, "eos_ids", _ids("eos_ids", self.eos_ids))
        _integer("prompt_logprobs_start", self.prompt_logprobs_start, 0)
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        if not self.ids:
            raise InvalidParameter("prompt", "is empty; at least one token is needed")
        object.__setattr__(self, "resume", _answers(self.resume, self.sampling.n))

    def resumed_tokens(self, index: int) -> tuple[int, ...]:
        """Return the token ids that ``resume`` has for answer ``index``; empty if it has none."""
        return self.resume[index] if index < len(self.resume) else ()

    @property
    def masked(self) -> bool:
        """Whether answers have forbidden tokens, so that ``grammar_masks`` computes a mask for each next token."""
        return not (self.constraint is None and self.forbidden is None and self.sampling.allowed_token_ids is None)

    @cached_property
    def allowed_ids(self) -> NDArray[np.int64] | None:
        """``Sampling.allowed_token_ids`` as an array; None if all are allowed."""
        import numpy as np  # a command that prints its help does without

        ids = self.sampling.allowed_token_ids
        return None if ids is None else np.array(ids, dtype=np.int64)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends an answer."""
        eos = () if self.sampling.ignore_eos else self.eos_ids
        return frozenset((*eos, *self.sampling.stop_token_ids))


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    ``logprob`` is its log-probability, and ``top`` has (token id, log-probability) of the likeliest tokens at its
    position. Both describe the distribution of the model before bias, penalties, grammar, temperature and
    truncation, so ``top`` may contain tokens that a grammar forbids. They are None and empty unless requested, and for
    tokens that came with the request. ``top`` is sorted by descending probability, then by id.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Tokens of the prompt with log-probabilities. The first has none, and neither have those before
    ``Request.prompt_logprobs_start``. This event comes before any ``Token``."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. ``stop_id`` is the stop id that ended it, which was also sent as a ``Token``, or None."""

    reason: Reason
    stop_id: int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache when the request was first admitted."""
    preemptions: int


Event = Token | PromptLogprobs | Done


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one unfinished answer. Only ``scheduler`` and ``finish`` change it.

    The next random draw depends only on ``seed``, ``index`` and ``ids``, so neither the other sequences of a batch nor
    a preemption can change it.
    """

    request: Request
    index: int  # index among the n answers of the request
    arrival: int  # order of submission
    seed: int
    limit: int  # maximum length of ids
    ids: list[int]  # prompt and generated tokens
    digests: list[bytes]  # prefix digests of full blocks, possibly not of all
    leader: Sequence | None = None  # the answer of the same request that computes the prompt for the others
    waiting_since: int = 0  # step of the scheduler
    cached: int = 0  # tokens whose keys and values are in the cache
    table: list[int] = field(default_factory=list)  # blocks in order; -1: freed
    freed_blocks: int = 0  # leading blocks that were freed
    published: int = 0  # leading blocks published in the prefix cache
    cached_prompt_tokens: int | None = None  # set when first admitted
    preemptions: int = 0
    aged: bool = False  # waited for Limits.aging_steps, so that its priority is the highest
    ended: bool = False
    prefilled: bool = False  # the whole prompt has been computed at least once
    prompt_logprobs: list[Token] = field(default_factory=list)
    constraint: Constraint | None = None  # always at the end of ids
    resumed_events: tuple[Event, ...] = ()  # tokens that came with the request, and Done if they end the answer
    drafter: Drafter | None = None  # proposes tokens; None until it first does
    unspeculated: bool = False  # a step with proposals had NaN or infinity, so that no more are made

    @property
    def prompt(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.request.ids)

    @property
    def generated(self) -> int:
        """Number of tokens of the answer so far, including those that came with the request."""
        return len(self.ids) - len(self.request.ids)

    @property
    def pending(self) -> int:
        """Number of tokens whose keys and values are not in the cache yet."""
        return len(self.ids) - self.cached

    @property
    def scores_prompt(self) -> bool:
        """Whether this answer reports log-probabilities of the prompt.

        The first of the n answers of a request does, unless it is resumed. The client of a resumed answer already has
        them.
        """
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and self.index == 0 and not self.request.resumed_tokens(0)

    @property
    def first_scored(self) -> int:
        """Index of the first prompt token that gets a log-probability, if ``scores_prompt``; at most ``prompt``."""
        return min(max(1, self.request.prompt_logprobs_start), self.prompt)
