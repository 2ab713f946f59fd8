"""Responses that are kept in memory for a while, so that a conversation can continue from one of them.

Each owner has limits of its own: it can neither read nor evict what another owner keeps. This module does not know
what a response is made of.
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
    """One response as the client saw it, its input items, and the conversation up to and including it."""

    shown: Mapping[str, Any]
    input_items: Sequence[Mapping[str, Any]]
    messages: tuple[Mapping[str, Any], ...]

    def size(self) -> int:
        """Return about how many bytes it takes; text shared with an earlier response counts again."""
        return len(msgspec.json.encode((self.shown, self.input_items, self.messages)))


@dataclass
class TenantResponses:
    """The responses of one owner, the oldest first."""

    entries: OrderedDict[str, tuple[StoredResponse, int]] = field(default_factory=OrderedDict)
    size: int = 0
    """Bytes of all entries."""

    def drop(self, name: str) -> None:
        """Remove a response."""
        self.size -= self.entries.pop(name)[1]


class ResponseStore:
    """The responses of all owners. ``owner`` is a key's digest, "" on a server without keys."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        """Keep at most this many responses, and this many bytes, for each owner."""
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._owners: dict[str, TenantResponses] = {}

    def put(self, owner: str, name: str, entry: StoredResponse) -> None:
        """Keep a response. The oldest ones are evicted to make room, and the new one itself if it is too large."""
        responses = self._owners.setdefault(owner, TenantResponses())
        size = entry.size()
        responses.entries[name] = entry, size
        responses.size += size
        while len(responses.entries) > self._max_entries or responses.size > self._max_bytes:
            responses.drop(next(iter(responses.entries)))

    def get(self, owner: str, name: str) -> StoredResponse:
        """Return a response.

        Raises:
            NotFound: this owner has no response of that name, or it was evicted.
        """
        responses = self._owners.get(owner)
        if responses is None or name not in responses.entries:
            raise NotFound(f"unknown response {name!r:.80}; it may have been evicted")
        return responses.entries[name][0]

    def drop(self, owner: str, name: str) -> None:
        """Remove a response.

        Raises:
            NotFound: this owner has no response of that name, or it was evicted.
        """
        self.get(owner, name)
        self._owners[owner].drop(name)
