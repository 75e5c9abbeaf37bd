"""The scheduler and the block allocators under random traffic."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.engine.schedules import BASES, LONGEST, Job, Limits, Run

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
@example(limits=Limits(rope="longrope", overlap=True), jobs=[Job(prompt=1, outputs=9)])  # while a token of it is being decided
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
