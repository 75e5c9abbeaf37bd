"""The step: all that one forward pass of a replica needs, as int32 words.

A step travels from the leader to every worker in one broadcast. It says only what has changed:
sequences admitted to slots and slots freed, additions to block tables, blocks to copy, and for
every sequence that takes part its span of tokens. Layout: ten header words, then the sections in
the order of `Step`'s fields, each item with its own lengths first.

A step is sent whole (`Kind.RUN`), or its plan is, in which tokens not yet known are `DECIDED`, while the ranks compute the one before.
Where the ranks find those tokens out themselves the plan is computed as it comes (`Kind.CONTINUE`); else it is made ready (`Kind.PLAN`),
and the leader sends the tokens after it (`Kind.LAUNCH`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from dist_infer.sampling.slots import SlotParams

VERSION = 3
HEADER = 10
DECIDED = -1  # stands for the token that the step before decides for the span's slot


class Kind(IntEnum):
    """What a worker does with a step."""

    RUN = 0  # compute, and answer
    HEARTBEAT = 1  # nothing: the leader is alive and idle
    RELEASE = 2  # return to the caller; more steps may come later
    STOP = 3  # leave for good
    ERROR = 4  # raise: the leader failed
    SWAP = 5  # load the weights of the checkpoint that the message names
    PLAN = 6  # make the step ready (it may be empty), and answer the one that was launched last
    LAUNCH = 7  # compute the planned step; `decided` holds its missing tokens
    RESOLVE = 8  # answer with the full logits of some rows of the step answered last
    CONTINUE = 9  # make the step ready, compute it with the tokens that the ranks know, and answer the one that was launched before


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


@dataclass(slots=True)
class SpanOfStep:
    """Tokens of one sequence.

    Attributes:
        slot: The sequence.
        start: Position of the first token.
        tokens: Token ids; in a plan the last may be `DECIDED`.
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
        resolves: (owner, row) whose full logits the leader wants.
        decided: By slot, the token that the step before decided; any where it decided none.
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
    decided: list[int] = field(default_factory=list)
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
        words += self.decided
        words += self.message.encode()
        sections = (self.frees, self.admissions, self.tables, self.copies, self.spans, self.resolves, self.decided)
        head = (self.kind | VERSION << 8, HEADER + len(words), self.number, *map(len, sections))
        return np.array([*head, *words], dtype=np.int32)

    @classmethod
    def decode(cls, words: np.ndarray) -> Step:
        """The step that `encode` wrote."""
        head = words[:HEADER].tolist()
        assert head[0] >> 8 == VERSION, "a step of another version"
        read = _Reader(words[: head[1]])
        frees, admissions, tables, copies, spans, resolves, decided = head[3:]
        return cls(
            Kind(head[0] & 0xFF),
            head[2],
            read.take(frees),
            [read.admission() for _ in range(admissions)],
            [read.table() for _ in range(tables)],
            [tuple(read.take(3)) for _ in range(copies)],  # type: ignore[misc]
            [read.span() for _ in range(spans)],
            [tuple(read.take(2)) for _ in range(resolves)],  # type: ignore[misc]
            read.take(decided),
            bytes(read.words[read.at :]).decode(),
        )


class _Reader:
    """Walks through the words of a step."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.words, self.at = array, array.tolist(), HEADER  # a list is read faster, a number at a time

    def take(self, count: int) -> list[int]:
        self.at += count
        return self.words[self.at - count : self.at]

    def admission(self) -> Admission:
        slot, owner, rope_anchor, known, tokens = self.take(5)
        params = SlotParams.unpack(self.array[self.at :])
        self.at += self.words[self.at]
        return Admission(slot, owner, rope_anchor, known, params, self.take(tokens))

    def table(self) -> TableDelta:
        slot, first, count = self.take(3)
        return TableDelta(slot, first, self.take(count))

    def span(self) -> SpanOfStep:
        slot, start, count, rows, targets = self.take(5)
        return SpanOfStep(slot, start, self.take(count), rows, self.take(targets))
