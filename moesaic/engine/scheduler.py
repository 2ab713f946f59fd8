"""Which tokens of which sequences run in the next step.

A step is "run tokens [cached : cached + n] of these sequences". A decode is n = 1, a piece of a
long prompt is n = what the budget leaves, a recompute after preemption is cached = 0; all of them
share a step, so a long prompt never holds up the answers of others (continuous batching, Orca,
OSDI 2022; chunked prefill, arXiv:2308.16369; paged cache, arXiv:2309.06180).

The order, everywhere, is ``_rank``: those that waited out the patience, then by priority (the lower
number first), then by arrival. Whoever comes first in it can always run, if need be by preempting
all others; hence no deadlock, and with the patience no starvation. Preempted sequences give up
their blocks and are recomputed, as a rule from what the prefix cache still holds.

Knows sequences, blocks and numbers. Does not know tensors, time, threads or streams: the caller
makes sure that one thread at a time is in here. The clock is the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

from moesaic.engine import blocks as prefix
from moesaic.engine import growth
from moesaic.engine.blocks import Blocks
from moesaic.engine.request import Done, Event, PromptLogprobs, Request, Sequence, Token
from moesaic.errors import InvalidParameter, MoesaicError, Overloaded, PromptTooLong


@dataclass(frozen=True)
class Limits:
    """How much may run, and wait, at once.

    Raises:
        InvalidParameter: a step could not hold one token of each sequence, or a number is not positive.
    """

    batch_tokens: int = 512
    """Tokens in one step, prompts and answers together."""
    sequences: int = 64
    """Sequences that run at the same time."""
    queue: int = 256
    """Sequences that may wait; more are refused."""
    queue_tokens: int = 2**20
    """Prompt tokens that may wait; more are refused."""
    patience: int = 1000
    """Steps after which nobody may pass a waiting sequence any more, whatever the priority."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "sequences", "queue", "queue_tokens", "patience"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")
        if self.batch_tokens < self.sequences:
            why = f"is {self.batch_tokens}, but every one of {self.sequences} sequences needs a token in each step"
            raise InvalidParameter("batch_tokens", why)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [cached : cached + count] of one sequence."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of them is the sequence's newest, so that its logits give the next token."""
        return self.count == self.sequence.pending


@dataclass(frozen=True, slots=True)
class Step:
    """What runs together."""

    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step."""

    tokens: Mapping[Sequence, Listing[Token]]
    """New tokens, in order."""
    scores: Mapping[Sequence, Listing[Token]] = field(default_factory=dict)
    """Log-probabilities of the prompt's tokens cached + 1 .. cached + count, where they are wanted."""
    failed: frozenset[Sequence] = frozenset()
    """Sequences for which the model computed NaN or infinity."""
    refused: Mapping[Sequence, MoesaicError] = field(default_factory=dict)
    """Sequences whose grammar leaves no next token, and why."""


