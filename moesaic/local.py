"""The door to one model in this process: an ``LLM`` or a ``Classifier`` behind an event loop.

The engine has its thread; once a step it wakes the loop, which turns new tokens into text for
everybody at once. Tokenizing happens in threads of its own, so that a long prompt holds up no stream.
Knows loops and threads. Does not know HTTP, nor more than one model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from moesaic.classifier import Classifier
from moesaic.door import Ask, Begun, Call, Card, Ended, Event, Load, Mark, Piece
from moesaic.engine import Stream, Token
from moesaic.errors import InvalidParameter, InvalidRequest, MoesaicError, Overloaded
from moesaic.llm import LLM
from moesaic.reply import Reply, Text
from moesaic.text.grammar import Grammar
from moesaic.text.tokenizer import Tokenizer
from moesaic.text.tools import Tools

T = TypeVar("T")

BEHIND = 1024
"""Pieces that may wait for somebody who does not fetch them; then the request is taken back."""
READING = 256
"""Requests whose text may wait to be tokenized; more are refused."""

PACE = 0.015
"""Seconds between looks at what has come: a model that steps faster gives readers a few tokens at a time. Each look
takes the engine's cores for a moment, and nobody sees the difference."""
CROWD = 8
"""Answers from which on the looks are further apart, since each takes longer; ..."""
WIDEST = 3
"""... up to so many times as far."""

TOKENIZERS = 2
"""Threads that tokenize."""

COMPILERS = 2
"""Threads that take in requests with grammars: a hostile one takes seconds, and must not hold up the others."""


