"""Everything a report shows, found once and drawn as page, table and plots."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_infer.evaluation.report.compare import Comparison, comparisons
from dist_infer.evaluation.report.entry import Entry, Line, Measure, lines_of


@dataclass(eq=False)
class Overview:
    """Entries in their order, and what follows from them.

    Attributes:
        measures: All there are, in the order in which tasks and metrics came.
        main: The first measure of each task that is not part of a scored group.
        shown: All measures of these tasks.
        best: Best value of each measure, where the task says what is best and values differ.
        comparisons: Lines beside the first.
        problems: What is missing or cannot be compared, a sentence each.
    """

    entries: list[Entry]
    lines: list[Line]
    measures: list[Measure]
    main: list[Measure]
    shown: list[Measure]
    best: dict[Measure, float]
    comparisons: list[Comparison]
    problems: list[str]

    @classmethod
    def of(cls, entries: list[Entry], problems: list[str]) -> Overview:
        """What follows from `entries`."""
        known: dict[Measure, Measure] = {}
        for entry in entries:
            for measure in entry.values:
                if measure not in known or known[measure].higher is None:
                    known[measure] = measure
        tasks = dict.fromkeys(measure.task for measure in known)
        measures = [measure for task in tasks for measure in known.values() if measure.task == task]
        parts = {part for entry in entries for part in entry.parts}
        shown = [measure for measure in measures if measure.task not in parts]
        first = {measure.task: measure for measure in reversed(shown)}
        main = [measure for measure in shown if first[measure.task] is measure]
        lines = lines_of(entries)
        best = {measure: value for measure in measures if (value := _best(entries, measure)) is not None}
        return cls(entries, lines, measures, main, shown, best, list(comparisons(lines, main)), problems)

    @property
    def stepped(self) -> bool:
        """Whether there are curves to draw: entries of more than one training step."""
        return len({entry.step for entry in self.entries if entry.step is not None}) > 1

    def is_best(self, entry: Entry, measure: Measure) -> bool:
        """Whether no other entry has a better value."""
        return measure in entry.values and entry.values[measure].value == self.best.get(measure)


def _best(entries: list[Entry], measure: Measure) -> float | None:
    values = [entry.values[measure].value for entry in entries if measure in entry.values]
    values = [value for value in values if math.isfinite(value)]
    return measure.better(values) if len(set(values)) > 1 else None
