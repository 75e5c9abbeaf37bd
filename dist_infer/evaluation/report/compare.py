"""Whether two entries differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dist_infer.evaluation.report.entry import Entry, Line, Measure
from dist_infer.evaluation.report.samples import values_by_question

NORMAL_95 = 1.96  # two-sided, 5%


@dataclass(frozen=True)
class Difference:
    """What a measure of one entry has over that of another.

    Attributes:
        stderr: Standard error of the difference; None when it is not known.
        test: `paired`: from the differences on each question, which both answered; `unpaired`: from the two standard errors.
    """

    value: float
    stderr: float | None
    test: Literal["paired", "unpaired"] | None

    @property
    def significant(self) -> bool:
        """Whether it exceeds 1.96 standard errors: what chance alone does in one of twenty cases."""
        return self.stderr is not None and self.value != 0 and abs(self.value) > NORMAL_95 * self.stderr


@dataclass(eq=False)
class Comparison:
    """An entry of another line beside that of the first, at the same step."""

    before: Entry
    after: Entry
    name: str
    differences: dict[Measure, Difference]


def comparisons(lines: list[Line], measures: list[Measure]) -> Iterator[Comparison]:
    """Each line beside the first one, at every step that both have."""
    for line in lines[1:]:
        for before, after in _pairs(lines[0], line):
            differences = {measure: difference(before, after, measure) for measure in measures if _have(before, after, measure)}
            if differences:
                yield Comparison(before, after, line.name, differences)


def difference(before: Entry, after: Entry, measure: Measure) -> Difference:
    """`after` minus `before`; paired where the samples of both are there and hold the same questions."""
    first, second = before.values[measure], after.values[measure]
    value = second.value - first.value
    old, new = values_by_question(before, measure), values_by_question(after, measure)
    if old is not None and new is not None and old.keys() == new.keys() and len(old) > 1:
        gains = [new[question] - old[question] for question in old]
        mean = sum(gains) / len(gains)
        variance = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
        return Difference(value, math.sqrt(variance / len(gains)), "paired")
    if first.stderr is not None and second.stderr is not None:
        return Difference(value, math.hypot(first.stderr, second.stderr), "unpaired")
    return Difference(value, None, None)


def _pairs(first: Line, second: Line) -> Iterator[tuple[Entry, Entry]]:
    """Entries of the same step; of lines of one entry each, the two."""
    if len(first.entries) == len(second.entries) == 1:
        yield first.entries[0], second.entries[0]
        return
    steps = {entry.step: entry for entry in first.entries if entry.step is not None}
    for entry in second.entries:
        if entry.step in steps:
            yield steps[entry.step], entry


def _have(before: Entry, after: Entry, measure: Measure) -> bool:
    return all(math.isfinite(entry.values[measure].value) if measure in entry.values else False for entry in (before, after))
