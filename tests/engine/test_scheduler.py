"""The steps that the scheduler makes of a few sequences, by hand."""

from __future__ import annotations

from dist_infer.engine.blocks import BlockAllocator
from dist_infer.engine.request import Request
from dist_infer.engine.scheduler import Scheduler
from dist_infer.engine.sequence import Sequence
from dist_infer.engine.step import DECIDED
from dist_infer.sampling.slots import SlotParams
from tests.engine.schedules import LONGEST, Limits


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
