"""A backend of one model in this process: an ``LLM`` behind an event loop.

The engine has its own thread. After each step it wakes the event loop, which turns the new tokens of all requests into
text. Prompts are tokenized in other threads, so that a long one delays no stream. This module does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from moesaic.backend import GenerationRequest, ModelInfo, ModelStats, TokenInfo
from moesaic.engine import Stream
from moesaic.errors import InvalidParameter, InvalidRequest, Overloaded
from moesaic.llm import LLM
from moesaic.local_stream import LocalResponseStream, TokenInfoCache
from moesaic.reply import Reply
from moesaic.text import length
from moesaic.text.grammar import Grammar
from moesaic.text.tools import Tools

T = TypeVar("T")

MAX_TOKENIZING = 256
"""Largest number of requests that may wait to be tokenized in one thread pool; further requests are refused."""

POLL_SECONDS = 0.015
"""Shortest time in seconds between two polls of the engine for new tokens. A model that steps faster delivers
a few tokens at a time: each poll takes time from the engine's cores, and readers do not notice the difference."""
MANY_STREAMS = 8
"""If more answers than this are running, the engine is polled less often, since each poll takes longer."""
MAX_POLL_FACTOR = 3
"""Largest factor by which many running answers lengthen the time between polls."""

TOKENIZER_THREADS = 2
GRAMMAR_THREADS = 2
"""Threads that read requests with grammars. A hostile grammar takes seconds and must not delay other requests."""
EMBEDDED_AT_ONCE = 8
"""Number of texts that are embedded at once; then texts of other requests get their turn."""


