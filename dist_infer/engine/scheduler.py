"""Which sequences take part in the next step, with how many tokens, and where.

Continuous batching under one token budget for each fsdp coordinate: running sequences decode first,
then prompts enter in order of arrival, whole or in chunks. In every layer the keys and values of a step enter
the cache before any are read, so sequences that enter together share the blocks of what they have in common,
which the first of them computes. When blocks run out, the youngest
sequence of that coordinate goes back to the queue and is computed again later. The oldest is never
sent back for another, and any sequence fits the pool alone, so every one ends.

A step may be scheduled while the one before is computed: a sequence whose token is being decided goes on as if it did not end.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dist_infer.config.engine import EngineOptions
from dist_infer.engine.blocks import BlockAllocator, chain_hashes
from dist_infer.engine.sequence import Sequence
from dist_infer.engine.step import DECIDED, Admission, SpanOfStep, Step, TableDelta

# A running sequence weighs as much as this many prompt tokens when a coordinate is chosen for a new one.
RUNNING_WEIGHT = 32


@dataclass(frozen=True)
class RopeRules:
    """What the scheduler must know of rotary scalings that depend on length.

    Attributes:
        regime: Sequences whose anchors have equal regimes may share cached prefixes.
        recompute_beyond: A sequence that grows beyond this length is computed anew (longrope); None for never.
    """

    regime: Callable[[int], int]
    recompute_beyond: int | None = None

    def anchor(self, sequence: Sequence) -> int:
        """The length that decides the rotary regime of `sequence` if it were admitted now."""
        return sequence.prompt_len if self.recompute_beyond is None else max(sequence.prompt_len, len(sequence.tokens))

    def outgrown(self, sequence: Sequence) -> bool:
        """Whether `sequence` has grown out of the regime it was admitted with."""
        limit = self.recompute_beyond
        return limit is not None and sequence.rope_anchor <= limit < sequence.length


@dataclass(slots=True)
class Entry:
    """A sequence's part in a step, as it was when the step was made.

    Attributes:
        sequence: Whose.
        owner: fsdp coordinate that computes it.
        start: Position of its first token.
        length: Tokens.
        rows: Of how many of the last ones the logits are wanted.
    """

    sequence: Sequence
    owner: int
    start: int
    length: int
    rows: int

    @property
    def end(self) -> int:
        """Tokens of the sequence once they are computed."""
        return self.start + self.length


# Of each fsdp coordinate the blocks that the step being made fills, by prefix hash.
Filling = list[dict[bytes, int]]


class Scheduler:
    """Decides every step of one replica.

    Args:
        options: Token and sequence limits, for each fsdp coordinate.
        allocators: The blocks of each fsdp coordinate.
        rope: Rules of length-dependent rotary scalings.
    """

    def __init__(self, options: EngineOptions, allocators: list[BlockAllocator], rope: RopeRules) -> None:
        self.options, self.allocators, self.rope = options, allocators, rope
        self.waiting: deque[Sequence] = deque()  # in order of arrival
        self.running: list[list[Sequence]] = [[] for _ in allocators]
        self._slots = list(range(options.max_sequences * len(allocators)))
        self._frees: list[int] = []
        self._sent: dict[int, int] = {}  # slot -> blocks of its table that the workers know
        self.number = 0
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting) or any(self.running)

    @property
    def load(self) -> int:
        """Sequences waiting or running."""
        return len(self.waiting) + sum(map(len, self.running))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> tuple[Step, list[Entry]]:
        """The next step, and what each of its spans belongs to (in the order of the step's spans)."""
        step = Step(number=self.number)
        self.number += 1
        budgets = [self.options.max_batch_tokens] * len(self.allocators)
        entries: dict[Sequence, Entry] = {}
        preempted = False
        for owner in range(len(self.allocators)):
            preempted |= self._continue_running(owner, budgets, entries)
        if self.waiting and not preempted:
            filling: Filling = [{} for _ in self.allocators]
            for entry in entries.values():
                self._fill(entry, filling)
            self._admit_waiting(step, budgets, entries, filling)
        step.frees, self._frees = self._frees, []
        for entry in entries.values():
            self._describe(step, entry)
        return step, list(entries.values())

    def commit(self, entries: list[Entry]) -> None:
        """The step of `entries` is being computed: whatever is scheduled from now on finds its tokens in the cache.

        All tokens of the step are known by now. Sequences that have ended since it was scheduled leave nothing behind.
        """
        for entry in entries:
            sequence = entry.sequence
            if sequence.slot is not None:
                for key, block in self._filled(entry):
                    self.allocators[entry.owner].publish(block, key)
                sequence.computed = entry.end
                sequence.awaited = entry.rows > 0

    def remove(self, sequence: Sequence) -> None:
        """`sequence` has ended (or is no longer wanted): give back what it holds."""
        if sequence.slot is not None:
            self._withdraw(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def check(self) -> None:
        """Assert that blocks and slots are all accounted for."""
        for owner, allocator in enumerate(self.allocators):
            allocator.check([sequence.blocks for sequence in self.running[owner]])
        held = [sequence.slot for running in self.running for sequence in running if sequence.slot is not None]
        assert sorted([*held, *self._slots]) == list(range(self.options.max_sequences * len(self.allocators))), "a slot is lost"

    def _continue_running(self, owner: int, budgets: list[int], entries: dict[Sequence, Entry]) -> bool:
        """Give every running sequence of `owner` its span, decodes first; returns whether blocks ran out."""
        preempted = False
        missing = {s: s.missing for s in self.running[owner]}
        for sequence in sorted(missing, key=lambda s: (missing[s] > 1, s.arrival)):
            if sequence.slot is None:
                continue  # sent back for an older one
            if self.rope.outgrown(sequence):
                self._preempt(sequence, entries, budgets)  # may come back in this very step: blocks are not short
                continue
            length = self._chunk(missing[sequence], budgets[owner])
            if not length:
                continue
            while not self._grow(sequence, sequence.computed + length):
                victim = max(self.running[owner], key=lambda s: s.arrival)
                self._preempt(victim, entries, budgets)
                preempted = True
                if victim is sequence:
                    break
            if sequence.slot is not None:
                self._enter(sequence, length, budgets, entries)
        return preempted

    def _admit_waiting(self, step: Step, budgets: list[int], entries: dict[Sequence, Entry], filling: Filling) -> None:
        """Let waiting sequences in, in order, as long as there is room."""
        held_back: list[Sequence] = []
        while self.waiting:
            sequence = self.waiting.popleft()
            if sequence.awaited:
                held_back.append(sequence)  # it was sent back while its token is being decided
                continue
            parent = sequence.parent
            if parent is not None and not parent.finished and parent.computed < parent.prompt_len:
                held_back.append(sequence)  # its prompt is being computed by the parent
                continue
            admitted = self._fork(step, sequence, budgets) or self._place(sequence, budgets, filling)
            if not admitted:
                held_back.append(sequence)
                break
            self._admit(step, sequence)
            assert sequence.owner is not None
            length = self._chunk(sequence.missing, budgets[sequence.owner])
            self._enter(sequence, length, budgets, entries)
            self._fill(entries[sequence], filling)
        self.waiting.extendleft(reversed(held_back))

    def _fork(self, step: Step, sequence: Sequence, budgets: list[int]) -> bool:
        """Share the prompt's blocks with the parent where it runs; the last prompt token is computed again."""
        parent = sequence.parent
        if parent is None or parent.owner is None or parent.finished or len(sequence.tokens) > sequence.prompt_len:
            return False
        if self.rope.regime(parent.rope_anchor) != self.rope.regime(self.rope.anchor(sequence)):
            return False  # the parent has outgrown its prompt's regime
        owner, allocator = parent.owner, self.allocators[parent.owner]
        computed = sequence.prompt_len - 1
        shared = computed // self.options.block_size
        if len(self.running[owner]) >= self.options.max_sequences or budgets[owner] < 1 or allocator.available < 1:
            return False
        own = allocator.take(1)
        assert own is not None
        allocator.share(parent.blocks[:shared])
        if computed % self.options.block_size:
            step.copies.append((owner, parent.blocks[shared], own[0]))
        sequence.blocks = [*parent.blocks[:shared], *own]
        sequence.computed = sequence.cached = computed
        sequence.owner = owner
        return True

    def _place(self, sequence: Sequence, budgets: list[int], filling: Filling) -> bool:
        """Choose the coordinate where a sequence costs least, and give it blocks for all its tokens' first chunk."""
        sequence.rope_anchor = self.rope.anchor(sequence)
        size = self.options.block_size
        keys = self._hashes(sequence, sequence.first_row // size) if self.options.prefix_cache else []
        # A scored sequence is soon gone. While no coordinate is idle for long, tokens computed on one are time taken from all:
        # what is known there is not computed elsewhere too, only to share the load.
        running_weight = 0 if sequence.scored else RUNNING_WEIGHT
        weight = len(self.allocators) if sequence.scored or len(self.waiting) >= len(self._slots) else 1
        best: tuple[int, int, list[int]] | None = None
        for owner, allocator in enumerate(self.allocators):
            if len(self.running[owner]) >= self.options.max_sequences:
                continue
            found = allocator.find(keys, filling[owner])
            missing = sequence.missing - len(found) * size
            started = self.options.max_batch_tokens - budgets[owner]
            if budgets[owner] < 1 or (not self.options.chunked_prefill and missing > budgets[owner] and started):
                continue
            wanted = -(-(sequence.computed + sequence.missing) // size) - len(found)
            if wanted > allocator.available - allocator.idle_among(found):
                continue
            cost = weight * missing + started + running_weight * len(self.running[owner])
            if best is None or cost < best[0]:
                best = cost, owner, found
        if best is None:
            return False
        _, sequence.owner, found = best
        self.allocators[sequence.owner].share(found)
        sequence.blocks = found
        sequence.computed = len(found) * size
        sequence.cached = min(sequence.computed, sequence.prompt_len)
        grown = self._grow(sequence, sequence.computed + self._chunk(sequence.missing, budgets[sequence.owner]))
        assert grown
        return True

    def _admit(self, step: Step, sequence: Sequence) -> None:
        assert sequence.owner is not None
        sequence.rope_anchor = self.rope.anchor(sequence)
        sequence.slot = heapq.heappop(self._slots)
        self._sent[sequence.slot] = 0
        self.running[sequence.owner].append(sequence)
        params = sequence.slot_params
        tokens = sequence.tokens if params.needs_tokens and not sequence.scored else []
        step.admissions.append(Admission(sequence.slot, sequence.owner, sequence.rope_anchor, len(sequence.tokens), params, tokens))

    def _chunk(self, missing: int, budget: int) -> int:
        """How many tokens a sequence that misses so many computes next under `budget`."""
        if missing <= budget:
            return missing
        if self.options.chunked_prefill:
            return budget
        # A prompt that may not be split goes alone, over the budget if it must.
        return missing if budget == self.options.max_batch_tokens else 0

    def _enter(self, sequence: Sequence, length: int, budgets: list[int], entries: dict[Sequence, Entry]) -> None:
        assert sequence.owner is not None
        budgets[sequence.owner] = max(budgets[sequence.owner] - length, 0)
        start = sequence.computed
        rows = max(0, min(length, start + length - sequence.first_row))
        entries[sequence] = Entry(sequence, sequence.owner, start, length, rows)

    def _fill(self, entry: Entry, filling: Filling) -> None:
        """Let sequences that enter the step after `entry` find the blocks that it fills."""
        for key, block in self._filled(entry):
            filling[entry.owner].setdefault(key, block)

    def _filled(self, entry: Entry) -> Iterable[tuple[bytes, int]]:
        """Prefix hash and block of all that `entry` fills up with known tokens, when prefixes are cached."""
        sequence, size = entry.sequence, self.options.block_size
        first, full = entry.start // size, min(entry.end, len(sequence.tokens)) // size
        if full <= first or not self.options.prefix_cache:
            return ()
        return zip(self._hashes(sequence, full)[first:], sequence.blocks[first:full], strict=True)

    def _describe(self, step: Step, entry: Entry) -> None:
        """Write a span, and the blocks its workers do not know yet, into the step."""
        sequence, slot = entry.sequence, entry.sequence.slot
        assert slot is not None
        if len(sequence.blocks) > self._sent[slot]:
            step.tables.append(TableDelta(slot, self._sent[slot], sequence.blocks[self._sent[slot] :]))
            self._sent[slot] = len(sequence.blocks)
        end = entry.end
        tokens = sequence.tokens[entry.start : end]
        if len(tokens) < entry.length:
            tokens.append(DECIDED)
        targets = sequence.tokens[end + 1 - entry.rows : end + 1] if sequence.scored and entry.rows else []
        step.spans.append(SpanOfStep(slot, entry.start, tokens, entry.rows, targets))

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for `tokens` tokens; False when the blocks for it are not there."""
        assert sequence.owner is not None
        more = -(-tokens // self.options.block_size) - len(sequence.blocks)
        if more > 0:
            blocks = self.allocators[sequence.owner].take(more)
            if blocks is None:
                return False
            sequence.blocks = [*sequence.blocks, *blocks]
        return True

    def _preempt(self, sequence: Sequence, entries: dict[Sequence, Entry], budgets: list[int]) -> None:
        """Send `sequence` back to its place in the queue, before all that came later."""
        entry = entries.pop(sequence, None)
        if entry is not None and sequence.owner is not None:
            budgets[sequence.owner] += entry.length
        self._withdraw(sequence)
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)
        self.preemptions += 1

    def _withdraw(self, sequence: Sequence) -> None:
        """Take `sequence` off its coordinate."""
        assert sequence.slot is not None and sequence.owner is not None
        self.allocators[sequence.owner].release(sequence.blocks)
        self.running[sequence.owner].remove(sequence)
        self._frees.append(sequence.slot)
        heapq.heappush(self._slots, sequence.slot)
        sequence.blocks, sequence.hashes = [], []
        sequence.slot = sequence.owner = None
        sequence.computed = 0

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Prefix hashes of the first `count` blocks of `sequence`."""
        size, known = self.options.block_size, sequence.hashes
        if len(known) < count:
            previous = known[-1] if known else self.rope.regime(sequence.rope_anchor).to_bytes(8, "little")
            known += chain_hashes(previous, sequence.tokens[len(known) * size : count * size], size)
        return known[:count]
