"""The wire format of a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_infer.engine.step import DECIDED, Admission, Kind, SpanOfStep, Step, TableDelta
from dist_infer.sampling.slots import SlotParams

FULL = Step(
    number=2**31 - 1,
    frees=[3, 1],
    admissions=[
        Admission(0, 2, 131072, 5, SlotParams(seed=2**63 - 1, temperature=0.7, banned=(2, 9), logit_bias=((1, -0.1),)), [4, 5, 6, 7, 8]),
        Admission(1, 0, 0, 1, SlotParams(), []),
    ],
    tables=[TableDelta(0, 0, [7, 8, 9]), TableDelta(5, 12, [1])],
    copies=[(0, 1, 2), (2, 2, 3)],
    spans=[SpanOfStep(0, 0, [4, 5, 6], 2, [5, 6]), SpanOfStep(1, 100, [7], 1), SpanOfStep(5, 3, [1, 2], 0)],
    resolves=[(0, 3), (1, 0)],
)


@pytest.mark.parametrize(
    "step",
    [
        FULL,
        Step(),
        *(Step(kind, 7) for kind in Kind),
        Step(Kind.ERROR, message="no such file: données/ünïcode 😀\nand a second line"),
        Step(frees=[1], spans=[SpanOfStep(0, 0, [1], 1)]),
        Step(admissions=FULL.admissions[1:]),
        Step(copies=[(0, 1, 2)], resolves=[(1, 2)]),
        Step(Kind.PLAN, spans=[SpanOfStep(0, 7, [DECIDED], 1), SpanOfStep(3, 0, [4, 5], 1)]),
        Step(Kind.LAUNCH, decided=[9, 0, 2**31 - 1]),
    ],
)
def test_a_step_comes_back_as_it_was_sent(step: Step) -> None:
    words = step.encode()
    assert words.dtype == np.int32 and words[1] == len(words)
    assert Step.decode(words) == step
    padded = np.concatenate([words, np.full(50, 77, np.int32)])  # as it travels, in a buffer of fixed size
    assert Step.decode(padded) == step


words = st.integers(0, 2**31 - 1)
many = st.lists(words, max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.builds(
        Step,
        kind=st.sampled_from(Kind),
        number=words,
        frees=many,
        admissions=st.lists(
            st.builds(Admission, words, words, words, words, st.builds(SlotParams, seed=st.integers(0, 2**63 - 1)), many), max_size=3
        ),
        tables=st.lists(st.builds(TableDelta, words, words, many), max_size=3),
        copies=st.lists(st.tuples(words, words, words), max_size=3),
        spans=st.lists(st.builds(SpanOfStep, words, words, many | st.just([DECIDED]), words, many), max_size=3),
        resolves=st.lists(st.tuples(words, words), max_size=3),
        decided=many,
        message=st.text(max_size=5),
    )
)
def test_any_step_comes_back_as_it_was_sent(step: Step) -> None:
    assert Step.decode(step.encode()) == step


def test_more_spans_than_sixteen_bits_can_count() -> None:
    count = 70_000
    step = Step(spans=[SpanOfStep(0, 0, [1], 1)] * count, resolves=[(0, 1)] * count)
    decoded = Step.decode(step.encode())
    assert (len(decoded.spans), len(decoded.resolves)) == (count, count)


def test_a_decode_step_is_small() -> None:
    """Hundreds of sequences fit in the first part of a broadcast."""
    step = Step(spans=[SpanOfStep(slot, 1000, [5], 1) for slot in range(512)])
    assert len(step.encode()) < 4096


def test_another_version_is_not_read() -> None:
    words = Step().encode()
    words[0] += 1 << 8
    with pytest.raises(AssertionError, match="another version"):
        Step.decode(words)
