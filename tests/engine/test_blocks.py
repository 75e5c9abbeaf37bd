"""The blocks of one fsdp coordinate."""

from __future__ import annotations

import pytest

from dist_infer.engine.blocks import BlockAllocator, chain_hashes

KEYS = [bytes([i]) * 16 for i in range(10)]


def cached(allocator: BlockAllocator, count: int) -> list[int]:
    """`count` idle blocks that hold the prefix KEYS[:count]."""
    blocks = allocator.take(count)
    assert blocks is not None
    for block, key in zip(blocks, KEYS, strict=False):
        allocator.publish(block, key)
    allocator.release(blocks)
    return blocks


def test_block_0_is_never_given() -> None:
    allocator = BlockAllocator(4, 16, prefix_cache=True)
    assert allocator.total == allocator.available == 3
    assert allocator.take(3) == [1, 2, 3]
    assert allocator.available == 0


def test_all_or_nothing() -> None:
    allocator = BlockAllocator(4, 16, prefix_cache=True)
    assert allocator.take(4) is None
    assert allocator.available == 3
    assert allocator.take(0) == []


def test_low_blocks_first_whatever_the_order_they_came_back_in() -> None:
    allocator = BlockAllocator(6, 16, prefix_cache=True)
    allocator.take(5)
    allocator.release([4, 2, 5])
    assert allocator.take(2) == [2, 4]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    allocator = BlockAllocator(3, 16, prefix_cache=True)
    allocator.take(2)
    allocator.share([1])
    allocator.release([1, 2])
    assert allocator.available == 1
    allocator.check([[1]])
    allocator.release([1])
    allocator.check([])
    with pytest.raises(AssertionError, match="block 1 is not held"):
        allocator.release([1])


def test_a_prefix_is_found_up_to_the_first_unknown_block() -> None:
    allocator = BlockAllocator(6, 16, prefix_cache=True)
    blocks = cached(allocator, 3)
    assert allocator.find(KEYS, {}) == blocks
    assert allocator.find([KEYS[0], KEYS[5], KEYS[1]], {}) == blocks[:1]
    assert allocator.find(KEYS[1:], {}) == blocks[1:]  # a key says all that came before it
    assert allocator.idle_among(blocks) == 3
    allocator.share(blocks[:2])
    assert allocator.idle_among(blocks) == 1
    allocator.check([blocks[:2]])


def test_idle_blocks_go_last_and_the_end_of_a_prefix_before_its_beginning() -> None:
    allocator = BlockAllocator(6, 16, prefix_cache=True)
    first, second, third = cached(allocator, 3)
    assert allocator.available == 5
    assert allocator.take(3) == [4, 5, third]
    assert allocator.find(KEYS, {}) == [first, second]
    assert allocator.take(1) == [second]
    assert allocator.find(KEYS, {}) == [first]
    allocator.check([[4, 5, third, second]])


def test_the_longest_unused_prefix_goes_first() -> None:
    allocator = BlockAllocator(3, 16, prefix_cache=True)
    one, two = allocator.take(2) or []
    allocator.publish(one, KEYS[0])
    allocator.publish(two, KEYS[1])
    allocator.release([one])
    allocator.release([two])
    allocator.share([one])  # used again
    allocator.release([one])
    assert allocator.take(1) == [two]


def test_the_first_block_with_some_tokens_stays_the_one_that_is_found() -> None:
    allocator = BlockAllocator(4, 16, prefix_cache=True)
    first, second = allocator.take(2) or []
    allocator.publish(first, KEYS[0])
    allocator.publish(second, KEYS[0])
    allocator.publish(first, KEYS[1])
    assert allocator.find([KEYS[0]], {}) == [first]
    assert allocator.find([KEYS[1]], {}) == []
    allocator.release([first, second])
    allocator.check([])
    assert allocator.take(3) == [second, 3, first]


def test_without_a_prefix_cache_nothing_is_found() -> None:
    allocator = BlockAllocator(4, 16, prefix_cache=False)
    cached(allocator, 3)
    assert allocator.find(KEYS, {}) == []


def test_new_weights_forget_every_prefix() -> None:
    allocator = BlockAllocator(6, 16, prefix_cache=True)
    held = allocator.take(1) or []
    allocator.publish(held[0], KEYS[7])
    cached(allocator, 3)
    allocator.flush()
    assert allocator.find(KEYS, {}) == allocator.find(KEYS[7:], {}) == []
    assert allocator.available == 4
    allocator.check([held])
    allocator.release(held)
    allocator.check([])
    assert sorted(allocator.take(5) or []) == [1, 2, 3, 4, 5]


def test_check_finds_what_is_wrong() -> None:
    allocator = BlockAllocator(4, 16, prefix_cache=True)
    held = allocator.take(2) or []
    for tables in ([held[:1]], [held, held], []):
        with pytest.raises(AssertionError, match="blocks held differ"):
            allocator.check(tables)


def test_a_hash_tells_tokens_their_order_and_all_before() -> None:
    blocks = [[1, 2], [2, 1], [1, 2, 3], [258]]
    hashes = {chain_hashes(before, tokens, len(tokens))[0] for before in (b"", KEYS[0]) for tokens in blocks}
    assert len(hashes) == 8
    assert chain_hashes(KEYS[0], [1, 2], 2) == chain_hashes(KEYS[0], (1, 2), 2)


def test_hashes_go_on_where_they_ended_and_leave_out_a_block_that_is_not_full() -> None:
    whole = chain_hashes(b"", [1, 2, 3, 4, 5, 6, 7], 2)
    first = chain_hashes(b"", [1, 2, 3, 4], 2)
    assert whole == [*first, *chain_hashes(first[-1], [5, 6], 2)]
    assert chain_hashes(b"", [1], 2) == []
