"""What is asked of the engine, what it answers, and the state of one running sequence.

Knows the bounds of every sampling parameter. Does not know text, torch or time: prompts are token
ids, and ``Sampling.stop`` is carried only for the layer above that turns ids into text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moesaic.errors import InvalidParameter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_N = 8
MAX_LOGPROBS = 20
MAX_BIAS_ENTRIES = 300
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_TEMPERATURE = 100.0
GREEDY_BELOW = 1e-4
"""Under this temperature the largest logit has all the mass there is, so it is taken without drawing."""

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Every field is checked; the order in which they act is in ``sampler``.

    Raises:
        InvalidParameter: a field is out of range or of the wrong kind; ``param`` names it.
    """

    temperature: float = 1.0
    """Divides the logits; 0 (or below 1e-4) takes the likeliest token. At most 100."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the smallest set of tokens with this much mass (nucleus, arXiv:1904.09751); 0 < p <= 1."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest (arXiv:2407.01082); 0 <= p <= 1."""
    typical_p: float = 1.0
    """Only the mass p of tokens nearest to the expected surprise (arXiv:2202.00666); 0 < p <= 1."""
    repetition_penalty: float = 1.0
    """Divides (if positive, else multiplies) the logits of tokens in prompt or answer (arXiv:1909.05858); > 0."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit for each time that its token is in the answer; -2 .. 2."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that is in the answer; -2 .. 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; -100 .. 100, at most 300 entries."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; at most 16 of 1 .. 256 bytes. Heeded above the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the request's ``eos_ids``."""
    max_tokens: int | None = None
    """The most tokens to generate; None: as many as fit. Clipped to what the context has room for."""
    min_tokens: int = 0
    """No EOS and no stop id before this many tokens, unless a grammar leaves nothing else."""
    n: int = 1
    """How many answers; 1 .. 8."""
    seed: int | None = None
    """Makes the draws repeatable; a draw depends on the seed, the answer's index and its place alone."""
    logprobs: int | None = None
    """Report each token's log-probability and this many of the likeliest; 0 .. 20; None: nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; such a request does not read the prefix cache."""
    ignore_eos: bool = False
    """Generate past EOS, to the length asked for."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _integer("top_k", self.top_k, 0)
        for name in ("top_p", "typical_p"):
            _number(name, getattr(self, name), 0.0, 1.0, open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open=True)
        for name in ("frequency_penalty", "presence_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        _stops(self.stop)
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
        if not isinstance(self.ignore_eos, bool):
            raise InvalidParameter("ignore_eos", f"is {self.ignore_eos!r}, expected true or false")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without drawing."""
        return self.temperature < GREEDY_BELOW


def _number(name: str, value: Any, low: float, high: float, *, open: bool = False) -> None:
    """Raise unless ``value`` is a finite number in [low, high], or (low, high] where ``open``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidParameter(name, f"is {value!r}, expected a finite number")
    if value < low or value > high or (open and value == low):
        raise InvalidParameter(
            name, f"is {value!r}, expected {'more than' if open else 'at least'} {low:g} and at most {high:g}"
        )


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(name, f"is {value!r}, expected a whole number")
    if value < low or (high is not None and value > high):
        raise InvalidParameter(
            name, f"is {value}, expected {f'{low} to {high}' if high is not None else f'at least {low}'}"
        )


def _bias(bias: Any) -> dict[int, float]:
    """Return a copy, which nobody can change after it was checked."""
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIAS_ENTRIES:
        raise InvalidParameter("logit_bias", f"expected at most {MAX_BIAS_ENTRIES} pairs of token id and number")
    for id, value in bias.items():
        _integer("logit_bias", id, 0)
        _number("logit_bias", value, -100.0, 100.0)
    return dict(bias)


def _stops(stops: Any) -> None:
    if not isinstance(stops, tuple) or len(stops) > MAX_STOPS:
        raise InvalidParameter("stop", f"expected a tuple of at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES:
            raise InvalidParameter("stop", f"expected strings of 1 to {MAX_STOP_BYTES} bytes")


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    """Return token ids as a tuple; whether the model has them is checked where they are submitted."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InvalidParameter(name, f"is {ids!r}, expected token ids")
    out = tuple(ids)
    for id in out:
        _integer(name, id, 0)
    return out


def _answers(given: Any, n: int) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of at most ``n`` answers as tuples."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise InvalidParameter("resume", f"is {given!r}, expected the token ids of each answer")
    out = tuple(_ids("resume", ids) for ids in given)
    if len(out) > n:
        raise InvalidParameter("resume", f"has the tokens of {len(out)} answers, but n is {n}")
    return out


