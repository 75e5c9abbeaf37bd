"""What a report is made of: entries, their measures and values, and the lines they lie on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One metric of one task, through one filter.

    Attributes:
        higher: Whether higher is better; None when the task does not say.
        title: The task's own name for itself.
    """

    task: str
    metric: str
    filter: str
    higher: bool | None = field(default=None, compare=False)
    title: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """Metric and filter, such as `exact_match (strict)`."""
        return self.metric if self.filter in ("", "none") else f"{self.metric} ({self.filter})"

    def better(self, values: Iterable[float]) -> float | None:
        """The best of `values`, where the task says what is best."""
        found = list(values)
        if not found or self.higher is None:
            return None
        return max(found) if self.higher else min(found)


@dataclass(frozen=True)
class Value:
    """A number and its standard error; None where there is no formula for one."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return number(self.value) if self.stderr is None else f"{number(self.value)} ± {number(self.stderr)}"


@dataclass(eq=False)
class Entry:
    """What one checkpoint got at one point of the grid: one `results.json`.

    Attributes:
        run: Name of the directory the user gave.
        directory: Where the files lie.
        file: The results' file; None where there are texts only.
        label: Its name within the run.
        checkpoint: Path of the checkpoint.
        step: Training step.
        grid: Option key to value.
        values: By measure, in the order of the file.
        parts: Names of the tasks that belong to a group which has a score of its own.
        questions: Number of questions, by task.
        made_by: What made it, by dotted key.
        when: When it was finished, ISO 8601; empty when not known.
        settings: What must be alike for two values of a task to be comparable, by task.
    """

    run: str
    directory: Path
    file: Path | None
    label: str
    checkpoint: str
    step: int | None
    grid: dict[str, Any]
    values: dict[Measure, Value] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    questions: dict[str, int] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    when: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Path of the checkpoint with `*` in place of its step: alike for all checkpoints of a training run."""
        parts = list(PurePath(self.checkpoint).parts)
        for index in reversed(range(len(parts))) if self.step is not None else ():
            pattern = re.sub(rf"(?<!\d)0*{self.step}(?!\d)", "*", parts[index])
            if pattern != parts[index]:
                return str(PurePath(*parts[:index], pattern, *parts[index + 1 :]))
        return self.checkpoint

    @property
    def line(self) -> tuple[str, str, str]:
        """What entries of one line have in common."""
        return self.run, self.origin, json.dumps(self.grid, sort_keys=True, default=str)


@dataclass(eq=False)
class Line:
    """Entries that differ in their training step only, in its order."""

    name: str
    entries: list[Entry]


def lines_of(entries: list[Entry]) -> list[Line]:
    """The lines that `entries` lie on, each with a name that tells it from the others."""
    grouped: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.line, []).append(entry)
    runs = {run for run, _, _ in grouped}
    origins = {run: {origin for other, origin, _ in grouped if other == run} for run in runs}
    lines = []
    for (run, origin, _), members in grouped.items():
        words = [run] if len(runs) > 1 else []
        if len(origins[run]) > 1:
            words.append(_short_path(origin))
        words += [f"{key}={value}" for key, value in members[0].grid.items()]
        name = ", ".join(words) or _short_path(origin) or run
        lines.append(Line(name, sorted(members, key=lambda entry: (entry.step is None, entry.step or 0, entry.label))))
    return lines


def number(value: float) -> str:
    """A value as people read it: four places, or four digits where it is large or tiny."""
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.4f}"
    return f"{value:.4g}"


def shortened(text: str, most: int) -> str:
    """`text` without its middle where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def _short_path(path: str) -> str:
    return "/".join(PurePath(path).parts[-2:])