async def in_pool(pool: ThreadPoolExecutor, call: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """Return what ``call`` returns in a thread. Whoever leaves meanwhile has it undone.

    Raises:
        InvalidRequest: something that is no Exception came out, such as a panic of the tokenizers' Rust.
    """
    work = pool.submit(call)
    try:
        return await asyncio.shield(asyncio.wrap_future(work))
    except asyncio.CancelledError:
        if not work.cancel() and undo is not None:
            work.add_done_callback(lambda done: undo(done.result()) if done.exception() is None else None)
        raise
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InvalidRequest(f"the text could not be read: {type(error).__name__}") from error


def _take_back(replies: Sequence[Reply]) -> None:
    for reply in replies:
        reply.cancel()


class Marks:
    """Tokens as they are shown. Those without figures are made once: nearly every token of an answer is such a one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain: dict[int, Mark] = {}

    def of(self, token: Token) -> Mark:
        """Return a token's mark."""
        tokenizer, plain = self._tokenizer, token.logprob is None and not token.top
        if plain and (known := self._plain.get(token.id)):
            return known
        top = tuple((id, tokenizer.piece(id), value) for id, value in token.top)
        mark = Mark(token.id, tokenizer.piece(token.id), tokenizer.is_special(token.id), token.logprob, top)
        if plain:
            self._plain[token.id] = mark
        return mark


class LocalAnswers:
    """A running request. Made and read on the loop's thread; see ``door.Answers``."""

    job = None

    def __init__(self, replies: Sequence[Reply], marks: Marks) -> None:
        self._replies, self._mark = replies, marks.of
        given = sum(len(reply.request.given(reply.stream.index)) for reply in replies)
        self._behind = BEHIND + given  # what was given comes at once
        self._begun: set[int] = set()
        self._events: deque[Event] = deque()
        self._held: dict[int, list[Event]] = {}  # last pieces, which go out with the end that is about to come
        self._failed: MoesaicError | None = None
        self._open = len(replies)
        self._called: dict[int, int] = {}  # index -> calls so far
        self._waiter: asyncio.Future[None] | None = None

    def pump(self, reply: Reply) -> bool:
        """Read what has come for one of the answers; return whether it has ended."""
        if self._failed:
            return True
        try:
            pieces = reply.poll()
        except MoesaicError as error:
            self._fail(error)
            return True
        index = reply.stream.index
        if index not in self._begun and (pieces or reply.ended):
            self._begun.add(index)
            prompt = tuple(self._mark(token) for token in reply.prompt_logprobs)
            self._events.append(Begun(index, prompt, len(reply.request.ids)))
        wanted = [piece for piece in pieces if piece.text or piece.tokens or piece.calls]
        shown: list[Event] = [self._piece(index, piece) for piece in wanted]
        if reply.stopped and not reply.ended:
            self._held.setdefault(index, []).extend(shown)
            return False
        self._events.extend([*self._held.pop(index, ()), *shown])
        if reply.ended:
            self._open -= 1
            self._events.append(_ended(index, reply))
        elif len(self._events) > self._behind:
            self._fail(Overloaded("the answer was not fetched as fast as it came"))
        self._wake()
        return reply.ended

    def _piece(self, index: int, piece: Text) -> Piece:
        marks = tuple(self._mark(token) for token in piece.tokens)
        first = self._called.get(index, 0)
        self._called[index] = first + len(piece.calls)
        calls = (Call(place, call.id, call.name, call.arguments) for place, call in enumerate(piece.calls, first))
        return Piece(index, piece.text, marks, tuple(calls))

    def _fail(self, error: MoesaicError) -> None:
        self._failed = error
        self.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        for reply in self._replies:
            if not reply.ended:
                reply.cancel()

    def ready(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._failed:
                raise self._failed
            if not self._open:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


def _ended(index: int, reply: Reply) -> Ended:
    answer = reply.answer
    return Ended(
        index,
        answer.reason,
        answer.prompt_tokens,
        len(answer.tokens),
        answer.cached_tokens,
        answer.stop,
        answer.stop_id,
        called=bool(answer.calls),
    )


def _tools(ask: Ask) -> Tools | None:
    return Tools.from_request(ask.tools, ask.tool_choice, ask.parallel_tool_calls)


def _about(llm: LLM) -> Mapping[str, Any]:
    weight = next(llm.loaded.model.parameters())
    tokenizer = llm.tokenizer
    ends = sorted(llm.loaded.eos_ids | tokenizer.eos_ids)
    return {
        "architecture": llm.loaded.config.get("model_type"),
        "layout": llm.loaded.layout,
        "dtype": str(llm.loaded.model.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "bos_token": None if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(ends[0]) if ends else None,
    }


class Local:
    """One model in this process; see ``door.Door``. Made on the loop that it answers on."""

    def __init__(self, llm: LLM, aliases: Sequence[str] = (), crowd: int = CROWD) -> None:
        """Answer with a model.

        Args:
            llm: the model.
            aliases: its other names.
            crowd: answers from which on it is looked further apart at what has come, each look being dearer to
                whoever passes it on.
        """
        self._llm, self._aliases, self._crowd = llm, tuple(aliases), crowd
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="moesaic-text")
        self._grammars = ThreadPoolExecutor(COMPILERS, thread_name_prefix="moesaic-grammar")
        self._running: dict[Stream, tuple[LocalAnswers, Reply]] = {}
        self._news: deque[Stream] = deque()
        self._told = False
        self._looked = 0.0  # when the loop last took what had come
        self._about, self._marks = _about(llm), Marks(llm.tokenizer)
        self._reading = {self._pool: 0, self._grammars: 0}
        self._vectors = ThreadPoolExecutor(1, thread_name_prefix="moesaic-embed")
        llm.engine.listen(self._on_events)

    # What follows runs on the engine's thread

    def _on_events(self, streams: list[Stream]) -> None:
        self._news.extend(streams)
        if not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._pace)
            except RuntimeError:  # the loop is gone, and with it everybody who could listen
                self._news.clear()

    # and what follows on the loop's

    def _pace(self) -> None:
        pace = PACE * min(WIDEST, max(1.0, len(self._running) / self._crowd))
        wait = self._looked + pace - self._loop.time()
        if wait > 0:
            self._loop.call_later(wait, self._pump)
        else:
            self._pump()

    def _pump(self) -> None:
        self._looked = self._loop.time()
        self._told = False  # before looking: what comes from here on is told again
        while self._news:
            stream = self._news.popleft()
            found = self._running.get(stream)
            if found and found[0].pump(found[1]):
                del self._running[stream]

    def cards(self) -> Sequence[Card]:
        llm = self._llm
        return [Card(llm.name, self._aliases, context=llm.context, about=self._about)]

    def load(self) -> Mapping[str, Load]:
        stats = self._llm.engine.stats()
        return {
            self._llm.name: Load(
                stats.running,
                stats.waiting,
                stats.steps,
                stats.prompt_tokens,
                stats.generated_tokens,
                stats.cached_tokens,
                stats.preemptions,
                stats.blocks,
                stats.free_blocks,
                stats.numerical_errors,
                alive=not self._llm.engine.stopped,
            )
        }

    async def ask(self, ask: Ask) -> LocalAnswers:
        constrained = ask.grammar is not None or ask.tool_choice not in ("none", "auto")
        pool = self._grammars if constrained else self._pool
        if self._reading[pool] >= READING:
            raise Overloaded(f"{READING} requests wait to be read already: try again later")
        self._reading[pool] += 1
        try:
            replies = await in_pool(pool, lambda: self._submit(ask), _take_back)
        finally:
            self._reading[pool] -= 1
        answers = LocalAnswers(replies, self._marks)
        for reply in replies:
            self._running[reply.stream] = answers, reply
            self._news.append(reply.stream)  # what came before anybody listened
        self._pump()
        return answers

    def _submit(self, ask: Ask) -> list[Reply]:
        llm = self._llm
        sampling = llm.sampling(**ask.sampling)
        tools = _tools(ask)
        return llm.submit(
            self._ids(ask),
            sampling,
            chat=ask.messages is not None,
            priority=ask.priority,
            salt=ask.tenant,
            skip_special=ask.skip_special,
            begins=ask.messages is not None and not ask.continue_final,
            grammar=None if ask.grammar is None else Grammar(*ask.grammar),  # type: ignore[arg-type]
            tools=tools,
            resume=ask.resume,
        )

    def _ids(self, ask: Ask) -> list[int]:
        llm = self._llm
        if ask.messages is not None:
            ids = llm.encode_chat(ask.messages, continue_final=ask.continue_final, tools=_tools(ask))
        elif isinstance(ask.prompt, str):
            ids = llm.encode(ask.prompt, bos=ask.bos, marked=ask.marked)
        else:
            ids = list(ask.prompt or ())
        return ids[-ask.truncate :] if ask.truncate else ids

    async def tokenize(self, ask: Ask) -> list[Mark]:
        tokenizer = self._llm.tokenizer
        ids = await in_pool(self._pool, lambda: self._ids(ask))
        return [Mark(id, tokenizer.piece(id), tokenizer.is_special(id)) for id in ids]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        most = self._llm.loaded.model.vocab_size
        if max(ids, default=0) >= most:
            raise InvalidParameter("tokens", f"token id {max(ids)} is not in the vocabulary of {most}")
        return await in_pool(self._pool, lambda: self._llm.tokenizer.decode(ids, skip_special=False))

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        return await in_pool(self._vectors, lambda: self._llm.embed(texts))

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        raise InvalidRequest(f"{self._llm.name} is a chat model and has no classes")

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self._llm.close)
        for pool in (self._pool, self._grammars, self._vectors):
            pool.shutdown(wait=False, cancel_futures=True)