class Constraint(Protocol):
    """What one answer may say next: a grammar, and where in it the answer is.

    Each of a request's answers has its own, used by one thread at a time: the one that submits, which enters
    the tokens that the answer has already, then the engine's. It knows text, not ends: which ids
    end an answer is the request's affair (``Request.stop_ids``), a constraint says only when it may end.
    """

    def mask(self) -> NDArray[np.int32]:
        """Return the tokens that may come next: [V / 32, rounded up], token t is bit t % 32 of word t // 32.

        Raises:
            GrammarError: this cannot be found out; the answer ends with it.
        """

    def accept(self, id: int) -> None:
        """Enter the next token of the answer. Called once for each, but for the one that ends it. Never raises."""

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole as it stands."""

    @property
    def done(self) -> bool:
        """Whether it is whole and nothing can follow."""


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it.

    Raises:
        InvalidParameter: the prompt is empty, or something is not a token id.
    """

    ids: tuple[int, ...]
    """The prompt's token ids; at least one."""
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    """Ids that end an answer; all of generation_config.json's, not only the first."""
    priority: int = 0
    """The lower number goes first; first come, first served within one."""
    salt: str = ""
    """Requests with different salts share no cached prefix. One per tenant; set by the server, never by a client."""
    constraint: Callable[[], Constraint] | None = None
    """Makes what holds an answer to a grammar, one for each of the n; None: anything may be said."""
    resume: tuple[tuple[int, ...], ...] = ()
    """For each of the n answers, the tokens that it has already, as when it was begun elsewhere: they count as
    generated, and come again first. What follows is what would have, given the same seed and model."""
    finished: frozenset[int] = frozenset()
    """Indexes of answers that these tokens finish for a reason beyond the engine, such as a stop string: each ends
    behind them as if it had been cancelled there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _ids("prompt", self.ids))
        object.__setattr__(self, "eos_ids", _ids("eos_ids", self.eos_ids))
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        if not self.ids:
            raise InvalidParameter("prompt", "is empty; at least one token is needed")
        object.__setattr__(self, "resume", _answers(self.resume, self.sampling.n))

    def given(self, index: int) -> tuple[int, ...]:
        """Return the tokens that an answer has already."""
        return self.resume[index] if index < len(self.resume) else ()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends an answer."""
        eos = () if self.sampling.ignore_eos else self.eos_ids
        return frozenset((*eos, *self.sampling.stop_token_ids))


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    ``logprob`` and ``top`` are of the model's own distribution, before bias, penalties, grammar,
    temperature and truncation: under a grammar the likeliest may be tokens that it forbids. None and
    empty unless asked for, and of tokens that came with the request. ``top`` is ordered by falling
    probability, ties by lower id.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's tokens with their log-probabilities; the first token has none. Comes before any ``Token``."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. With reason "stop", ``stop_id`` is the last token, which was sent as a ``Token`` too."""

    reason: Reason
    stop_id: int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that were found in the prefix cache when the request was first admitted."""
    preemptions: int


Event = Token | PromptLogprobs | Done


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer on its way. ``scheduler`` owns and changes it; everybody else only reads.

    Sampling needs nothing beyond this: what is drawn next follows from ``seed``, ``index`` and
    ``ids``, so neither the company in a batch nor a preemption can change it.
    """

    request: Request
    index: int  # which of the request's n answers
    arrival: int  # order of submission
    seed: int
    limit: int  # most ids, prompt included
    ids: list[int]  # prompt, then what was generated
    digests: list[bytes]  # of the full blocks of ids, as far as computed
    leader: Sequence | None = None  # the first of the n answers, which computes the prompt for the others
    waiting_since: int = 0  # scheduler step
    cached: int = 0  # tokens whose keys and values are in the cache
    table: list[int] = field(default_factory=list)  # blocks in order; -1: given back
    gone: int = 0  # leading blocks given back
    published: int = 0  # leading blocks offered to the prefix cache
    hits: int | None = None  # prompt tokens found in the prefix cache when first admitted
    preemptions: int = 0
    aged: bool = False  # waited so long that nobody may pass it any more
    ended: bool = False
    primed: bool = False  # the whole prompt has been in the cache once
    prompt_logprobs: list[Token] = field(default_factory=list)
    constraint: Constraint | None = None  # at the end of ids: it moves when they grow, and only then
    begun: tuple[Event, ...] = ()  # the tokens that came with the request, and the end if they are all of the answer

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.ids)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - len(self.request.ids)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.ids) - self.cached

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted of this answer; the first of n reports them.

        Not of one that has tokens already: whoever has these was told before.
        """
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and self.index == 0 and not self.request.given(0)
