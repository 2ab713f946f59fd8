"""Several models behind one door, loaded when they are asked for and unloaded when room is needed.

Knows names, sizes and who was used when. How a model is loaded is handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moesaic.door import Answers, Ask, Card, Door, Load, Mark
from moesaic.errors import MoesaicError, NotFound, Unavailable

log = logging.getLogger("moesaic.serve")


@dataclass
class Book:
    """A model that can be had: what is known of it, how it is loaded, and how much room it takes."""

    card: Card
    open: Callable[[], Awaitable[Door]]
    bytes: int = 0
    door: Door | None = None
    opening: asyncio.Task[Door] | None = field(default=None, repr=False)
    used: int = 0


class Shelf:
    """See ``door.Door``; the first book is the default."""

    def __init__(self, books: Sequence[Book], budget: int | None = None) -> None:
        """Hold these books.

        Args:
            books: what can be had.
            budget: the most bytes that loaded models may take; None: no bound.
        """
        self._books = {book.card.name: book for book in books}
        self._budget, self._turn = budget, 0

    def cards(self) -> Sequence[Card]:
        return [self._card(book) for book in self._books.values()]

    def _card(self, book: Book) -> Card:
        if book.door is not None:
            return replace(book.door.cards()[0], name=book.card.name, aliases=book.card.aliases, state="loaded")
        return replace(book.card, state="loading") if book.opening else book.card

    def load(self) -> Mapping[str, Load]:
        return {
            name: next(iter(book.door.load().values())) for name, book in self._books.items() if book.door is not None
        }

    def _book(self, name: str) -> Book:
        for book in self._books.values():
            if name == book.card.name or name in book.card.aliases:
                return book
        raise NotFound(f"there is no model {name!r:.120}")

    async def open(self, name: str) -> Door:
        """Return the model of that name, loaded.

        Raises:
            MoesaicError: it cannot be loaded; or all room is taken by models that are at work.
        """
        book = self._book(name)
        self._turn += 1
        book.used = self._turn
        if book.door is not None:
            return book.door
        if book.opening is None:
            book.opening = asyncio.ensure_future(self._open(book))
        return await asyncio.shield(book.opening)  # whoever leaves does not stop what others wait for

    async def _open(self, book: Book) -> Door:
        try:
            await self._make_room(book)
            log.info("loading", extra={"model": book.card.name})
            book.door = await book.open()
            book.card = replace(book.card, state="unloaded")
            return book.door
        except MoesaicError:
            book.card = replace(book.card, state="failed")
            raise
        finally:
            book.opening = None

    async def _make_room(self, wanted: Book) -> None:
        while self._budget is not None:
            loaded = [book for book in self._books.values() if book.door is not None]
            if not loaded or sum(book.bytes for book in loaded) + wanted.bytes <= self._budget:
                return
            idle = [book for book in loaded if not _works(book)]
            if not idle:
                raise Unavailable("all models in memory are at work, and there is no room for another: try again later")
            oldest = min(idle, key=lambda book: book.used)
            log.info("unloading", extra={"model": oldest.card.name})
            door, oldest.door = oldest.door, None
            assert door is not None
            await door.close()

    async def ask(self, ask: Ask) -> Answers:
        return await (await self.open(ask.model)).ask(ask)

    async def tokenize(self, ask: Ask) -> list[Mark]:
        return await (await self.open(ask.model)).tokenize(ask)

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
            if book.door is not None:
                await book.door.close()


def _works(book: Book) -> bool:
    assert book.door is not None
    return any(load.running + load.waiting for load in book.door.load().values())
