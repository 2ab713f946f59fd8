"""Several models behind one door, loaded when they are asked for and unloaded when room is needed.

Knows names, sizes and who was used when. How a model is loaded is handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moesaic.backend import Backend, GenerationRequest, ModelInfo, ModelStats, ResponseStream, TokenInfo
from moesaic.errors import MoesaicError, NotFound, Unavailable

log = logging.getLogger("moesaic.serve")


@dataclass
class ModelEntry:
    """A model that can be had: what is known of it, how it is loaded, and how much room it takes."""

    card: ModelInfo
    open: Callable[[], Awaitable[Backend]]
    bytes: int = 0
    backend: Backend | None = None
    opening: asyncio.Task[Backend] | None = field(default=None, repr=False)
    used: int = 0


class ModelManager:
    """See ``backend.Backend``; the first book is the default."""

    def __init__(self, books: Sequence[ModelEntry], budget: int | None = None) -> None:
        """Hold these books.

        Args:
            books: what can be had.
            budget: the most bytes that loaded models may take; None: no bound.
        """
        self._books = {book.card.name: book for book in books}
        self._budget, self._turn = budget, 0

    def models(self) -> Sequence[ModelInfo]:
        return [self._card(book) for book in self._books.values()]

    def _card(self, book: ModelEntry) -> ModelInfo:
        if book.backend is not None:
            return replace(book.backend.models()[0], name=book.card.name, aliases=book.card.aliases, state="loaded")
        return replace(book.card, state="loading") if book.opening else book.card

    def stats(self) -> Mapping[str, ModelStats]:
        return {
            name: next(iter(book.backend.stats().values()))
            for name, book in self._books.items()
            if book.backend is not None
        }

    def _book(self, name: str) -> ModelEntry:
        for book in self._books.values():
            if name == book.card.name or name in book.card.aliases:
                return book
        raise NotFound(f"there is no model {name!r:.120}")

    async def open(self, name: str) -> Backend:
        """Return the model of that name, loaded.

        Raises:
            MoesaicError: it cannot be loaded; or all room is taken by models that are at work.
        """
        book = self._book(name)
        self._turn += 1
        book.used = self._turn
        if book.backend is not None:
            return book.backend
        if book.opening is None:
            book.opening = asyncio.ensure_future(self._open(book))
        return await asyncio.shield(book.opening)  # whoever leaves does not stop what others wait for

    async def _open(self, book: ModelEntry) -> Backend:
        try:
            await self._make_room(book)
            log.info("loading", extra={"model": book.card.name})
            book.backend = await book.open()
            book.card = replace(book.card, state="unloaded")
            return book.backend
        except MoesaicError:
            book.card = replace(book.card, state="failed")
            raise
        finally:
            book.opening = None

    async def _make_room(self, wanted: ModelEntry) -> None:
        while self._budget is not None:
            loaded = [book for book in self._books.values() if book.backend is not None]
            if not loaded or sum(book.bytes for book in loaded) + wanted.bytes <= self._budget:
                return
            idle = [book for book in loaded if not _works(book)]
            if not idle:
                raise Unavailable("all models in memory are at work, and there is no room for another: try again later")
            oldest = min(idle, key=lambda book: book.used)
            log.info("unloading", extra={"model": oldest.card.name})
            backend, oldest.backend = oldest.backend, None
            assert backend is not None
            await backend.close()

    async def generate(self, request: GenerationRequest) -> ResponseStream:
        return await (await self.open(request.model)).generate(request)

    async def tokenize(self, request: GenerationRequest) -> list[TokenInfo]:
        return await (await self.open(request.model)).tokenize(request)

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return await (await self.open(model)).detokenize(model, ids)

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        return await (await self.open(model)).embed(model, texts)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        return await (await self.open(model)).classify(model, texts)

    async def close(self) -> None:
        for book in self._books.values():
            if book.opening is not None:
                with contextlib.suppress(MoesaicError):
                    await book.opening
            if book.backend is not None:
                await book.backend.close()


def _works(book: ModelEntry) -> bool:
    assert book.backend is not None
    return any(load.running + load.waiting for load in book.backend.stats().values())
