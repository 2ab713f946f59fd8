"""Responses of ``/v1/responses``, kept in memory so that a conversation can continue from one of them.

Each owner (API key) has limits of its own. It can neither read nor evict the responses of another owner. This module
does not depend on the content of a response.
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
    """One response as the client saw it (``shown``), its input items, and all messages up to and including it."""

    shown: Mapping[str, Any]
    input_items: Sequence[Mapping[str, Any]]
    messages: tuple[Mapping[str, Any], ...]

    def size(self) -> int:
        """Return the approximate size in bytes. Messages that an earlier response has too are counted again."""
        return len(msgspec.json.encode((self.shown, self.input_items, self.messages)))


@dataclass
class TenantResponses:
    """The kept responses of one owner, by id, the oldest first."""

    entries: OrderedDict[str, tuple[StoredResponse, int]] = field(default_factory=OrderedDict)
    size: int = 0
    """Total size of all entries, in bytes."""

    def drop(self, name: str) -> None:
        """Remove the response with the id ``name``."""
        self.size -= self.entries.pop(name)[1]


class ResponseStore:
    """The kept responses of all owners. An ``owner`` is the digest of an API key, or "" on a server without keys."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        """Keep at most ``max_entries`` responses, with at most ``max_bytes`` bytes in total, for each owner."""
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._owners: dict[str, TenantResponses] = {}

    def put(self, owner: str, name: str, entry: StoredResponse) -> None:
        """Keep a response of ``owner`` under the id ``name``.

        The owner's oldest responses are evicted to make room, and the new one too if it alone exceeds the limit.
        """
        responses = self._owners.setdefault(owner, TenantResponses())
        size = entry.size()
        responses.entries[name] = entry, size
        responses.size += size
        while len(responses.entries) > self._max_entries or responses.size > self._max_bytes:
            responses.drop(next(iter(responses.entries)))

    def get(self, owner: str, name: str) -> StoredResponse:
        """Return the response of ``owner`` with the id ``name``.

        Raises:
            NotFound: this owner has no response with this id; it may have been evicted.
        """
        responses = self._owners.get(owner)
        if responses is None or name not in responses.entries:
            raise NotFound(f"unknown response {name!r:.80}; it may have been evicted")
        return responses.entries[name][0]

    def drop(self, owner: str, name: str) -> None:
        """Remove the response of ``owner`` with the id ``name``.

        Raises:
            NotFound: this owner has no response with this id; it may have been evicted.
        """
        self.get(owner, name)
        self._owners[owner].drop(name)
