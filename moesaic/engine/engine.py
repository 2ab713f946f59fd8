"""The engine loop: requests in, streams of events out.

This module owns the loop, its thread, and the lock around the scheduler, which is not held while the model runs. It
does not depend on text, HTTP or sampling.

``submit`` rejects every request that cannot run. An accepted stream ends with exactly one ``Done`` or one exception,
even if the model fails, the engine is closed, or its thread dies.
"""

from __future__ import annotations

import atexit
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.engine.blocks import Blocks
from moesaic.engine.request import Done, Event, Request, Sequence, Token
from moesaic.engine.runner import Model, Runner
from moesaic.engine.scheduler import Limits, Scheduler
from moesaic.engine.speculation import KINDS, Kind, Speculation
from moesaic.engine.step import Outcome, Step
from moesaic.errors import EngineStopped, InvalidParameter, MoesaicError, NumericalError

EventQueue = queue.SimpleQueue[list[Event | MoesaicError]]
Deliveries = list[tuple["Stream", list[Event | MoesaicError]]]


class Stream:
    """The events of one answer, in order: ``PromptLogprobs`` if requested, ``Token``s, one ``Done``.

    Iterate from one thread only. A failure is raised once, instead of ``Done``.
    """

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self.index = sequence.index
        """Index of this answer among the ``n`` answers of the request."""
        self._engine, self._sequence = engine, sequence
        self._batches: EventQueue = queue.SimpleQueue()
        self._ready: deque[Event | MoesaicError] = deque()
        self._ended = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """Wait for the next event and return it.

        Raises:
            StopIteration: ``Done`` was returned or an error was raised before.
            NumericalError: the model computed NaN or infinity for this answer.
            GrammarError: the constraint of the request allows no next token.
            EngineStopped: the engine was closed or failed; the cause is chained.
        """
        if self._ended:
            raise StopIteration
        while not self._ready:
            self._engine._run_until_event(self._batches)
            self._ready.extend(self._batches.get())
        return self._take()

    def poll(self) -> list[Event]:
        """Return the events that were not read yet, without waiting; empty if there are none.

        An error is raised as in ``__next__``, by the call after the one that returned the events before it.
        """
        while not self._batches.empty():
            self._ready.extend(self._batches.get())
        out: list[Event] = []
        while self._ready and not (out and isinstance(self._ready[0], MoesaicError)):
            out.append(self._take())
        return out

    def _take(self) -> Event:
        event = self._ready.popleft()
        self._ended = isinstance(event, Done | MoesaicError)
        if isinstance(event, MoesaicError):
            raise event
        return event

    def _put(self, events: Listing[Event | MoesaicError]) -> None:
        self._batches.put(list(events))

    def cancel(self) -> None:
        """Cancel the answer: the stream ends with ``Done("cancelled")`` after the running step at the latest."""
        self._engine._cancel(self._sequence)


@dataclass(frozen=True)
class Stats:
    """A snapshot of the engine's statistics; counters are cumulative since the engine started."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    """Blocks of the cache that no sequence uses, including those that hold a cached prefix."""
    steps: int
    """Number of steps since the start; it increases while the engine makes progress."""
    prompt_tokens: int
    """Prompt tokens of accepted requests, counted once per answer."""
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens of accepted requests that were found in the prefix cache."""
    preemptions: int
    numerical_errors: int
    draft_tokens: int
    """Tokens that were proposed by speculation and verified."""
    accepted_tokens: int
    """Proposed tokens that became part of an answer."""


