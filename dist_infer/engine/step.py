"""The step: all that one forward pass of a replica needs, as int32 words.

A step travels from the leader to every worker in one broadcast. It says only what has changed:
sequences admitted to slots and slots freed, additions to block tables, blocks to copy, and for
every sequence that takes part its span of tokens. Layout: nine header words, then the sections in
the order of `Step`'s fields, each item with its own lengths first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from dist_infer.sampling.slots import SlotParams

VERSION = 1
HEADER = 9


class Kind(IntEnum):
    """What a worker does with a step."""

    RUN = 0  # compute
    HEARTBEAT = 1  # nothing: the leader is alive and idle
    RELEASE = 2  # return to the caller; more steps may come later
    STOP = 3  # leave for good
    ERROR = 4  # raise: the leader failed
    SWAP = 5  # load the weights of the checkpoint that the message names


@dataclass(frozen=True)
class Admission:
    """A sequence enters a slot.

    Attributes:
        slot: Index in every worker's tables.
        owner: fsdp coordinate that computes it.
        rope_anchor: Length that decides its rotary regime at least.
        known: How many tokens it has already (prompt and output); later ones are outputs to be counted.
        params: The numbers it is sampled with.
        tokens: All tokens it has, where penalties need them; else empty.
    """

    slot: int
    owner: int
    rope_anchor: int
    known: int
    params: SlotParams
    tokens: list[int]


@dataclass(frozen=True)
class TableDelta:
    """Blocks appended to a slot's block table, from entry `first` on."""

    slot: int
    first: int
    blocks: list[int]


@dataclass(frozen=True)
class SpanOfStep:
    """Tokens of one sequence.

    Attributes:
        slot: The sequence.
        start: Position of the first token.
        tokens: Token ids, literal.
        rows: How many of the last tokens' logits are wanted.
        targets: Token ids to score, one for each row; empty when the row is to be sampled.
    """

    slot: int
    start: int
    tokens: list[int]
    rows: int
    targets: list[int] = field(default_factory=list)


@dataclass
class Step:
    """One step of a replica.

    Attributes:
        kind: What to do.
        number: Counts the steps of an engine.
        frees: Slots that are free again; before admissions.
        admissions: Sequences that enter slots.
        tables: Additions to block tables.
        copies: (owner, source block, target block), made before the forward pass.
        spans: The tokens, in slot order of appearance; rows of logits are numbered in this order.
        resolves: (owner, row of its previous step) whose full logits the leader wants.
        message: Text of an error, or path of a checkpoint.
    """

    kind: Kind = Kind.RUN
    number: int = 0
    frees: list[int] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    tables: list[TableDelta] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    spans: list[SpanOfStep] = field(default_factory=list)
    resolves: list[tuple[int, int]] = field(default_factory=list)
    message: str = ""

    def encode(self) -> np.ndarray:
        """This step as int32 words; the second says how many."""
        words: list[int] = list(self.frees)
        for a in self.admissions:
            words += (a.slot, a.owner, a.rope_anchor, a.known, len(a.tokens), *a.params.pack().tolist(), *a.tokens)
        for t in self.tables:
            words += (t.slot, t.first, len(t.blocks), *t.blocks)
        for copy in self.copies:
            words += copy
        for s in self.spans:
            words += (s.slot, s.start, len(s.tokens), s.rows, len(s.targets), *s.tokens, *s.targets)
        for resolve in self.resolves:
            words += resolve
        words += self.message.encode()
        counts = (len(self.frees), len(self.admissions), len(self.tables), len(self.copies), len(self.spans), len(self.resolves))
        return np.array([self.kind | VERSION << 8, HEADER + len(words), self.number, *counts, *words], dtype=np.int32)

    @classmethod
    def decode(cls, words: np.ndarray) -> Step:
        """The step that `encode` wrote."""
        head = words[:HEADER].tolist()
        assert head[0] >> 8 == VERSION, "a step of another version"
        read = _Reader(words[HEADER : head[1]])
        frees, admissions, tables, copies, spans, resolves = head[3:]
        return cls(
            Kind(head[0] & 0xFF),
            head[2],
            read.take(frees),
            [read.admission() for _ in range(admissions)],
            [read.table() for _ in range(tables)],
            [tuple(read.take(3)) for _ in range(copies)],  # type: ignore[misc]
            [read.span() for _ in range(spans)],
            [tuple(read.take(2)) for _ in range(resolves)],  # type: ignore[misc]
            bytes(read.rest()).decode(),
        )


class _Reader:
    """Walks through the words of a step."""

    def __init__(self, words: np.ndarray) -> None:
        self.words, self.at = words, 0

    def take(self, count: int) -> list[int]:
        self.at += count
        return self.words[self.at - count : self.at].tolist()

    def rest(self) -> Iterator[int]:
        return iter(self.take(len(self.words) - self.at))

    def admission(self) -> Admission:
        slot, owner, rope_anchor, known, tokens = self.take(5)
        params = SlotParams.unpack(self.words[self.at :])
        self.at += int(self.words[self.at])
        return Admission(slot, owner, rope_anchor, known, params, self.take(tokens))

    def table(self) -> TableDelta:
        slot, first, count = self.take(3)
        return TableDelta(slot, first, self.take(count))

    def span(self) -> SpanOfStep:
        slot, start, count, rows, targets = self.take(5)
        return SpanOfStep(slot, start, self.take(count), rows, self.take(targets))