class LocalClassifier:
    """One classifier in this process; see ``door.Door``."""

    def __init__(self, classifier: Classifier, name: str, aliases: Sequence[str] = ()) -> None:
        self._classifier, self._name, self._aliases = classifier, name, tuple(aliases)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="moesaic-classify")

    def cards(self) -> Sequence[Card]:
        shape = self._classifier.loaded.model.shape
        return [Card(self._name, self._aliases, "classify", context=shape.max_length, labels=shape.labels)]

    def load(self) -> Mapping[str, Load]:
        return {self._name: Load()}

    async def ask(self, ask: Ask) -> LocalAnswers:
        raise InvalidRequest(f"{self._name} is a classifier, which does not chat: ask /v1/classify")

    async def tokenize(self, ask: Ask) -> list[Mark]:
        tokenizer = self._classifier.tokenizer
        ids = tokenizer.encode(ask.prompt, bos=ask.bos) if isinstance(ask.prompt, str) else list(ask.prompt or ())
        return [Mark(id, tokenizer.piece(id), tokenizer.is_special(id)) for id in ids]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return self._classifier.tokenizer.decode(ids, skip_special=False)

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        raise InvalidRequest(f"{self._name} is a classifier: ask a chat model for embeddings")

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return list(await in_pool(self._pool, lambda: self._classifier.classify(texts)))

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
