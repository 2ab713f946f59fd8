"""The engine: requests in, streams of events out.

Owns the loop, its thread, and the lock around the scheduler, which is never held while the model
runs. Knows nothing of text, HTTP, or how tokens are chosen.

Every refusal happens in ``submit``. After it, a stream ends with exactly one ``Done`` or one
exception, also when the model breaks, the engine is closed, or its thread dies.
"""

from __future__ import annotations

import atexit
import queue
import secrets
import threading
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
from moesaic.engine.scheduler import Limits, Outcome, Scheduler, Step
from moesaic.errors import EngineStopped, InvalidParameter, MoesaicError, NumericalError

Batches = queue.SimpleQueue[list[Event | MoesaicError]]
News = list[tuple["Stream", list[Event | MoesaicError]]]


class Stream:
    """The events of one answer, in order: ``PromptLogprobs`` if asked for, ``Token``s, one ``Done``.

    Iterate over it from one thread. A failure is raised once, in place of ``Done``.
    """

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self.index = sequence.index
        """Which of the request's ``n`` answers this is."""
        self._engine, self._sequence = engine, sequence
        self._batches: Batches = queue.SimpleQueue()
        self._ready: deque[Event | MoesaicError] = deque()
        self._ended = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """Wait for the next event and return it.

        Raises:
            StopIteration: after ``Done``, or after an error was raised.
            NumericalError: the model computed NaN or infinity for this answer.
            GrammarError: no token can follow under the request's constraint.
            EngineStopped: the engine was closed, or died; the cause is chained.
        """
        if self._ended:
            raise StopIteration
        while not self._ready:
            self._engine._attend(self._batches)
            self._ready.extend(self._batches.get())
        return self._take()

    def poll(self) -> list[Event]:
        """Return what has come so far, without waiting. Raises as iteration does, once all events are taken."""
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
        """Take the request back: the stream ends with ``Done("cancelled")`` after at most the step that is running."""
        self._engine._cancel(self._sequence)


