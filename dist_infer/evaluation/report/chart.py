"""Where the marks of a chart lie: a pure function from values to places in a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dist_infer.evaluation.report.entry import Entry, Line, Measure, shortened

WIDTH = 420
HEIGHT = 250  # of curves; rows of a dot chart make its height
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 36
ROW = 24
NAMES = 160  # width of the names beside a dot chart
NAME_LENGTH = 24
LOGARITHMIC = 30  # steps that span this factor, most of them near the first, are drawn on a logarithmic axis
DODGE = 4  # lines whose bars would cover each other are moved apart by this

MARKERS = ("M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-5L5,4H-5z", "M0,-5.5L5,0L0,5.5L-5,0z", "M0,5L5,-4H-5z")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
COLOURS = 6


@dataclass(frozen=True)
class Style:
    """How a line looks; told apart by colour, by dash and by marker."""

    colour: int
    dash: str
    marker: str

    @classmethod
    def of(cls, index: int) -> Style:
        """The style of the line number `index`."""
        return cls(index % COLOURS, DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])


@dataclass(frozen=True)
class Dot:
    """A value in a drawing, its bar from `low` to `high` along the axis of values, and what is told of it."""

    x: float
    y: float
    low: float
    high: float
    text: str
    name: str = ""


@dataclass
class Trace:
    """The dots of one line."""

    style: Style
    name: str
    dots: list[Dot] = field(default_factory=list)


@dataclass
class Chart:
    """A drawing of one measure: curves over training steps, or a row for each entry.

    Attributes:
        left: Where the marks begin, beside the names.
        base: Where they end, above the ticks of x.
    """

    measure: Measure
    kind: Literal["curves", "rows"]
    height: int
    traces: list[Trace]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    left: int
    base: int


def curves(measure: Measure, lines: list[Line]) -> Chart | None:
    """Values over training steps; None when there are not two steps."""
    held = [
        (index, line, [entry for entry in line.entries if entry.step is not None and _has(entry, measure)])
        for index, line in enumerate(lines)
    ]
    held = [(index, line, entries) for index, line, entries in held if entries]
    steps = sorted({entry.step for _, _, entries in held for entry in entries if entry.step is not None})
    if len(steps) < 2:
        return None
    low, high, y_values = _value_axis([entry for _, _, entries in held for entry in entries], measure)
    crowded = steps[len(steps) // 2] - steps[0] < 0.15 * (steps[-1] - steps[0])
    logarithmic = steps[0] > 0 and steps[-1] / steps[0] >= LOGARITHMIC and crowded
    place_x = _scale(steps[0], steps[-1], LEFT + 10, WIDTH - RIGHT - 10, logarithmic)
    place_y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    traces = []
    for position, (index, line, entries) in enumerate(held):
        shift = (position - (len(held) - 1) / 2) * min(DODGE, 16 / len(held))
        trace = Trace(Style.of(index), line.name)
        for entry in entries:
            value = entry.values[measure]
            bar = value.stderr or 0.0
            text = f"{line.name}, step {entry.step:,}: {value}" if len(held) > 1 else f"step {entry.step:,}: {value}"
            x, y = place_x(entry.step or 0) + shift, place_y(value.value)
            trace.dots.append(Dot(_round(x), _round(y), _round(place_y(value.value - bar)), _round(place_y(value.value + bar)), text))
        traces.append(trace)
    x_ticks = [
        (_round(place_x(tick)), _short(tick)) for tick in (_powers(steps[0], steps[-1]) if logarithmic else _ticks(steps[0], steps[-1], 5))
    ]
    return Chart(
        measure, "curves", HEIGHT, traces, x_ticks, [(_round(place_y(tick)), f"{tick:g}") for tick in y_values], LEFT, HEIGHT - BOTTOM
    )


def rows(measure: Measure, lines: list[Line], stepped: bool) -> Chart | None:
    """A row for each entry that has no place on the curves; None when there is none.

    Args:
        measure: What to draw.
        lines: All lines.
        stepped: Whether entries with a step are drawn as curves.
    """
    held = [
        (index, line, entry)
        for index, line in enumerate(lines)
        for entry in line.entries
        if _has(entry, measure) and not (stepped and entry.step is not None)
    ]
    if not held:
        return None
    base = TOP + ROW * len(held)
    low, high, values = _value_axis([entry for _, _, entry in held], measure)
    place = _scale(low, high, NAMES + 6, WIDTH - RIGHT - 6)
    traces = []
    for row, (index, line, entry) in enumerate(held):
        value = entry.values[measure]
        bar = value.stderr or 0.0
        name = line.name if len(line.entries) == 1 and len(lines) > 1 else entry.label
        dot = Dot(
            _round(place(value.value)),
            TOP + ROW * row + ROW / 2,
            _round(place(value.value - bar)),
            _round(place(value.value + bar)),
            f"{name}: {value}",
            shortened(name, NAME_LENGTH),
        )
        traces.append(Trace(Style.of(index), name, [dot]))
    return Chart(measure, "rows", base + ROW, traces, [(_round(place(tick)), f"{tick:g}") for tick in values], [], NAMES, base)


def _has(entry: Entry, measure: Measure) -> bool:
    return measure in entry.values and math.isfinite(entry.values[measure].value)


def _value_axis(entries: list[Entry], measure: Measure) -> tuple[float, float, list[float]]:
    """Ends and ticks of the axis of values: all bars fit, and what lies between 0 and 1 stays there."""
    values = [entry.values[measure] for entry in entries]
    low = min(value.value - (value.stderr or 0) for value in values)
    high = max(value.value + (value.stderr or 0) for value in values)
    if all(0 <= value.value <= 1 for value in values):
        low, high = (0.0 if low < 0.3 else low), (1.0 if high > 0.7 else high)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    ticks = _ticks(low - margin, high + margin, 5)
    return min(low - margin, high), high + margin, ticks


def _scale(low: float, high: float, start: float, stop: float, logarithmic: bool = False) -> Callable[[float], float]:
    """A function from [`low`, `high`] to [`start`, `stop`]."""
    turn = math.log if logarithmic else float
    first, span = turn(low), turn(high) - turn(low)
    return lambda value: start + (turn(value) - first) / span * (stop - start)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers within [`low`, `high`], evenly apart."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    unit = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough), 10 * power)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [float(f"{index * unit:.10g}") for index in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within [`low`, `high`], or its ends where there are not two."""
    powers = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return powers if len(powers) > 1 else [low, high]


def _short(value: float) -> str:
    """A step in few characters."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):g}{letter}"
    return f"{value:g}"


def _round(value: float) -> float:
    return round(value, 1)
