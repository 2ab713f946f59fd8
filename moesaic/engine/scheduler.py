"""The scheduler: decides which tokens of which sequences run in the next step.

A step is "run tokens [cached : cached + n] of these sequences". Decoding is n = 1; for a chunk of a long prompt, n is
the rest of the budget; recomputation after a preemption starts at cached = 0. All of them share a step, so a long
prompt does not delay the answers of others (continuous batching, Orca, OSDI 2022; chunked prefill, arXiv:2308.16369;
paged cache, arXiv:2309.06180).

``_rank`` defines the order: aged sequences first, then by priority (the lower number first), then by arrival. The first
sequence in this order can always run, if necessary by preempting all others, so there is no deadlock. Aging prevents
starvation. Preempted sequences free their blocks and are recomputed, usually from the prefix cache.

This module handles sequences, blocks and numbers. It does not depend on tensors, time, threads or streams. The caller
lets only one thread at a time use it. Its clock is the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from moesaic.engine import blocks as prefix
from moesaic.engine import finish
from moesaic.engine.blocks import Blocks
from moesaic.engine.request import Done, Event, PromptLogprobs, Request, Sequence, Token
from moesaic.engine.speculation import Proposer
from moesaic.engine.step import Outcome, Run, Step
from moesaic.errors import InvalidParameter, Overloaded, PromptTooLong


@dataclass(frozen=True)
class Limits:
    """Limits on what may run and wait at the same time.

    Raises:
        InvalidParameter: a step could not hold one token of each sequence, or a number is not positive.
    """

    batch_tokens: int = 512
    """Maximum tokens in one step, of prompts and answers together."""
    sequences: int = 64
    """Maximum sequences that run at the same time."""
    queue: int = 256
    """Maximum waiting sequences; more are rejected."""
    queue_tokens: int = 2**20
    """Maximum prompt tokens of waiting sequences; more are rejected."""
    aging_steps: int = 1000
    """Steps after which a waiting sequence ranks first, regardless of its priority."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "sequences", "queue", "queue_tokens", "aging_steps"):
            if getattr(self, name) < 1:
                raise InvalidParameter(name, f"is {getattr(self, name)}, expected at least 1")
        if self.batch_tokens < self.sequences:
            why = f"is {self.batch_tokens}, but each of {self.sequences} sequences needs a token in each step"
            raise InvalidParameter("batch_tokens", why)