@dataclass(frozen=True)
class Stats:
    """A moment of the engine."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    """Blocks that nobody holds; those that keep a cached prefix are among them."""
    steps: int
    """Rises while the engine makes progress."""
    prompt_tokens: int
    """Of the requests taken in, each answer counted."""
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    preemptions: int
    numerical_errors: int


class Engine(AbstractContextManager["Engine"]):
    """Runs a model for many requests at once."""

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
        poison: bool = False,
    ) -> None:
        """Allocate the cache and start.

        Args:
            model: moesaic.models has them; see ``runner.Model``.
            cache_tokens: places in the key/value cache, rounded down to whole blocks. No request may be
                longer than this, unless the model has a window that fits it.
            block_size: places in a block.
            context: the most tokens of a request, prompt and answer together; None: as many as the model
                was made for.
            limits: how much may run and wait at once.
            dtype: of the cache: a float dtype, or int8, see ``ops.Cache``.
            thread: run the loop in a thread of its own. Without it, reading a stream drives the loop,
                and so does ``step``.
            torch_threads: threads that torch uses in the loop's thread; None: as many as it likes.
            poison: fill the cache with NaN first, to show that nothing unwritten is ever read.

        Raises:
            InvalidParameter: the cache would not hold one block, a size is not positive, or the context is
                longer than the model's.
        """
        if block_size < 1:
            raise InvalidParameter("block_size", f"is {block_size}, expected at least 1")
        if cache_tokens < block_size:
            raise InvalidParameter("cache_tokens", f"{cache_tokens} do not fill one block of {block_size}")
        if context is not None and not 2 <= context <= model.max_length:
            raise InvalidParameter("context", f"is {context}, expected 2 to the model's {model.max_length}")
        device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
        blocks = Blocks(cache_tokens // block_size, block_size)
        self._runner = Runner(model, blocks.count, block_size, dtype, device, poison=poison)
        self._scheduler = Scheduler(blocks, limits or Limits(), context or model.max_length, model.window)
        self.cache_dtype = dtype
        """Of the key/value cache."""
        self._vocab = model.vocab_size
        self._on_events: Callable[[list[Stream]], None] | None = None
        self._lock = threading.Condition()  # around everything below, and the scheduler
        self._streams: dict[Sequence, Stream] = {}
        self._cancelled: list[Sequence] = []
        self._stopped = False
        self._cause: BaseException | None = None
        self._prompt_tokens = self._generated = self._numerical = 0
        self._torch_threads = torch_threads
        self._thread = threading.Thread(target=self._loop, name="moesaic-engine", daemon=True) if thread else None
        if self._thread:
            self._thread.start()
            atexit.register(self.close)  # a thread inside the model while the interpreter is taken down may crash it

    def listen(self, on_events: Callable[[list[Stream]], None]) -> None:
        """Have this called after each step with the streams that have something to ``poll``, on the engine's thread.

        It must be quick and must not raise: an error in it ends the engine. There is one listener; what came
        before it was named is not told again.
        """
        self._on_events = on_events

    @property
    def stopped(self) -> bool:
        """Whether it was closed, or died."""
        return self._stopped

    @property
    def capacity(self) -> int:
        """The most tokens, prompt and answer together, that a request can have."""
        return self._scheduler.capacity

    def submit(self, request: Request) -> list[Stream]:
        """Take a request in and return its streams, one for each of its ``n`` answers.

        The prompt is computed once for all of them. Cancel each on its own. Tokens that the request brings along are
        in the streams at once, of which no listener is told.

        Raises:
            InvalidParameter: a token id is not in the model's vocabulary, or an answer cannot have had the tokens
                that it is to go on from; ``param`` names where.
            GrammarError: what the grammar allows behind these cannot be found out.
            PromptTooLong: the prompt and one token more exceed the context, or the whole cache.
            Overloaded: too many requests, or too long ones, are waiting.
            EngineStopped: the engine was closed, or died.
        """
        self._check_vocabulary(request)
        seed = request.sampling.seed
        sequences = self._scheduler.prepare(request, secrets.randbits(63) if seed is None else seed)
        with self._lock:
            if self._stopped:
                raise self._ending()
            self._scheduler.add(sequences)
            streams = [Stream(self, sequence) for sequence in sequences]
            for sequence, stream in zip(sequences, streams, strict=True):
                if sequence.begun:
                    stream._put(sequence.begun)
                if not sequence.ended:
                    self._streams[sequence] = stream
            self._prompt_tokens += sum(sequence.prompt for sequence in sequences)
            self._lock.notify()
        return streams

    def _check_vocabulary(self, request: Request) -> None:
        sampling = request.sampling
        named = {
            "prompt": request.ids,
            "eos_ids": request.eos_ids,
            "stop_token_ids": sampling.stop_token_ids,
            "logit_bias": sampling.logit_bias,
            "resume": [id for given in request.resume for id in given],
        }
        for name, ids in named.items():
            if max(ids, default=0) >= self._vocab:
                raise InvalidParameter(name, f"token id {max(ids)} is not in the vocabulary of {self._vocab}")

    def step(self) -> bool:
        """Run one step; return whether there was anything to do. Only for engines without a thread.

        Never raises: a failure stops the engine, and every stream ends with it.
        """
        try:
            return self._step()
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._stop(error)
            return False

    def stats(self) -> Stats:
        """Return the present figures."""
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
                cached_tokens=scheduler.hits,
                preemptions=scheduler.preemptions,
                numerical_errors=self._numerical,
            )

    def close(self) -> None:
        """Stop after the step that is running. Streams that have not ended raise EngineStopped. May be called again."""
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
        finally:  # also when something that is not an Exception gets through
            self._stop(None)

    def _await_work(self) -> bool:
        """Sleep until there is something to do; return False when the engine is to stop."""
        scheduler = self._scheduler
        with self._lock:
            self._lock.wait_for(lambda: self._stopped or self._cancelled or scheduler.running or scheduler.waiting)
            return not self._stopped

    def _step(self) -> bool:
        with self._lock:
            news = self._reap()
            step = None if self._stopped else self._scheduler.next()
        self._hand_over(news)
        if step is None:
            return bool(news)
        outcome = self._runner.run(step)
        with self._lock:
            news = self._settle(step, outcome)
        self._hand_over(news)
        return True

    def _reap(self) -> News:
        """End what was cancelled; between steps, so that a step's sequences never change under it."""
        news: News = []
        for sequence in self._cancelled:
            done = self._scheduler.cancel(sequence)
            if done:
                news.append((self._streams.pop(sequence), [done]))
        self._cancelled.clear()
        return news

    def _settle(self, step: Step, outcome: Outcome) -> News:
        """Enter a step's outcome; return what to tell whom."""
        news: News = []
        for sequence in outcome.failed:
            self._runner.wipe(self._scheduler.fail(sequence))
            self._numerical += 1
            news.append((self._streams.pop(sequence), [NumericalError("the model computed NaN or infinity")]))
        for sequence, error in outcome.refused.items():
            self._scheduler.cancel(sequence)
            news.append((self._streams.pop(sequence), [error]))
        for sequence, events in self._scheduler.commit(step, outcome):
            self._generated += sum(isinstance(event, Token) for event in events)
            ended = isinstance(events[-1], Done)
            news.append((self._streams.pop(sequence) if ended else self._streams[sequence], [*events]))
        return news

    def _hand_over(self, news: News) -> None:
        for stream, events in news:
            stream._put(events)
        if news and self._on_events:
            self._on_events([stream for stream, _ in news])

    def _cancel(self, sequence: Sequence) -> None:
        with self._lock:
            if not sequence.ended:
                self._cancelled.append(sequence)
                self._lock.notify()

    def _attend(self, batches: Batches) -> None:
        """Without a thread, run steps until something has come."""
        while self._thread is None and batches.empty():
            assert self.step() or not batches.empty(), "a stream is read that nothing will be written to"

    def _stop(self, cause: Exception | None) -> None:
        """Let nothing more in and end every stream. The first cause is kept."""
        with self._lock:
            self._stopped = True
            self._cause = self._cause or cause
            streams = list(self._streams.values())
            self._streams.clear()
        self._hand_over([(stream, [self._ending()]) for stream in streams])

    def _ending(self) -> EngineStopped:
        if self._cause is None:
            return EngineStopped("the engine was closed")
        error = EngineStopped(f"the engine died: {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error