class Engine(AbstractContextManager["Engine"]):
    """Runs many requests on one model at the same time, with continuous batching."""

    def __init__(
        self,
        model: Model,
        *,
        cache_tokens: int = 16384,
        block_size: int = 16,
        context: int | None = None,
        limits: Limits | None = None,
        dtype: torch.dtype = torch.float32,
        thread: bool = True,
        torch_threads: int | None = None,
        lazy_cache: bool = False,
        poison: bool = False,
        speculation: Kind = "ngram",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Allocate the key/value cache and start the loop that runs step after step.

        Args:
            model: a model of ``moesaic.models``, or any object with the interface ``runner.Model``.
            cache_tokens: tokens that the key/value cache holds, rounded down to whole blocks. No request can be
                longer, unless the model has an attention window that fits in the cache.
            block_size: tokens in a block.
            context: maximum tokens of a request, prompt and answer together; None: the model's maximum. It may be one
                more, because the model does not read the last token of an answer.
            limits: limits on running and waiting requests.
            dtype: dtype of the cache: a floating-point dtype, or int8 with scales, as ``ops.Cache`` describes.
            thread: run the loop in its own thread. Otherwise reading a stream runs the loop, and so does ``step``.
            torch_threads: number of torch threads in the loop's thread; None: torch's default.
            lazy_cache: take the memory of a cache on the CPU when tokens are stored in it. Otherwise it is taken now,
                so that it cannot run out later.
            poison: fill the cache with NaN first, so that tests detect reads of unwritten memory.
            speculation: how tokens are proposed, several of which are verified in a step: "ngram", from repetitions in
                prompt and answer, where the measured times of steps make it faster; or "off".
            clock: returns a time in seconds; speculation measures steps with it.

        Raises:
            InvalidParameter: the cache would not hold one block, a size is not positive, the context is longer
                than the model's, or the kind of speculation is unknown.
        """
        if speculation not in KINDS:
            raise InvalidParameter("speculation", f"is {speculation!r}, expected {' or '.join(KINDS)}")
        if block_size < 1:
            raise InvalidParameter("block_size", f"is {block_size}, expected at least 1")
        if cache_tokens < block_size:
            raise InvalidParameter("cache_tokens", f"is {cache_tokens}, expected at least {block_size}, one block")
        if context is not None and not 2 <= context <= model.max_length + 1:
            raise InvalidParameter("context", f"is {context}, but the model supports 2 to {model.max_length} tokens")
        device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
        blocks = Blocks(cache_tokens // block_size, block_size)
        self._runner = Runner(model, blocks.count, block_size, dtype, device, lazy=lazy_cache, poison=poison)
        self._clock, self._speculation = clock, Speculation() if speculation == "ngram" else None
        longest = context or model.max_length
        self._scheduler = Scheduler(blocks, limits or Limits(), longest, model.window, self._speculation)
        self.cache_dtype = dtype
        """Dtype of the key/value cache."""
        self._vocab = model.vocab_size
        self._on_events: Callable[[list[Stream]], None] | None = None
        self._lock = threading.Condition()  # protects the scheduler and the attributes below
        self._streams: dict[Sequence, Stream] = {}
        self._cancelled: list[Sequence] = []
        self._stopped = False
        self._cause: BaseException | None = None
        self._prompt_tokens = self._generated = self._numerical = 0
        self._torch_threads = torch_threads
        self._thread = threading.Thread(target=self._loop, name="moesaic-engine", daemon=True) if thread else None
        if self._thread:
            self._thread.start()
            atexit.register(self.close)  # a thread that runs the model at interpreter shutdown may crash

    def listen(self, on_events: Callable[[list[Stream]], None]) -> None:
        """Set the function that the engine's thread calls after each step with the streams that have new events.

        The function must be fast and must not raise: an error stops the engine. There is only one listener, and it is
        not called for earlier events.
        """
        self._on_events = on_events

    @property
    def stopped(self) -> bool:
        """Whether the engine was closed or has failed."""
        return self._stopped

    @property
    def capacity(self) -> int:
        """Maximum tokens of a request, prompt and answer together."""
        return self._scheduler.capacity

    def submit(self, request: Request) -> list[Stream]:
        """Accept a request and return its streams, one for each of its ``n`` answers.

        The prompt is computed once for all answers. Each stream is cancelled separately. Tokens of
        ``request.resume`` are in the streams immediately, and the listener is not called for them.

        Raises:
            InvalidParameter: a token id is not in the model's vocabulary, or the tokens of a resumed answer are
                impossible; ``param`` names the argument.
            GrammarError: the grammar cannot compute the allowed tokens of a resumed answer.
            PromptTooLong: the prompt and one more token exceed the context, or the whole cache.
            Overloaded: too many requests or prompt tokens are waiting.
            EngineStopped: the engine was closed or has failed.
        """
        self._check_vocabulary(request)
        seed = request.sampling.seed
        sequences = self._scheduler.prepare(request, secrets.randbits(63) if seed is None else seed)
        with self._lock:
            if self._stopped:
                raise self._stop_error()
            self._scheduler.add(sequences)
            streams = [Stream(self, sequence) for sequence in sequences]
            for sequence, stream in zip(sequences, streams, strict=True):
                if sequence.resumed_events:
                    stream._put(sequence.resumed_events)
                if not sequence.ended:
                    self._streams[sequence] = stream
            self._prompt_tokens += sum(sequence.prompt for sequence in sequences)
            self._lock.notify()
        return streams

    def _check_vocabulary(self, request: Request) -> None:
        sampling = request.sampling
        arguments = {
            "prompt": request.ids,
            "eos_ids": request.eos_ids,
            "stop_token_ids": sampling.stop_token_ids,
            "allowed_token_ids": sampling.allowed_token_ids or (),
            "logit_bias": sampling.logit_bias,
            "resume": [token_id for ids in request.resume for token_id in ids],
        }
        for name, ids in arguments.items():
            if max(ids, default=0) >= self._vocab:
                raise InvalidParameter(name, f"token id {max(ids)} is not in the vocabulary of {self._vocab} tokens")

    def step(self) -> bool:
        """Run one step of an engine that has no thread; return whether there was anything to do.

        A failure does not raise here: it stops the engine, and every stream raises it.
        """
        try:
            return self._step()
        except Exception as error:  # every stream must end, whatever the error is
            self._stop(error)
            return False

    def stats(self) -> Stats:
        """Return the current statistics."""
        with self._lock:
            scheduler = self._scheduler
            return Stats(
                running=scheduler.running,
                waiting=scheduler.waiting,
                blocks=scheduler.blocks.count,
                free_blocks=scheduler.blocks.available,
                steps=scheduler.steps,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated,
                cached_tokens=scheduler.cached_prompt_tokens,
                preemptions=scheduler.preemptions,
                numerical_errors=self._numerical,
                draft_tokens=scheduler.proposed,
                accepted_tokens=scheduler.accepted,
            )

    def close(self) -> None:
        """Stop the engine after the running step. Unfinished streams raise EngineStopped. Closing twice is allowed."""
        with self._lock:
            self._stopped = True
            self._lock.notify()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        self._stop(None)
        atexit.unregister(self.close)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _loop(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        try:
            while self._await_work():
                self.step()
        finally:  # a BaseException must end the streams too
            self._stop(None)

    def _await_work(self) -> bool:
        """Wait until a sequence waits, runs or is cancelled; return False if the engine must stop."""
        scheduler = self._scheduler
        with self._lock:
            self._lock.wait_for(lambda: self._stopped or self._cancelled or scheduler.running or scheduler.waiting)
            return not self._stopped

    def _step(self) -> bool:
        start = self._clock()
        with self._lock:
            deliveries = self._apply_cancellations()
            step = None if self._stopped else self._scheduler.schedule()
        self._deliver(deliveries)
        if step is None:
            return bool(deliveries)
        decoding = step.decodes  # before the update changes its sequences
        outcome = self._runner.run(step)
        with self._lock:
            deliveries = self._update(step, outcome)
        self._deliver(deliveries)
        if self._speculation is not None and decoding:
            self._speculation.costs.record(step.tokens, self._clock() - start)
        return True

    def _apply_cancellations(self) -> Deliveries:
        """End cancelled sequences. This runs between steps, so that the sequences of a step never change during it."""
        deliveries: Deliveries = []
        for sequence in self._cancelled:
            done = self._scheduler.cancel(sequence)
            if done:
                deliveries.append((self._streams.pop(sequence), [done]))
        self._cancelled.clear()
        return deliveries

    def _update(self, step: Step, outcome: Outcome) -> Deliveries:
        """Apply ``outcome``, the results of ``step``, to its sequences; return the new events of each stream."""
        deliveries: Deliveries = []
        for sequence in outcome.failed:
            self._runner.wipe(self._scheduler.fail(sequence))
            self._numerical += 1
            deliveries.append((self._streams.pop(sequence), [NumericalError("the model computed NaN or infinity")]))
        for sequence, error in outcome.refused.items():
            self._scheduler.cancel(sequence)
            deliveries.append((self._streams.pop(sequence), [error]))
        for sequence, events in self._scheduler.update(step, outcome):
            self._generated += sum(isinstance(event, Token) for event in events)
            ended = isinstance(events[-1], Done)
            deliveries.append((self._streams.pop(sequence) if ended else self._streams[sequence], [*events]))
        return deliveries

    def _deliver(self, deliveries: Deliveries) -> None:
        for stream, events in deliveries:
            stream._put(events)
        if deliveries and self._on_events:
            self._on_events([stream for stream, _ in deliveries])

    def _cancel(self, sequence: Sequence) -> None:
        with self._lock:
            if not sequence.ended:
                self._cancelled.append(sequence)
                self._lock.notify()

    def _run_until_event(self, batches: EventQueue) -> None:
        """If the engine has no thread, run steps until ``batches``, the queue of a stream, has an event."""
        while self._thread is None and batches.empty():
            assert self.step() or not batches.empty(), "this stream will never get another event"

    def _stop(self, cause: Exception | None) -> None:
        """Reject new requests from now on, and end every stream with EngineStopped.

        ``cause`` is the error that stopped the engine; None if it was closed. Only the first one is kept.
        """
        with self._lock:
            self._stopped = True
            self._cause = self._cause or cause
            streams = list(self._streams.values())
            self._streams.clear()
        self._deliver([(stream, [self._stop_error()]) for stream in streams])

    def _stop_error(self) -> EngineStopped:
        if self._cause is None:
            return EngineStopped("the engine was closed")
        error = EngineStopped(f"the engine failed: {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error