class Scheduler:
    """Holds every sequence from submission to its end. Call ``next``, run the step, ``commit``, and again."""

    def __init__(self, blocks: Blocks, limits: Limits, context: int, window: int | None = None) -> None:
        self.blocks, self.limits, self.window = blocks, limits, window
        self.steps = self.preemptions = self.hits = 0
        self._arrivals = 0
        self._waiting: dict[Sequence, None] = {}
        self._running: dict[Sequence, None] = {}
        # Between two give-backs a window's tokens touch at most this many blocks, one new token included.
        self._span = None if window is None else -(-(window - 1) // blocks.size) + 1
        slides = self._span is not None and self._span <= blocks.count
        self.capacity = context if slides else min(context, blocks.count * blocks.size)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def sequences(self) -> Iterable[Sequence]:
        """Return every sequence that has not ended."""
        return (*self._running, *self._waiting)

    def prepare(self, request: Request, seed: int) -> list[Sequence]:
        """Return the sequences of a request, one per answer, without queueing them. Changes nothing: needs no lock.

        Each has the tokens that the request brings along for it, and has ended if these are all of it.

        Raises:
            PromptTooLong: with one more token it would not fit the context, or the whole cache.
            InvalidParameter, GrammarError: an answer cannot have had these tokens, see ``growth.resume``.
        """
        prompt, sampling = len(request.ids), request.sampling
        if prompt + 1 > self.capacity:
            raise PromptTooLong(prompt, self.capacity - 1, "the context length, or the cache,")
        limit = self.capacity if sampling.max_tokens is None else min(self.capacity, prompt + sampling.max_tokens)
        digests: list[bytes] = []
        prefix.extend(digests, request.salt, request.ids, self.blocks.size)
        out: list[Sequence] = []
        for index in range(sampling.n):
            leader = next((other for other in out if not other.ended), None)
            sequence = Sequence(request, index, 0, seed, limit, list(request.ids), list(digests), leader)
            sequence.constraint = request.constraint() if request.constraint else None
            growth.resume(sequence)
            prefix.extend(sequence.digests, request.salt, sequence.ids, self.blocks.size)
            out.append(sequence)
        return out

    def add(self, sequences: Listing[Sequence]) -> None:
        """Queue what ``prepare`` returned, as far as it has not ended.

        Raises:
            Overloaded: the queue is full, by sequences or by prompt tokens.
        """
        sequences = [sequence for sequence in sequences if not sequence.ended]
        if len(self._waiting) + len(sequences) > self.limits.queue:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already: try again later")
        tokens = sum(sequence.prompt for sequence in (*self._waiting, *sequences))
        if self._waiting and tokens > self.limits.queue_tokens:
            raise Overloaded(f"prompts of {tokens} tokens would be waiting: try again later")
        for sequence in sequences:
            sequence.arrival = self._arrivals
            self._arrivals += 1
            self._wait(sequence)

    def next(self) -> Step | None:
        """Return what to run now; None if there is nothing to do."""
        self.steps += 1
        for sequence in self._waiting:
            sequence.aged |= self.steps - sequence.waiting_since >= self.limits.patience
        self._admit()
        runs = []
        budget = self.limits.batch_tokens
        order = sorted(self._running, key=_rank)
        for behind, sequence in zip(range(len(order) - 1, -1, -1), order, strict=True):
            if sequence not in self._running:  # preempted by one before it
                continue
            count = self._grow(sequence, min(sequence.pending, budget - behind))
            budget -= count
            if count:
                runs.append(Run(sequence, count))
        assert runs or not self._running, "sequences are running but none of them can"
        return Step(tuple(runs)) if runs else None

    def commit(self, step: Step, outcome: Outcome) -> list[tuple[Sequence, list[Event]]]:
        """Take in what came of ``step`` and return what to tell of it, in the order of the step."""
        out = []
        for run in step.runs:
            sequence = run.sequence
            if sequence.ended:  # cancelled or failed while the step ran
                continue
            self._score(sequence, outcome.scores.get(sequence, ()))
            sequence.cached += run.count
            sequence.primed |= sequence.cached >= sequence.prompt
            self._publish(sequence)
            events = self._accept(sequence, outcome.tokens.get(sequence, ()))
            if events:
                out.append((sequence, events))
        return out

    def cancel(self, sequence: Sequence) -> Done | None:
        """End a sequence at once, also while its step runs; None if it has ended already."""
        if sequence.ended:
            return None
        self._end(sequence)
        return growth.done(sequence, "cancelled")

    def fail(self, sequence: Sequence) -> list[int]:
        """End a sequence whose numbers are broken.

        Nothing that it held is found as a prefix again. Returns the blocks that nobody holds now:
        the caller wipes them before the next step.
        """
        if sequence.ended:
            return []
        for block in _held(sequence):
            self.blocks.forget(block)
        return self._end(sequence)

    # Admission

    def _admit(self) -> None:
        """Move waiting sequences to the running ones, in order, as far as seats, blocks and budget go."""
        while (sequence := self._first_waiting()) is not None:
            if not self._budget_for(sequence) or not self._make_way(sequence):
                return
            del self._waiting[sequence]
            self._running[sequence] = None
            self._enter(sequence)

    def _first_waiting(self) -> Sequence | None:
        ready = (s for s in self._waiting if s.leader is None or s.leader.primed or s.leader.ended)
        return min(ready, key=_rank, default=None)

    def _budget_for(self, sequence: Sequence) -> bool:
        """Return whether those before it leave it a share of a step; else it would only sit on blocks."""
        before = sum(other.pending for other in self._running if _rank(other) < _rank(sequence))
        return before < self.limits.batch_tokens

    def _make_way(self, sequence: Sequence) -> bool:
        """Return whether there is a seat and memory, after preempting whom a better priority may preempt."""
        while not self._fits(sequence):
            victim = max(self._running, key=_rank)
            if victim.aged or victim.request.priority <= sequence.request.priority:
                return False
            self._preempt(victim)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Return whether there is a seat, and room for all that it has and a little growth of the others.

        Without that margin a newcomer would take the last blocks, and be the first to be preempted.
        """
        if not self._running:
            return True
        if len(self._running) >= self.limits.sequences:
            return False
        found = self._found(sequence)
        reused = sum(self.blocks.is_idle(block) for block in found)
        fresh = self._lacking(sequence, len(found), 0)
        promised = sum(self._lacking(other, len(other.table), other.gone) for other in self._running)
        return self.blocks.available - reused >= fresh + promised + len(self._running)

    def _lacking(self, sequence: Sequence, blocks: int, gone: int) -> int:
        """Return how many more blocks its present ids need when it has ``blocks``, ``gone`` of them given back."""
        lacking = -(-len(sequence.ids) // self.blocks.size) - blocks
        if self._span is not None:
            step = -(-self.limits.batch_tokens // self.blocks.size)
            lacking = min(lacking, self._span + step - (blocks - gone))
        return max(0, lacking)

    def _found(self, sequence: Sequence) -> list[int]:
        """Return cached blocks with its prefix. Never all of its tokens: the last must run to give logits."""
        if sequence.scores_prompt and not sequence.generated:
            return []
        return self.blocks.find(sequence.digests[: (len(sequence.ids) - 1) // self.blocks.size])

    def _enter(self, sequence: Sequence) -> None:
        sequence.table = self._found(sequence)
        for block in sequence.table:
            self.blocks.share(block)
        sequence.published = len(sequence.table)
        sequence.cached = sequence.published * self.blocks.size
        if sequence.hits is None:
            sequence.hits = min(sequence.cached, sequence.prompt)
            self.hits += sequence.hits

    # Blocks

    def _grow(self, sequence: Sequence, count: int) -> int:
        """Take the blocks for the next ``count`` tokens, or for as many as there is room for; return how many.

        Only where there is no room for a single one are others preempted, the last in order first.
        The last one itself then sits out the step, its work kept.
        """
        self._give_back(sequence)
        while (room := self._room(sequence)) == 0:
            victim = max(self._running, key=_rank)
            if victim is sequence:
                return 0
            self._preempt(victim)
        count = min(count, room)
        while len(sequence.table) * self.blocks.size < sequence.cached + count:
            sequence.table.append(self.blocks.take())
        return count

    def _room(self, sequence: Sequence) -> int:
        return (len(sequence.table) + self.blocks.available) * self.blocks.size - sequence.cached

    def _give_back(self, sequence: Sequence) -> None:
        """Drop leading blocks that no coming token sees: the next one, at ``cached``, sees cached - window + 1 on."""
        if self.window is None:
            return
        while (sequence.gone + 1) * self.blocks.size <= sequence.cached - self.window + 1:
            self.blocks.drop(sequence.table[sequence.gone])
            sequence.table[sequence.gone] = -1
            sequence.gone += 1

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that have become full."""
        full = sequence.cached // self.blocks.size
        if len(sequence.digests) < full:
            prefix.extend(sequence.digests, sequence.request.salt, sequence.ids[: sequence.cached], self.blocks.size)
        for place in range(sequence.published, full):
            self.blocks.publish(sequence.table[place], sequence.digests[place])
        sequence.published = full

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        del self._running[sequence]
        sequence.preemptions += 1
        self.preemptions += 1
        self._wait(sequence)

    def _release(self, sequence: Sequence) -> list[int]:
        """Drop all blocks, the last first: a prefix is of more use than what follows it. Return those now unheld."""
        unheld = [block for block in reversed(_held(sequence)) if self.blocks.drop(block)]
        sequence.table = []
        sequence.cached = sequence.gone = sequence.published = 0
        return unheld

    # Life and death

    def _wait(self, sequence: Sequence) -> None:
        sequence.waiting_since = self.steps
        self._waiting[sequence] = None

    def _score(self, sequence: Sequence, scores: Listing[Token]) -> None:
        """Keep the prompt's log-probabilities; after a preemption the first ones come again and are skipped."""
        known = len(sequence.prompt_logprobs) - sequence.cached
        sequence.prompt_logprobs.extend(scores[max(0, known) :])

    def _accept(self, sequence: Sequence, tokens: Listing[Token]) -> list[Event]:
        events: list[Event] = []
        if tokens and sequence.scores_prompt and not sequence.generated:
            first = Token(sequence.request.ids[0])
            events.append(PromptLogprobs((first, *sequence.prompt_logprobs)))
        for token in tokens:
            events.append(token)
            if done := growth.grow(sequence, token.id):
                self._end(sequence)
                events.append(done)
                break
        return events

    def _end(self, sequence: Sequence) -> list[int]:
        sequence.ended = True
        self._waiting.pop(sequence, None)
        self._running.pop(sequence, None)
        return self._release(sequence)


def _rank(sequence: Sequence) -> tuple[bool, int, int]:
    """The smaller goes first."""
    return (not sequence.aged, 0 if sequence.aged else sequence.request.priority, sequence.arrival)


def _held(sequence: Sequence) -> list[int]:
    return [block for block in sequence.table if block >= 0]