class Scheduler:
    """Owner of all unfinished sequences. In a loop, call ``schedule``, run the step, and call ``update``.

    ``context`` is the maximum number of tokens of a sequence. ``window`` is the model's attention window in tokens, or
    None. ``proposer`` proposes tokens; None: there is no speculation.
    """

    def __init__(
        self,
        blocks: Blocks,
        limits: Limits,
        context: int,
        window: int | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        self.blocks, self.limits, self.window, self._proposer = blocks, limits, window, proposer
        self.steps = self.preemptions = self.cached_prompt_tokens = self.proposed = self.accepted = 0
        self._arrivals = 0
        self._waiting: dict[Sequence, None] = {}
        self._running: dict[Sequence, None] = {}
        # The maximum number of blocks that a window touches, including one new token.
        self._window_blocks = None if window is None else -(-(window - 1) // blocks.size) + 1
        slides = self._window_blocks is not None and self._window_blocks <= blocks.count
        self.capacity = context if slides else min(context, blocks.count * blocks.size)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def sequences(self) -> Iterable[Sequence]:
        """Return all sequences that have not ended."""
        return (*self._running, *self._waiting)

    def prepare(self, request: Request, seed: int) -> list[Sequence]:
        """Return the sequences of a request, one per answer, without queueing them. Needs no lock.

        ``seed`` is the seed of their random draws. A sequence includes its tokens of ``request.resume``, and may have
        ended with them.

        Raises:
            PromptTooLong: the prompt and one more token exceed the context, or the whole cache.
            InvalidParameter, GrammarError: the tokens of an answer are impossible; ``finish.resume`` has the cases.
        """
        prompt, sampling = len(request.ids), request.sampling
        if prompt + 1 > self.capacity:
            raise PromptTooLong(prompt, self.capacity - 1)
        limit = self.capacity if sampling.max_tokens is None else min(self.capacity, prompt + sampling.max_tokens)
        digests: list[bytes] = []
        prefix.extend(digests, request.salt, request.ids, self.blocks.size)
        out: list[Sequence] = []
        for index in range(sampling.n):
            leader = next((other for other in out if not other.ended), None)
            sequence = Sequence(request, index, 0, seed, limit, list(request.ids), list(digests), leader)
            sequence.constraint = request.constraint() if request.constraint else None
            finish.resume(sequence)
            prefix.extend(sequence.digests, request.salt, sequence.ids, self.blocks.size)
            out.append(sequence)
        return out

    def add(self, sequences: Listing[Sequence]) -> None:
        """Queue those sequences from ``prepare`` that have not ended.

        Raises:
            Overloaded: too many sequences or prompt tokens are waiting.
        """
        sequences = [sequence for sequence in sequences if not sequence.ended]
        if len(self._waiting) + len(sequences) > self.limits.queue:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting already (limit {self.limits.queue}): try again later"
            )
        tokens = sum(sequence.prompt for sequence in (*self._waiting, *sequences))
        if self._waiting and tokens > self.limits.queue_tokens:
            raise Overloaded(
                f"the waiting prompts would have {tokens} tokens, limit {self.limits.queue_tokens}: try again later"
            )
        for sequence in sequences:
            sequence.arrival = self._arrivals
            self._arrivals += 1
            self._wait(sequence)

    def schedule(self) -> Step | None:
        """Choose the tokens of the next step, allocate their blocks, and return the step; None if nothing is to do."""
        self.steps += 1
        for sequence in self._waiting:
            sequence.aged |= self.steps - sequence.waiting_since >= self.limits.aging_steps
        self._admit()
        runs = []
        budget = self.limits.batch_tokens
        order = sorted(self._running, key=_rank)
        for behind, sequence in zip(range(len(order) - 1, -1, -1), order, strict=True):
            if sequence not in self._running:  # preempted by an earlier one
                continue
            count = self._allocate(sequence, min(sequence.pending, budget - behind))
            budget -= count
            if count:
                runs.append(Run(sequence, count))
        assert runs or not self._running, "sequences are running but none of them can"
        return Step(tuple(self._speculate(runs))) if runs else None

    def update(self, step: Step, outcome: Outcome) -> list[tuple[Sequence, list[Event]]]:
        """Apply the results of ``step`` and return the events of each sequence, in the order of the step."""
        out = []
        for run in step.runs:
            sequence = run.sequence
            if sequence.ended:  # cancelled or failed while the step ran
                continue
            tokens = outcome.tokens.get(sequence, ())
            if run.proposals and not tokens:  # NaN or infinity: run the token again without proposals
                sequence.unspeculated = True
                self._drop_unused(sequence)
                continue
            self._append_scores(sequence, outcome.scores.get(sequence, ()))
            sequence.cached += run.count - len(run.proposals)
            sequence.prefilled |= sequence.cached >= sequence.prompt
            self._publish(sequence)
            self._observe(run, tokens)
            events = self._append_tokens(sequence, tokens)
            self._drop_unused(sequence)
            if events:
                out.append((sequence, events))
        return out

    def cancel(self, sequence: Sequence) -> Done | None:
        """End a sequence at once, even while its step runs; return its last event, or None if it had ended already."""
        if sequence.ended:
            return None
        self._end(sequence)
        return finish.done_event(sequence, "cancelled")

    def fail(self, sequence: Sequence) -> list[int]:
        """End a sequence for which the model computed NaN or infinity.

        Its blocks are removed from the prefix cache. Return those that no other sequence references; the caller must
        wipe them before the next step.
        """
        if sequence.ended:
            return []
        for block in _held_blocks(sequence):
            self.blocks.forget(block)
        return self._end(sequence)

    # Speculation

    def _speculate(self, runs: Listing[Run]) -> Listing[Run]:
        """Return ``runs`` with proposals, if all sequences only decode.

        Beside prompts, proposals would delay these. They use what other runs left of budget and free blocks.
        """
        if self._proposer is None or not Step(tuple(runs)).decodes:
            return runs
        budget = self.limits.batch_tokens - len(runs)
        proposed = self._proposer.propose([run.sequence for run in runs], budget)
        return [self._with_proposals(run, proposed.get(run.sequence, ())) for run in runs]

    def _with_proposals(self, run: Run, proposals: tuple[int, ...]) -> Run:
        """Allocate blocks for the proposals of ``run``, or for fewer if memory is short; return the run with them."""
        sequence = run.sequence
        room = min(self._capacity_for(sequence) - run.count, sequence.limit - len(sequence.ids) - 1)
        proposals = proposals[: max(0, room)]
        if not proposals or sequence.unspeculated:
            return run
        self._take_blocks(sequence, run.count + len(proposals))
        return Run(sequence, run.count + len(proposals), proposals)

    def _observe(self, run: Run, tokens: Listing[Token]) -> None:
        if self._proposer is not None and tokens:
            self.proposed += len(run.proposals)
            self.accepted += len(tokens) - 1
            self._proposer.observe(run.sequence, [token.id for token in tokens])

    # Admission

    def _admit(self) -> None:
        """Start waiting sequences in order, within the limits on sequences, blocks and the token budget."""
        while (sequence := self._first_waiting()) is not None:
            if not self._budget_for(sequence) or not self._make_room(sequence):
                return
            del self._waiting[sequence]
            self._running[sequence] = None
            self._start(sequence)

    def _first_waiting(self) -> Sequence | None:
        ready = (s for s in self._waiting if s.leader is None or s.leader.prefilled or s.leader.ended)
        return min(ready, key=_rank, default=None)

    def _budget_for(self, sequence: Sequence) -> bool:
        """Return whether the running sequences that rank before ``sequence`` leave it tokens in a step.

        If they do not, it would occupy blocks without running.
        """
        before = sum(other.pending for other in self._running if _rank(other) < _rank(sequence))
        return before < self.limits.batch_tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt running sequences of lower priority until ``sequence`` can run; return whether it can."""
        while not self._fits(sequence):
            victim = max(self._running, key=_rank)
            if victim.aged or victim.request.priority <= sequence.request.priority:
                return False
            self._preempt(victim)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Return whether ``sequence`` can run, with blocks for it and for the growth of the running sequences.

        Without blocks for that growth, a new sequence would take the last blocks and would be preempted first.
        """
        if not self._running:
            return True
        if len(self._running) >= self.limits.sequences:
            return False
        cached = self._cached_blocks(sequence)
        reused = sum(self.blocks.is_idle(block) for block in cached)
        fresh = self._missing_blocks(sequence, len(cached), 0)
        promised = sum(self._missing_blocks(other, len(other.table), other.freed_blocks) for other in self._running)
        return self.blocks.available - reused >= fresh + promised + len(self._running)

    def _missing_blocks(self, sequence: Sequence, blocks: int, freed_blocks: int) -> int:
        """Return the number of blocks that ``sequence`` still needs for its ids.

        It has ``blocks`` blocks already, of which the first ``freed_blocks`` have left the window and were freed.
        """
        missing = -(-len(sequence.ids) // self.blocks.size) - blocks
        if self._window_blocks is not None:
            step = -(-self.limits.batch_tokens // self.blocks.size)
            missing = min(missing, self._window_blocks + step - (blocks - freed_blocks))
        return max(0, missing)

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Return the blocks of the prefix cache that ``sequence`` can use.

        They never include its last token, which must run to give logits. If log-probabilities of the prompt are still
        to be computed, they do not include the token before the first of these either, for the same reason.
        """
        scoring = sequence.scores_prompt and not sequence.generated
        usable = (sequence.first_scored if scoring else len(sequence.ids)) - 1
        return self.blocks.find(sequence.digests[: usable // self.blocks.size])

    def _start(self, sequence: Sequence) -> None:
        sequence.table = self._cached_blocks(sequence)
        for block in sequence.table:
            self.blocks.share(block)
        sequence.published = len(sequence.table)
        sequence.cached = sequence.published * self.blocks.size
        if sequence.cached_prompt_tokens is None:
            sequence.cached_prompt_tokens = min(sequence.cached, sequence.prompt)
            self.cached_prompt_tokens += sequence.cached_prompt_tokens

    # Blocks

    def _allocate(self, sequence: Sequence, count: int) -> int:
        """Allocate blocks for the next ``count`` tokens of ``sequence``, or for fewer if memory is short.

        Return the number of tokens that have blocks. Other sequences are preempted, the last in order first, only if
        there is no room for a single token. If ``sequence`` is the last one, it skips the step and keeps its blocks.
        """
        self._free_outside_window(sequence)
        while (room := self._capacity_for(sequence)) == 0:
            victim = max(self._running, key=_rank)
            if victim is sequence:
                return 0
            self._preempt(victim)
        count = min(count, room)
        self._take_blocks(sequence, count)
        return count

    def _take_blocks(self, sequence: Sequence, count: int) -> None:
        while len(sequence.table) * self.blocks.size < sequence.cached + count:
            sequence.table.append(self.blocks.take())

    def _drop_unused(self, sequence: Sequence) -> None:
        """Drop the last blocks of ``sequence`` that hold rejected proposals only."""
        while len(sequence.table) > -(-sequence.cached // self.blocks.size):
            self.blocks.drop(sequence.table.pop())

    def _capacity_for(self, sequence: Sequence) -> int:
        return (len(sequence.table) + self.blocks.available) * self.blocks.size - sequence.cached

    def _free_outside_window(self, sequence: Sequence) -> None:
        """Drop the leading blocks of ``sequence`` that lie outside the attention window.

        The next token, at position ``cached``, sees positions cached - window + 1 and later.
        """
        if self.window is None:
            return
        while (sequence.freed_blocks + 1) * self.blocks.size <= sequence.cached - self.window + 1:
            self.blocks.drop(sequence.table[sequence.freed_blocks])
            sequence.table[sequence.freed_blocks] = -1
            sequence.freed_blocks += 1

    def _publish(self, sequence: Sequence) -> None:
        """Add the blocks of ``sequence`` that have become full to the prefix cache."""
        full = sequence.cached // self.blocks.size
        if len(sequence.digests) < full:
            prefix.extend(sequence.digests, sequence.request.salt, sequence.ids[: sequence.cached], self.blocks.size)
        for index in range(sequence.published, full):
            self.blocks.publish(sequence.table[index], sequence.digests[index])
        sequence.published = full

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        del self._running[sequence]
        sequence.preemptions += 1
        self.preemptions += 1
        self._wait(sequence)

    def _release(self, sequence: Sequence) -> list[int]:
        """Drop all blocks of ``sequence`` and return those without references.

        The last blocks are dropped first, and so are reused for other contents first: prefixes are found more often.
        """
        released = [block for block in reversed(_held_blocks(sequence)) if self.blocks.drop(block)]
        sequence.table = []
        sequence.cached = sequence.freed_blocks = sequence.published = 0
        return released

    # State changes

    def _wait(self, sequence: Sequence) -> None:
        sequence.waiting_since = self.steps
        self._waiting[sequence] = None

    def _append_scores(self, sequence: Sequence, scores: Listing[Token]) -> None:
        """Append ``scores`` to the prompt's log-probabilities; skip those that a preemption repeats."""
        first = max(sequence.cached + 1, sequence.first_scored)
        known = sequence.first_scored + len(sequence.prompt_logprobs) - first
        sequence.prompt_logprobs.extend(scores[max(0, known) :])

    def _append_tokens(self, sequence: Sequence, tokens: Listing[Token]) -> list[Event]:
        events: list[Event] = []
        if tokens and sequence.scores_prompt and not sequence.generated:
            unscored = map(Token, sequence.request.ids[: sequence.first_scored])
            events.append(PromptLogprobs((*unscored, *sequence.prompt_logprobs)))
        for place, token in enumerate(tokens):
            if place:  # the token before was proposed, so that its key and value are in the cache
                sequence.cached += 1
                self._publish(sequence)
            events.append(token)
            if done := finish.append_token(sequence, token.id):
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
    """Return the sort key of the scheduling order; the smallest runs first."""
    return (not sequence.aged, 0 if sequence.aged else sequence.request.priority, sequence.arrival)


def _held_blocks(sequence: Sequence) -> list[int]:
    return [block for block in sequence.table if block >= 0]
