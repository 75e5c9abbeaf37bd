"""The scheduler and the block allocators under random traffic, seen through the workers' eyes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

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


limits = st.builds(
    Limits,
    owners=st.integers(1, 3),
    block_size=st.sampled_from([1, 2, 3, 4, 8, 32]),
    spare_blocks=st.sampled_from([0, 0, 1, 3, 12]),
    max_batch_tokens=st.integers(1, 30),
    max_sequences=st.sampled_from([6, 3, 2, 1]),
    prefix_cache=st.booleans(),
    chunked_prefill=st.booleans(),
    rope=st.sampled_from(["default", "dynamic", "longrope"]),
    overlap=st.booleans(),
)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    prompt = draw(st.sampled_from([*range(1, LONGEST)]))
    return Job(
        base=draw(st.integers(0, len(BASES) - 1)),
        prompt=prompt,
        n=draw(st.sampled_from([1, 1, 2, 5])),
        outputs=draw(st.integers(1, LONGEST - prompt)),
        after=draw(st.sampled_from([0, 0, 0, 1, 3, 7])),
        score_from=draw(st.one_of(st.none(), st.none(), st.integers(1, prompt - 1))) if prompt > 1 else None,
        cancel_after=draw(st.sampled_from([None, None, None, None, 0, 2, 5])),
        stop_after=draw(st.sampled_from([None, None, 1, 3])),
    )


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(limits=limits, jobs=st.lists(jobs(), min_size=1, max_size=12))
@example(limits=Limits(rope="longrope"), jobs=[Job(prompt=1, outputs=9)])  # alone, it grows out of its regime
@example(  # a parent grows out of its regime before its child is let in
    limits=Limits(block_size=1, max_batch_tokens=2, max_sequences=2, prefix_cache=False, chunked_prefill=False, rope="longrope"),
    jobs=[*[Job(prompt=1, outputs=1)] * 5, Job(prompt=8, n=2, outputs=3)],
)
@example(  # sent back while older children of another request wait
    limits=Limits(block_size=1, max_batch_tokens=9, max_sequences=3, prefix_cache=False),
    jobs=[Job(prompt=1, outputs=1), Job(prompt=2, outputs=6), Job(prompt=12, n=5, outputs=2), Job(prompt=1, outputs=5)],
)
@example(  # sent back when some of its tokens are scored
    limits=Limits(block_size=1, max_sequences=3, prefix_cache=False),
    jobs=[Job(prompt=1, outputs=1), Job(prompt=7, n=5, outputs=3), Job(prompt=8, score_from=1)],
)
def test_random_traffic(limits: Limits, jobs: list[Job]) -> None:
    Run(limits, jobs).run()


def test_crowds() -> None:
    """Many requests in little memory, and that the traffic is what it should be."""
    preemptions = forks = cached = decided_late = dropped = 0
    for seed in range(40):
        random = Random(seed)
        limits = Limits(
            owners=1 + seed % 3,
            block_size=random.choice([1, 2, 3, 4, 8]),
            spare_blocks=random.choice([0, 4]),
            max_batch_tokens=random.choice([2, 9, 40]),
            max_sequences=random.choice([3, 8]),
            prefix_cache=seed % 2 == 0,
            chunked_prefill=seed % 4 < 2,
            rope=random.choice(["default", "dynamic", "longrope"]),
            overlap=seed % 8 < 4,
        )
        jobs = []
        for _ in range(30):
            prompt = random.randint(1, LONGEST - 1)
            outputs = random.randint(1, LONGEST - prompt)
            stop = random.choice([None, 2, 5])
            jobs.append(Job(random.randrange(3), prompt, random.choice([1, 4]), outputs, random.choice([0, 0, 2]), stop_after=stop))
        run = Run(limits, jobs).run()
        preemptions += run.scheduler.preemptions
        cached += sum(s.cached for s in run.done if s.parent is None)
        forks += sum(s.cached == s.prompt_len - 1 > 0 for s in run.done if s.parent is not None)
        decided_late += run.decided_late
        dropped += run.dropped
    assert min(preemptions, forks, cached, decided_late, dropped) > 300


def plain(*prompts: list[int], n: int = 1, score_from: int | None = None) -> list[Sequence]:
    """Sequences of requests for `prompts`."""
    made = []
    for tokens in prompts:
        request = Request("", tokens, score_from=score_from)
        parent = None
        for index in range(n):
            prompt_len = len(tokens) - (score_from is not None)
            made.append(Sequence(request, index, SlotParams(prompt_len=prompt_len), None, list(tokens), prompt_len, LONGEST, parent))
            parent = parent or made[-1]
    return made


def start(limits: Limits, sequences: list[Sequence]) -> Scheduler:
    allocators = [BlockAllocator(limits.blocks, limits.block_size, limits.prefix_cache) for _ in range(limits.owners)]
    scheduler = Scheduler(limits.options, allocators, limits.rules)
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def spans(scheduler: Scheduler, decided: int = 9) -> list[tuple[int, int, int]]:
    """(slot, start, length) of the next step, which is carried out."""
    step, entries = scheduler.schedule()
    scheduler.commit(entries)
    for entry in entries:
        entry.sequence.awaited = False
        if entry.rows:
            entry.sequence.tokens.append(decided)
    return [(span.slot, span.start, len(span.tokens)) for span in step.spans]


def test_a_long_prompt_enters_in_chunks_beside_running_sequences() -> None:
    scheduler = start(Limits(max_batch_tokens=6, spare_blocks=9), plain([1, 2], list(range(12))))
    assert spans(scheduler) == [(0, 0, 2), (1, 0, 4)]
    assert spans(scheduler) == [(0, 2, 1), (1, 4, 5)]
    assert spans(scheduler) == [(0, 3, 1), (1, 9, 3)]
    assert spans(scheduler) == [(0, 4, 1), (1, 12, 1)]


def test_a_step_is_scheduled_before_the_tokens_of_the_one_before_are_known() -> None:
    ends, goes_on, scored = *plain([1, 2, 3], [4, 5]), plain(list(range(12)), score_from=2)[0]
    ends.longest = 4
    scheduler = start(Limits(max_batch_tokens=9, spare_blocks=9), [ends, goes_on, scored])
    step, entries = scheduler.schedule()
    assert [(span.tokens, span.rows) for span in step.spans] == [([1, 2, 3], 1), ([4, 5], 1), ([0, 1, 2, 3], 3)]
    scheduler.commit(entries)
    step, entries = scheduler.schedule()  # the first can only have its last token: it is not computed
    assert [(span.start, span.tokens, span.rows) for span in step.spans] == [(2, [DECIDED], 1), (4, [4, 5, 6, 7, 8, 9, 10], 7)]
    ends.finish_reason = goes_on.finish_reason = "stop"
    scheduler.remove(ends)
    scheduler.remove(goes_on)
    scheduler.commit(entries)
    scheduler.check()
    step, entries = scheduler.schedule()
    assert not step.spans and step.frees == [0, 1] and scored.missing == 0


def test_a_block_with_the_token_after_a_stop_is_not_found() -> None:
    stopped, again = plain([1, 2, 3], [1, 2, 3, 9, 9])
    scheduler = start(Limits(spare_blocks=9), [stopped])
    _, entries = scheduler.schedule()
    scheduler.commit(entries)
    _, entries = scheduler.schedule()  # its token fills a block
    stopped.tokens.append(9)
    stopped.finish_reason = "stop"
    scheduler.remove(stopped)
    scheduler.commit(entries)
    scheduler.check()
    scheduler.add(again)
    scheduler.schedule()
    assert again.cached == 0


def test_a_prompt_that_may_not_be_split_waits_and_goes_alone() -> None:
    sequences = plain([1, 2], list(range(12)), [3])
    scheduler = start(Limits(max_batch_tokens=6, spare_blocks=9, chunked_prefill=False), sequences)
    assert spans(scheduler) == [(0, 0, 2)]
    assert spans(scheduler) == [(0, 2, 1)]
    scheduler.remove(sequences[0])
    assert spans(scheduler) == [(0, 0, 12)]
    assert spans(scheduler) == [(0, 12, 1), (1, 0, 1)]


def test_forks_share_the_prompt_and_copy_only_its_last_block() -> None:
    sequences = plain(list(range(10)), n=3)
    scheduler = start(Limits(block_size=4, max_batch_tokens=32, spare_blocks=9), sequences)
    assert spans(scheduler) == [(0, 0, 10)]
    step, _ = scheduler.schedule()
    assert [(span.slot, span.start, len(span.tokens)) for span in step.spans] == [(0, 10, 1), (1, 9, 1), (2, 9, 1)]
    tables = [sequence.blocks for sequence in sequences]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert step.copies == [(0, tables[0][2], tables[1][2]), (0, tables[0][2], tables[2][2])]


def test_forks_of_a_prompt_that_ends_with_a_block_copy_nothing() -> None:
    scheduler = start(Limits(block_size=4, max_batch_tokens=32, spare_blocks=9), plain(list(range(9)), n=2))
    spans(scheduler)
    step, _ = scheduler.schedule()
    assert step.copies == [] and len(step.spans) == 2


def test_coordinates_are_chosen_by_cached_prefix_and_by_load() -> None:
    limits = Limits(owners=2, block_size=4, max_batch_tokens=64, spare_blocks=9)
    first, second, third, fourth = plain([1] * 17, [2] * 17, [1] * 17 + [3], [2] * 17 + [3])
    scheduler = start(limits, [first, second])
    spans(scheduler)
    assert (first.owner, second.owner) == (0, 1)
    for sequence in (fourth, third):
        scheduler.add(sequence)
    assert spans(scheduler)[2:] == [(2, 16, 2), (3, 16, 2)]
    assert (third.owner, fourth.owner) == (0, 1)
    assert (third.cached, fourth.cached) == (16, 16)


def test_sequences_that_enter_together_share_what_the_first_computes() -> None:
    question = list(range(10))
    sequences = plain(*[[*question, choice] for choice in range(4)], score_from=10)
    scheduler = start(Limits(block_size=4, max_batch_tokens=32, spare_blocks=9), sequences)
    step, entries = scheduler.schedule()
    assert [(span.start, len(span.tokens)) for span in step.spans] == [(0, 10), (8, 2), (8, 2), (8, 2)]
    assert len({tuple(sequence.blocks[:2]) for sequence in sequences}) == 1
    assert len({sequence.blocks[2] for sequence in sequences}) == 4
    assert [sequence.cached for sequence in sequences] == [0, 8, 8, 8]
    scheduler.commit(entries)
    for sequence in sequences:
        scheduler.remove(sequence)
    assert scheduler.allocators[0].available == scheduler.allocators[0].total


def test_only_blocks_that_the_step_fills_are_shared() -> None:
    """A prompt that enters in chunks is found as far as it has come."""
    first, second = plain([*range(12)], [*range(12), 7])
    scheduler = start(Limits(block_size=4, max_batch_tokens=9, max_sequences=2, spare_blocks=9), [first])
    assert spans(scheduler) == [(0, 0, 9)]
    scheduler.add(second)
    assert spans(scheduler) == [(0, 9, 3), (1, 12, 1)]
    assert first.blocks[:3] == second.blocks[:3]


def test_questions_share_out_over_coordinates_and_their_choices_stay_together() -> None:
    sequences = plain(*[[question] * 60 + [choice] for question in range(6) for choice in range(4)], score_from=60)
    scheduler = start(Limits(owners=2, block_size=4, max_batch_tokens=256, max_sequences=16, spare_blocks=99), sequences)
    _, entries = scheduler.schedule()
    assert len(entries) == 24
    owners = [{sequence.owner for sequence in sequences[first : first + 4]} for first in range(0, 24, 4)]
    assert all(len(found) == 1 for found in owners)
    assert sum(found == {0} for found in owners) == 3


def test_tokens_found_in_the_cache_are_of_the_prompt() -> None:
    """A sequence that comes back finds its own output too; that is not counted."""
    older, younger = plain([1] * 4, [2] * 4)
    scheduler = start(Limits(block_size=2, spare_blocks=0), [older, younger])
    while not scheduler.preemptions:
        spans(scheduler)
    assert younger.slot is None and len(younger.tokens) > 6
    scheduler.remove(older)
    spans(scheduler)
    assert younger.computed > younger.cached == 4
