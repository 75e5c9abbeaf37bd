"""The results as a table for the terminal, and as a file for other programs."""

from __future__ import annotations

import csv
import io
import json

from dist_infer.evaluation.report.entry import Entry, Measure
from dist_infer.evaluation.report.overview import Overview

COLUMNS = ("run", "label", "checkpoint", "step", "grid", "task", "metric", "filter", "value", "stderr", "questions", "higher_is_better")


def table(overview: Overview, width: int) -> str:
    """A row for each entry, a column for each task; cut into several tables where they do not fit `width` characters."""
    several = len({entry.run for entry in overview.entries}) > 1
    if not overview.main:
        return f"no scores; generated texts of {len(overview.entries)} checkpoints and settings"
    names = ["", "", *(f"{entry.run}/{entry.label}" if several else entry.label for entry in overview.entries)]
    columns = [_column(overview, measure) for measure in overview.main]
    left = max(map(len, names))
    blocks: list[list[list[str]]] = []
    taken = width
    for column in columns:
        size = max(map(len, column)) + 2
        if taken + size > width:
            blocks.append([])
            taken = left
        blocks[-1].append(column)
        taken += size
    texts = []
    for block in blocks:
        sizes = [max(map(len, column)) for column in block]
        lines = [
            "  ".join([name.ljust(left), *(column[row].rjust(size) for column, size in zip(block, sizes, strict=True))]).rstrip()
            for row, name in enumerate(names)
        ]
        texts.append("\n".join(lines))
    if overview.best:
        texts.append("* best of its column; ± standard error")
    return "\n\n".join(texts)


def _column(overview: Overview, measure: Measure) -> list[str]:
    arrow = {True: "↑ ", False: "↓ ", None: ""}[measure.higher]
    cells = [measure.task, f"{arrow}{measure.name} "]
    for entry in overview.entries:
        mark = "*" if overview.is_best(entry, measure) else " "
        cells.append(f"{entry.values[measure]}{mark}" if measure in entry.values else "- ")
    return cells


def comma_separated(overview: Overview) -> str:
    """A line for each value, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in overview.entries:
        for measure in overview.measures:
            if measure in entry.values:
                writer.writerow(_row(entry, measure))
    return text.getvalue()


def _row(entry: Entry, measure: Measure) -> list[object]:
    value = entry.values[measure]
    return [
        entry.run,
        entry.label,
        entry.checkpoint,
        entry.step,
        json.dumps(entry.grid, sort_keys=True, default=str),
        measure.task,
        measure.metric,
        measure.filter,
        repr(value.value),
        None if value.stderr is None else repr(value.stderr),
        entry.questions.get(measure.task),
        measure.higher,
    ]
