"""Answers that are kept for a while, so that a conversation can go on from one of them.

In memory only, and bounded for each owner alone: nobody sees, or pushes out, what another keeps. Knows names
and sizes. Does not know what an answer is made of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from moesaic.errors import NotFound


@dataclass(frozen=True)
class StoredResponse:
    """One answer as it was shown, what it answered, and the conversation up to and with it."""

    shown: Mapping[str, Any]
    given: Sequence[Mapping[str, Any]]
    messages: tuple[Mapping[str, Any], ...]

    def size(self) -> int:
        """Return about how many bytes it takes; what a conversation shares with an earlier one counts again."""
        return len(msgspec.json.encode((self.shown, self.given, self.messages)))


@dataclass
class TenantResponses:
    """What one owner keeps, the oldest first."""

    entries: OrderedDict[str, tuple[StoredResponse, int]] = field(default_factory=OrderedDict)
    bytes: int = 0

    def drop(self, name: str) -> None:
        self.bytes -= self.entries.pop(name)[1]


class ResponseStore:
    """The answers of everybody; ``owner`` is a key's digest, "" where there are no keys."""

    def __init__(self, most: int, bytes: int) -> None:
        """Keep at most so many answers, and so many bytes, for each owner."""
        self._most, self._bytes = most, bytes
        self._shelves: dict[str, TenantResponses] = {}

    def put(self, owner: str, name: str, entry: StoredResponse) -> None:
        """Keep an answer; the oldest ones go if there is no room, itself if it is larger than all room."""
        shelf = self._shelves.setdefault(owner, TenantResponses())
        size = entry.size()
        shelf.entries[name] = entry, size
        shelf.bytes += size
        while len(shelf.entries) > self._most or shelf.bytes > self._bytes:
            shelf.drop(next(iter(shelf.entries)))

    def get(self, owner: str, name: str) -> StoredResponse:
        """Return an answer.

        Raises:
            NotFound: this owner keeps none of that name, or does not any more.
        """
        shelf = self._shelves.get(owner)
        if shelf is None or name not in shelf.entries:
            raise NotFound(f"there is no response {name!r:.80}, or it is not kept any more")
        return shelf.entries[name][0]

    def drop(self, owner: str, name: str) -> None:
        """Keep an answer no longer.

        Raises:
            NotFound: as ``get``.
        """
        self.get(owner, name)
        self._shelves[owner].drop(name)
