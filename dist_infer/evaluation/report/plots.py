"""Curves and bars as PNG files, for papers."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path
from typing import Any

from dist_infer.evaluation.report.entry import Measure, shortened
from dist_infer.evaluation.report.overview import Overview

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#8a6d00", "#444444")  # told apart by the colour-blind as well
MARKERS = "os^Dv"
DASHES = ((), (7, 4), (2, 3), (9, 3, 2, 3))
DOTS_PER_INCH = 200
LONGEST_TITLE, LONGEST_NAME = 60, 36  # characters


def write_plots(overview: Overview, directory: Path) -> list[Path]:
    """Write a PNG for each measure shown; returns their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no state is shared and no window is sought

    directory.mkdir(exist_ok=True)
    paths: list[Path] = []
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}):
        for measure in overview.shown:
            figure = Figure(figsize=(5.2, 3.6), layout="constrained")
            axes = figure.subplots()
            if not (_draw_curves(axes, measure, overview) if overview.stepped else _draw_rows(axes, measure, overview, figure)):
                continue
            axes.set_title(shortened(measure.title or measure.task, LONGEST_TITLE))
            path = _free(directory, measure, paths)
            partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.new")
            figure.savefig(partial, dpi=DOTS_PER_INCH, format="png")
            os.replace(partial, path)
            paths.append(path)
    return paths


def _draw_curves(axes: Any, measure: Measure, overview: Overview) -> bool:
    drawn = 0
    for index, line in enumerate(overview.lines):
        entries = [entry for entry in line.entries if entry.step is not None and measure in entry.values]
        entries = [entry for entry in entries if math.isfinite(entry.values[measure].value)]
        if not entries:
            continue
        drawn += 1
        axes.errorbar(
            [entry.step for entry in entries],
            [entry.values[measure].value for entry in entries],
            [entry.values[measure].stderr or 0.0 for entry in entries],
            **_style(index),
            dashes=DASHES[index % len(DASHES)],
            label=shortened(line.name, LONGEST_NAME),
        )
    axes.set_xlabel("training step")
    axes.set_ylabel(shortened(measure.name, LONGEST_NAME))
    axes.grid(alpha=0.25)
    if drawn > 1:
        axes.legend(fontsize=9, frameon=False)
    return drawn > 0


def _draw_rows(axes: Any, measure: Measure, overview: Overview, figure: Any) -> bool:
    entries = [entry for entry in overview.entries if measure in entry.values and math.isfinite(entry.values[measure].value)]
    several = len({entry.run for entry in entries}) > 1
    for row, entry in enumerate(entries):
        value = entry.values[measure]
        axes.errorbar([value.value], [row], xerr=[value.stderr or 0.0], **_style(0))
    names = [f"{entry.run}: {entry.label}" if several else entry.label for entry in entries]
    axes.set_yticks(range(len(entries)), [shortened(name, LONGEST_NAME) for name in names])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel(shortened(measure.name, LONGEST_NAME))
    axes.grid(alpha=0.25, axis="x")
    figure.set_size_inches(5.2, 1.4 + 0.3 * len(entries))
    return bool(entries)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "capsize": 3,
        "linewidth": 1.5,
    }


def _free(directory: Path, measure: Measure, taken: list[Path]) -> Path:
    """A file name for `measure` that holds nothing but plain characters, and is not taken."""
    words = [measure.task, measure.metric, *([measure.filter] if measure.filter not in ("", "none") else [])]
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(words)).strip("._")[:100] or "plot"
    path, count = directory / f"{stem}.png", 1
    while path in taken:
        count += 1
        path = directory / f"{stem}_{count}.png"
    return path