async def in_pool(pool: ThreadPoolExecutor, call: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """Run ``call`` in a thread of ``pool`` and return its result.

    If the caller is cancelled, a ``call`` that has begun runs to its end, and ``undo`` gets its result.

    Raises:
        InvalidRequest: ``call`` raised a BaseException, such as a panic in the Rust code of the tokenizers.
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
        raise InvalidRequest(f"the text cannot be tokenized: {type(error).__name__}") from error


def _cancel_all(replies: Sequence[Reply]) -> None:
    for reply in replies:
        reply.cancel()


def _tools(request: GenerationRequest) -> Tools | None:
    return Tools.from_request(request.tools, request.tool_choice, request.parallel_tool_calls)


def _grammar(request: GenerationRequest) -> Grammar | None:
    if request.grammar is None:
        return None
    kind, value = request.grammar
    return Grammar(kind, value, request.grammar_param)  # type: ignore[arg-type]


def _now(request: GenerationRequest) -> datetime | None:
    try:
        return None if request.now is None else datetime.fromisoformat(request.now)
    except ValueError:
        raise InvalidParameter("now", f"is {request.now!r:.40}; expected a time as ISO 8601") from None


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
        "chat_format": llm.format.name,
        "chat_format_note": llm.format.note,
    }


class LocalBackend:
    """A ``Backend`` for one model in this process. Create it on the event loop that uses it."""

    def __init__(self, llm: LLM, aliases: Sequence[str] = (), many_streams: int = MANY_STREAMS) -> None:
        """Connect to the engine of a model.

        Args:
            llm: the model with its engine.
            aliases: other names of the model.
            many_streams: if more answers than this are running, the engine is polled less often. A lower value saves
                time where passing events on is expensive.
        """
        self._llm, self._aliases, self._many_streams = llm, tuple(aliases), many_streams
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="moesaic-text")
        self._grammars = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="moesaic-grammar")
        self._running: dict[Stream, tuple[LocalResponseStream, Reply]] = {}
        self._news: deque[Stream] = deque()
        self._poll_scheduled = False
        self._polled_at = 0.0
        self._about, self._token_infos = _about(llm), TokenInfoCache(llm.tokenizer)
        self._reading = {self._pool: 0, self._grammars: 0}
        self._vectors = ThreadPoolExecutor(1, thread_name_prefix="moesaic-embed")
        llm.engine.listen(self._on_events)

    # Runs on the engine's thread

    def _on_events(self, streams: list[Stream]) -> None:
        self._news.extend(streams)
        if not self._poll_scheduled:
            self._poll_scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._schedule_poll)
            except RuntimeError:  # the loop is closed, and no reader is left
                self._news.clear()

    # The rest runs on the event loop's thread

    def _schedule_poll(self) -> None:
        interval = POLL_SECONDS * min(MAX_POLL_FACTOR, max(1.0, len(self._running) / self._many_streams))
        wait = self._polled_at + interval - self._loop.time()
        if wait > 0:
            self._loop.call_later(wait, self._pump)
        else:
            self._pump()

    def _pump(self) -> None:
        self._polled_at = self._loop.time()
        self._poll_scheduled = False  # before polling: later events schedule another poll
        while self._news:
            stream = self._news.popleft()
            match = self._running.get(stream)
            if match and match[0].pump(match[1]):
                del self._running[stream]

    def models(self) -> Sequence[ModelInfo]:
        llm = self._llm
        return [ModelInfo(llm.name, self._aliases, context=llm.context, about=self._about)]

    def stats(self) -> Mapping[str, ModelStats]:
        stats = self._llm.engine.stats()
        return {
            self._llm.name: ModelStats(
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
                stats.draft_tokens,
                stats.accepted_tokens,
                alive=not self._llm.engine.stopped,
            )
        }

    async def generate(self, request: GenerationRequest) -> LocalResponseStream:
        constrained = request.grammar is not None or request.tool_choice not in ("none", "auto")
        pool = self._grammars if constrained else self._pool
        if self._reading[pool] >= MAX_TOKENIZING:
            raise Overloaded(f"{MAX_TOKENIZING} requests are waiting to be tokenized already; try again later")
        self._reading[pool] += 1
        try:
            replies = await in_pool(pool, lambda: self._submit(request), _cancel_all)
        finally:
            self._reading[pool] -= 1
        answers = LocalResponseStream(replies, self._token_infos)
        for reply in replies:
            self._running[reply.stream] = answers, reply
            self._news.append(reply.stream)  # events that came before the stream was registered
        self._pump()
        return answers

    def _submit(self, request: GenerationRequest) -> list[Reply]:
        llm = self._llm
        tools, ids = _tools(request), self._ids(request)
        fields = dict(request.sampling)
        if request.limits is not None:
            fields["max_tokens"] = request.limits.max_tokens(len(ids), fields.get("max_tokens"), llm.context)
        return llm.submit(
            ids,
            llm.sampling(**fields),
            chat=request.messages is not None,
            priority=request.priority,
            salt=request.tenant,
            skip_special=request.skip_special,
            include_stop=request.include_stop,
            begins=request.messages is not None and not request.continue_final,
            grammar=_grammar(request),
            tools=tools,
            resume=request.resume,
        )

    def _ids(self, request: GenerationRequest) -> list[int]:
        llm, kept = self._llm, self._kept(request)
        limited = kept is None  # truncation is for prompts of any length
        if request.messages is not None:
            ids = llm.encode_chat(
                request.messages,
                continue_final=request.continue_final,
                tools=_tools(request),
                chat_template_kwargs=request.chat_template_kwargs,
                now=_now(request),
                limited=limited,
            )
        elif isinstance(request.prompt, str):
            ids = llm.encode(request.prompt, bos=request.add_bos, marked=request.parse_special, limited=limited)
        else:
            ids = list(request.prompt or ())
        return ids if kept is None else length.truncate(ids, kept, llm.tokenizer.bos_id)

    def _kept(self, request: GenerationRequest) -> int | None:
        """Return the number of tokens to which a request's prompt is truncated; None: it is not truncated."""
        if request.truncate != length.MODEL_LIMIT:
            return request.truncate or None
        context = self._llm.context
        return context - min(request.sampling.get("max_tokens") or 1, context // 2)

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        tokenizer = self._llm.tokenizer
        ids = await in_pool(self._pool, lambda: self._ids(request))
        return [TokenInfo(token_id, tokenizer.piece(token_id), tokenizer.is_special(token_id)) for token_id in ids]

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        limit = max(self._llm.loaded.model.vocab_size, self._llm.tokenizer.vocab_size)
        if max(ids, default=0) >= limit:
            raise InvalidParameter("tokens", f"token id {max(ids)} is not in the vocabulary of {limit}")
        return await in_pool(self._pool, lambda: self._llm.tokenizer.decode(ids, skip_special=False))

    async def embed(
        self, model: str, texts: Sequence[str | Sequence[int]], truncate: int | None = None
    ) -> tuple[list[list[float]], int]:
        prompts = await in_pool(self._pool, lambda: self._llm.encode_inputs(texts, truncate))
        vectors: list[list[float]] = []
        for begin in range(0, len(prompts), EMBEDDED_AT_ONCE):  # others take turns, and a cancelled request ends
            part = prompts[begin : begin + EMBEDDED_AT_ONCE]
            vectors += (await in_pool(self._vectors, partial(self._llm.embed, part)))[0]
        return vectors, sum(map(len, prompts))

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        raise InvalidRequest(f"{self._llm.name} is a chat model, not a classifier")

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self._llm.close)
        for pool in (self._pool, self._grammars, self._vectors):
            pool.shutdown(wait=False, cancel_futures=True)
