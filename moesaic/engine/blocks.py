"""Blocks of cache places: who holds which, and which prefixes are already in them.

A block is free, idle (nobody holds it, but its contents are known and can be found again) or held
by one or more sequences. Knows numbers of blocks and digests of what is in them. Does not know
sequences, tensors or devices.

Prefixes are found by a chain of SHA-256 digests over tagged fields: a block's digest covers the
salt, every token before it and its own. Only full blocks have one, so a block that is still being
written is never shared. A short or unkeyed hash would let one tenant find, or forge, another's
prefix; the cost of this one is about a microsecond for each block.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

_ROOT = b"moesaic/prefix/1/root\0"
_BLOCK = b"moesaic/prefix/1/block\0"


def extend(digests: list[bytes], salt: str, ids: Sequence[int], size: int) -> None:
    """Append the digests of the full blocks of ``ids`` that ``digests`` does not cover yet."""
    for begin in range(len(digests) * size, len(ids) - size + 1, size):
        parent = digests[-1] if digests else _root(salt)
        packed = struct.pack(f"<{size}q", *ids[begin : begin + size])
        digests.append(hashlib.sha256(_BLOCK + parent + packed).digest())


def _root(salt: str) -> bytes:
    return hashlib.sha256(_ROOT + salt.encode("utf-8", "surrogatepass")).digest()


class Blocks:
    """``count`` blocks of ``size`` token places each. Every operation on one block takes constant time."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))  # contents unknown; taken from the end
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._refs = [0] * count
        self._digest: list[bytes | None] = [None] * count
        self._where: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks could be taken now."""
        return len(self._free) + len(self._idle)

    def is_idle(self, block: int) -> bool:
        """Return whether nobody holds ``block`` but its contents are known."""
        return block in self._idle

    def take(self) -> int:
        """Hand out a block with unknown contents; the longest unused known one where none is free."""
        assert self.available, "take() without asking for available first"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unname(block)
        self._refs[block] = 1
        return block

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks that hold the longest known prefix of ``digests``, without taking them."""
        found = []
        for digest in digests:
            block = self._where.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, block: int) -> None:
        """Hold a block that ``find`` returned."""
        self._idle.pop(block, None)
        self._refs[block] += 1

    def drop(self, block: int) -> bool:
        """Let go of a block; return whether nobody holds it any more."""
        assert self._refs[block] > 0, f"block {block} is dropped but nobody holds it"
        self._refs[block] -= 1
        if self._refs[block]:
            return False
        if self._digest[block] is None:
            self._free.append(block)
        else:
            self._idle[block] = None
        return True

    def publish(self, block: int, digest: bytes) -> None:
        """Say that a held block is full and what is in it. The first block with a given digest is the one found."""
        assert self._refs[block] > 0, f"block {block} is published but nobody holds it"
        if digest not in self._where and self._digest[block] is None:
            self._where[digest] = block
            self._digest[block] = digest

    def forget(self, block: int) -> None:
        """Never find this block again under what it was published as."""
        if self._digest[block] is not None:
            self._unname(block)
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def _unname(self, block: int) -> None:
        digest = self._digest[block]
        assert digest is not None and self._where[digest] == block, f"block {block} lost its digest"
        del self._where[digest]
        self._digest[block] = None

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that these tables (-1: no block) hold exactly what is held, and that nothing leaked."""
        held = Counter(block for table in tables for block in table if block >= 0)
        assert [held[block] for block in range(self.count)] == self._refs, "reference counts differ from the tables"
        kinds = [*self._free, *self._idle, *held]
        assert sorted(kinds) == list(range(self.count)), "a block is in no place, or in two"
        named = {block: digest for block, digest in enumerate(self._digest) if digest is not None}
        assert {digest: block for block, digest in named.items()} == self._where, "the index and the blocks differ"
        assert all(block in named for block in self._idle), "an idle block has no digest"
        assert not any(block in named for block in self._free), "a free block has a digest"
