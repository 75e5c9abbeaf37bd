"""A scheduler driven without a model, each of its steps checked through the workers' eyes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from dist_infer.config.engine import EngineOptions
from dist_infer.engine.blocks import BlockAllocator
from dist_infer.engine.request import Request, TokenLogprob
from dist_infer.engine.scheduler import Entry, RopeRules, Scheduler
from dist_infer.engine.sequence import Sequence
from dist_infer.engine.step import DECIDED, SpanOfStep, Step
from dist_infer.sampling.slots import SlotParams

ROPE_THRESHOLD = 8
LONGEST = 24  # tokens of a sequence
BASES = ([0] * LONGEST, [0, 1] * LONGEST, [1, 1, 0] * LONGEST)  # prompts are beginnings of these, so that prefixes are shared

Content = tuple[int, int, int]  # token, position, rotary regime


@dataclass(frozen=True)
class Limits:
    """What a run is made of."""

    owners: int = 1
    block_size: int = 4
    spare_blocks: int = 0  # more than the longest sequence needs
    max_batch_tokens: int = 8
    max_sequences: int = 4
    prefix_cache: bool = True
    chunked_prefill: bool = True
    rope: str = "default"
    overlap: bool = False  # a step is scheduled before the tokens of the one before are known

    @property
    def options(self) -> EngineOptions:
        return EngineOptions(
            block_size=self.block_size,
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            prefix_cache=self.prefix_cache,
            chunked_prefill=self.chunked_prefill,
        )

    @property
    def blocks(self) -> int:
        return 1 + -(-LONGEST // self.block_size) + self.spare_blocks

    @property
    def rules(self) -> RopeRules:
        return RopeRules(self.regime, ROPE_THRESHOLD if self.rope == "longrope" else None)

    def regime(self, length: int) -> int:
        """As `Rotary.regime`."""
        if self.rope == "default" or length <= ROPE_THRESHOLD:
            return 0
        return 1 if self.rope == "longrope" else length


@dataclass(frozen=True)
class Job:
    """A request that arrives `after` steps from the one before."""

    base: int = 0
    prompt: int = 6
    n: int = 1
    outputs: int = 4
    after: int = 0
    score_from: int | None = None
    cancel_after: int | None = None
    stop_after: int | None = None  # outputs after which it ends, as nobody could know


class Workers:
    """All ranks of a replica, as the steps describe them; of a KV block they store which tokens it holds."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.owner: dict[int, int] = {}  # of the live slots
        self.anchor: dict[int, int] = {}
        self.table: dict[int, list[int]] = {}
        self.cache: dict[tuple[int, int, int], Content] = {}

    def execute(self, step: Step) -> list[list[Content]]:
        """Apply a step; returns for each span what attention would read: its whole context."""
        size = self.limits.block_size
        for slot in step.frees:
            del self.owner[slot], self.anchor[slot], self.table[slot]
        for a in step.admissions:
            assert a.slot not in self.owner, "a slot is used twice"
            assert 0 <= a.slot < self.limits.owners * self.limits.max_sequences
            self.owner[a.slot], self.anchor[a.slot], self.table[a.slot] = a.owner, a.rope_anchor, []
        for t in step.tables:
            assert t.first == len(self.table[t.slot]) and 0 not in t.blocks
            self.table[t.slot] += t.blocks
        for owner, source, target in step.copies:
            assert len(self._holders(owner, source)) >= 1 and len(self._holders(owner, target)) == 1
            for offset in range(size):
                self.cache[owner, target, offset] = self.cache.get((owner, source, offset), (-1, -1, -1))
        entering = {a.slot for a in step.admissions}
        written: set[tuple[int, int, int]] = set()
        for span in step.spans:
            owner, table = self.owner[span.slot], self.table[span.slot]
            for position, token in enumerate(span.tokens, span.start):
                block = table[position // size]
                others = self._holders(owner, block) - {span.slot}
                assert others <= entering, "a block that is shared is written to"
                assert (owner, block, position % size) not in written, "written twice"
                written.add((owner, block, position % size))
                content = token, position, self.limits.regime(max(self.anchor[span.slot], position + 1))
                self.cache[owner, block, position % size] = content
        return [
            [self.cache[self.owner[s.slot], self.table[s.slot][p // size], p % size] for p in range(s.start + len(s.tokens))]
            for s in step.spans
        ]

    def _holders(self, owner: int, block: int) -> set[int]:
        return {slot for slot, table in self.table.items() if self.owner[slot] == owner and block in table}


@dataclass
class Run:
    """The leader's loop without a model: drives a scheduler through `jobs` and checks every step."""

    limits: Limits
    jobs: list[Job]
    launched: list[Entry] = field(default_factory=list)
    contexts: list[list[Content]] = field(default_factory=list)  # what attention read in the step launched last, entry by entry
    decided_late: int = 0  # tokens that the plan of their step did not know
    dropped: int = 0  # rows computed for sequences that had ended
    alive: list[Sequence] = field(default_factory=list)
    done: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = self.limits
        self.allocators = [BlockAllocator(limits.blocks, limits.block_size, limits.prefix_cache) for _ in range(limits.owners)]
        self.scheduler = Scheduler(limits.options, self.allocators, limits.rules)
        self.workers = Workers(limits)
        self.wanted: dict[Sequence, Job] = {}
        self.cancel_at: dict[int, list[Sequence]] = defaultdict(list)
        self.steps = 0

    def run(self) -> Run:
        arrivals = list(self.jobs)
        due = arrivals[0].after if arrivals else 0
        patience = 0
        while arrivals or self.scheduler.busy or self.launched:
            while arrivals and due <= self.steps:
                self.arrive(arrivals.pop(0))
                due += arrivals[0].after if arrivals else 0
                patience = self.steps + 50 + 4 * sum(len(s.tokens) + self.wanted[s].outputs for s in self.alive)
            for sequence in self.cancel_at[self.steps]:
                if not sequence.finished:
                    self.end(sequence, "cancelled")
            if self.scheduler.busy or self.launched:
                self.step()
                assert not self.alive or self.steps < patience or arrivals, "a sequence starves"
            self.steps += 1
        self.scheduler.check()
        assert not self.alive and len(self.done) == len(self.wanted)
        for allocator in self.allocators:
            assert allocator.available == allocator.total, "a block is not given back"
        step, _ = self.scheduler.schedule()
        self.workers.execute(step)
        assert not self.workers.table, "the workers still hold a slot"
        return self

    def arrive(self, job: Job) -> None:
        tokens = BASES[job.base][: job.prompt]
        request = Request("", tokens, score_from=job.score_from)
        parent: Sequence | None = None
        for index in range(1 if job.score_from is not None else job.n):
            prompt_len = len(tokens) - (job.score_from is not None)
            longest = len(tokens) + job.outputs
            sequence = Sequence(request, index, SlotParams(prompt_len=prompt_len), None, list(tokens), prompt_len, longest, parent)
            parent = parent or sequence
            self.wanted[sequence] = job
            self.alive.append(sequence)
            if job.cancel_after is not None:
                self.cancel_at[self.steps + job.cancel_after].append(sequence)
            self.scheduler.add(sequence)

    def step(self) -> None:
        entries, self.launched = self.launched or self.launch({}), []
        assert entries, "a step without work"
        for entry, context in zip(entries, self.contexts, strict=True):
            if entry.sequence.finished:
                self.dropped += entry.rows
            else:
                self.check_context(entry, context)
        self.scheduler.commit(entries)
        if self.limits.overlap:
            sampled = [e.sequence for e in entries if e.rows and not e.sequence.scored and not e.sequence.finished]
            self.launched = self.launch({sequence: self.next_token(sequence) for sequence in sampled})
        for entry in entries:
            entry.sequence.awaited = False
            self.answer(entry)
        self.scheduler.check()

    def launch(self, decided: dict[Sequence, int]) -> list[Entry]:
        """Schedule a step and let the workers compute it with the tokens `decided` meanwhile."""
        scheduler = self.scheduler
        before = {s: s.owner for running in scheduler.running for s in running}
        outgrown = {s for s in before if self.limits.rules.outgrown(s)}
        step, entries = scheduler.schedule()
        self.check_preemptions(before, outgrown)
        read = Step.decode(step.encode())
        assert read == step
        self.check_budgets(entries)
        for entry, span in zip(entries, read.spans, strict=True):
            assert span.tokens and span.rows == entry.rows
        read.spans = [self.whole(span, decided) for span in read.spans]
        self.contexts = self.workers.execute(read)
        scheduler.check()
        return entries

    def whole(self, span: SpanOfStep, decided: dict[Sequence, int]) -> SpanOfStep:
        """A span with all its tokens."""
        assert DECIDED not in span.tokens[:-1]
        if span.tokens[-1] != DECIDED:
            return span
        self.decided_late += 1
        token = next(token for sequence, token in decided.items() if sequence.slot == span.slot)
        return replace(span, tokens=[*span.tokens[:-1], token])

    def check_preemptions(self, before: dict[Sequence, int | None], outgrown: set[Sequence]) -> None:
        for sequence, owner in before.items():
            if sequence.slot is None and sequence not in outgrown:
                still = [s for s in before if s.owner == owner and s.slot is not None]
                assert still, "sent back although it is alone"
                assert all(s.arrival < sequence.arrival for s in still), "an older sequence is sent back for a younger one"
        queue = [s.arrival for s in self.scheduler.waiting]
        assert queue == sorted(queue), "the queue is out of order"

    def check_budgets(self, entries: list[Entry]) -> None:
        by_owner = defaultdict(list)
        for entry in entries:
            by_owner[entry.owner].append(entry.length)
        for lengths in by_owner.values():
            assert len(lengths) <= self.limits.max_sequences
            alone = len(lengths) == 1 and not self.limits.chunked_prefill
            assert sum(lengths) <= self.limits.max_batch_tokens or alone, "more tokens than a step may hold"
        if not self.limits.chunked_prefill:
            assert all(e.sequence.missing == e.length for e in entries), "a prompt is split"

    def check_context(self, entry: Entry, context: list[Content]) -> None:
        sequence = entry.sequence
        assert len(context) == entry.end
        for position, content in enumerate(context):
            # As one forward pass over all tokens would have it; dynamic scaling remembers the length of the prompt.
            length = max(sequence.prompt_len, position + 1)
            if self.limits.rope == "longrope":
                length = len(sequence.tokens)
            assert content == (sequence.tokens[position], position, self.limits.regime(length)), "the cache holds something else"

    def answer(self, entry: Entry) -> None:
        sequence = entry.sequence
        if sequence.finished:
            return
        if sequence.scored:
            for position in range(entry.end + 1 - entry.rows, entry.end + 1):
                sequence.logprobs.append(TokenLogprob(sequence.tokens[position], float(position)))
            if entry.end + 1 == len(sequence.tokens):
                self.end(sequence, "scored")
        elif entry.rows:
            assert entry.end == len(sequence.tokens)
            sequence.tokens.append(self.next_token(sequence))
            job = self.wanted[sequence]
            if len(sequence.output) in (job.outputs, job.stop_after):
                self.end(sequence, "length")

    def next_token(self, sequence: Sequence) -> int:
        base = BASES[self.wanted[sequence].base]
        return base[len(sequence.tokens)] if sequence.index % 2 == 0 else len(sequence.tokens) % 2

    def end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        self.alive.remove(sequence)
        self.done.append(sequence)
        job = self.wanted[sequence]
        if reason == "scored":
            assert job.score_from is not None
            assert [int(entry.logprob) for entry in sequence.logprobs] == list(range(job.score_from, job.prompt)), "scored once each"
