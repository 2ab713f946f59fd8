"""Block allocator of the key/value cache, with reference counts and a prefix cache.

A block is free, idle (no references, but its contents are known and can be reused) or held by one or more sequences.
This module handles block numbers and digests of their contents. It does not depend on sequences, tensors or devices.

The prefix cache uses a chain of SHA-256 digests over tagged fields: the digest of a block covers the salt (one
per tenant), all earlier tokens of the sequence and the block's own tokens. Only full blocks have a digest, so a block
that is still being written is never shared. With a short or unkeyed hash, one tenant could find or forge the prefix of
another. This hash costs about a microsecond per block.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

_ROOT = b"moesaic/prefix/1/root\0"
_BLOCK = b"moesaic/prefix/1/block\0"


def extend(digests: list[bytes], salt: str, ids: Sequence[int], size: int) -> None:
    """Append to ``digests`` the digests that it lacks for the full blocks of ``ids``.

    Args:
        digests: the digests of the first blocks of the sequence; the list is extended in place.
        salt: the salt of the request; requests with different salts share no blocks.
        ids: the tokens of the sequence from its start.
        size: number of tokens in a block.
    """
    for begin in range(len(digests) * size, len(ids) - size + 1, size):
        parent = digests[-1] if digests else _root(salt)
        packed = struct.pack(f"<{size}q", *ids[begin : begin + size])
        digests.append(hashlib.sha256(_BLOCK + parent + packed).digest())


def _root(salt: str) -> bytes:
    return hashlib.sha256(_ROOT + salt.encode("utf-8", "surrogatepass")).digest()


class Blocks:
    """Allocator of the ``count`` blocks of the cache, each of ``size`` tokens.

    Every operation on one block takes constant time.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))  # no known contents; allocated from the end
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._refs = [0] * count
        self._digest: list[bytes | None] = [None] * count
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Number of blocks that ``take`` can allocate now: those that are free or idle."""
        return len(self._free) + len(self._idle)

    def is_idle(self, block: int) -> bool:
        """Return whether no sequence references ``block``, but the prefix cache still has its contents."""
        return block in self._idle

    def take(self) -> int:
        """Allocate a free block or, if there is none, the least recently used idle block; return its number."""
        assert self.available, "take() called without checking available"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._remove_digest(block)
        self._refs[block] = 1
        return block

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the cached blocks that match the longest prefix of ``digests``, without adding references."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """Add the reference of one more sequence to a block that ``find`` returned."""
        self._idle.pop(block, None)
        self._refs[block] += 1

    def drop(self, block: int) -> bool:
        """Remove one reference from ``block``; return whether it was the last one, so that the block can be reused."""
        assert self._refs[block] > 0, f"block {block} is dropped but has no references"
        self._refs[block] -= 1
        if self._refs[block]:
            return False
        if self._digest[block] is None:
            self._free.append(block)
        else:
            self._idle[block] = None
        return True

    def publish(self, block: int, digest: bytes) -> None:
        """Add a full block that a sequence holds to the prefix cache, so that ``find`` returns it for ``digest``.

        If another block already has this digest, that block stays in the prefix cache and this one is not added.
        """
        assert self._refs[block] > 0, f"block {block} is published but has no references"
        if digest not in self._block_of and self._digest[block] is None:
            self._block_of[digest] = block
            self._digest[block] = digest

    def forget(self, block: int) -> None:
        """Remove ``block`` from the prefix cache, so that ``find`` no longer returns it."""
        if self._digest[block] is not None:
            self._remove_digest(block)
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def _remove_digest(self, block: int) -> None:
        digest = self._digest[block]
        assert digest is not None and self._block_of[digest] == block, f"block {block} lost its digest"
        del self._block_of[digest]
        self._digest[block] = None

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that the reference counts match ``tables``, and that no block leaked.

        ``tables`` has the block table of every sequence; -1 is no block.
        """
        held = Counter(block for table in tables for block in table if block >= 0)
        assert [held[block] for block in range(self.count)] == self._refs, "reference counts differ from the tables"
        kinds = [*self._free, *self._idle, *held]
        assert sorted(kinds) == list(range(self.count)), "a block has no state, or two"
        named = {block: digest for block, digest in enumerate(self._digest) if digest is not None}
        assert {digest: block for block, digest in named.items()} == self._block_of, (
            "the prefix index and the blocks differ"
        )
        assert all(block in named for block in self._idle), "an idle block has no digest"
        assert not any(block in named for block in self._free), "a free block has a digest"
