"""KV-cache blocks of one fsdp coordinate: who holds them, and which prompt prefixes they hold.

A block is free, held (by one sequence or more), or idle: held by nobody but still findable by the
hash of the tokens it stores. Idle blocks are given away, the longest unused first, when no free one is left.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np


def chain_hashes(previous: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Of each full block of `tokens` a hash of it and of all that came before it.

    Args:
        previous: The hash of what came before `tokens`.
        tokens: Token ids.
        block_size: Tokens a block.
    """
    words, width = np.asarray(tokens, dtype=np.int32).tobytes(), 4 * block_size
    hashes: list[bytes] = []
    for stop in range(width, len(words) + 1, width):
        previous = hashlib.blake2b(previous + words[stop - width : stop], digest_size=16).digest()
        hashes.append(previous)
    return hashes


class BlockAllocator:
    """Reference-counted blocks 1 to `blocks - 1`; block 0 belongs to nobody."""

    def __init__(self, blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.total = blocks - 1
        self._free = list(range(1, blocks))  # a heap: low ids first keeps the blocks in use close together
        self._holders = [0] * blocks
        self._hash: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be had now."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks held by one holder, or None when there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = heapq.heappop(self._free)
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Hold `blocks`, each held or idle, once more."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of `blocks`, the last of a sequence first, so that prefixes stay findable longest."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is not held"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._hash[block] is None:
                    heapq.heappush(self._free, block)
                else:
                    self._idle[block] = None

    def find(self, hashes: Sequence[bytes], filling: Mapping[bytes, int]) -> list[int]:
        """Blocks of the longest prefix of `hashes` that is known here, or in `filling`; they are not held for the caller yet."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key, filling.get(key))
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, computed block findable; the first to hold these tokens stays the one that is found."""
        if self.prefix_cache and self._hash[block] is None and key not in self._block_of:
            self._hash[block] = key
            self._block_of[key] = block

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody holds."""
        return sum(self._holders[block] == 0 for block in blocks)

    def flush(self) -> None:
        """Forget every prefix (the weights have changed)."""
        for block in list(self._idle):
            heapq.heappush(self._free, block)
        self._idle.clear()
        self._hash = [None] * len(self._hash)
        self._block_of.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Assert that no block is lost or shared wrongly, given the block tables of all sequences."""
        count = [0] * len(self._holders)
        for blocks in held:
            for block in blocks:
                count[block] += 1
        assert count == self._holders, "blocks held differ from the block tables"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle, "a block is free twice"
        assert all((block in free or block in idle) == (holders == 0) for block, holders in enumerate(count) if block), "a block is lost"
        assert all(self._hash[block] == key for key, block in self._block_of.items()), "a hash names another block"

    def _forget(self, block: int) -> None:
        key = self._hash[block]
        if key is not None:
            del self._block_of[key]
            self._hash[block] = None
