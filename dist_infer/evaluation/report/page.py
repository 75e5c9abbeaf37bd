"""The page: one file of HTML that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dist_infer.evaluation.report.chart import WIDTH, Chart, curves, rows
from dist_infer.evaluation.report.entry import Entry, Measure, number
from dist_infer.evaluation.report.overview import Overview
from dist_infer.evaluation.report.samples import Sheet

HERE = Path(__file__).parent
MOST_CHARTS = 60  # open on the page; more measures have their place in the table and in the PNG files


def page(overview: Overview, sheets: list[Sheet], title: str) -> str:
    """The HTML of a report.

    Everything that comes from checkpoints, tasks and files is escaped; the page may run no script but its own and load nothing.

    Args:
        overview: What is shown.
        sheets: Samples for its browser.
        title: Of the page.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": _signed, "shown": _shown, "breakable": _breakable}
    return environment.get_template("page.html").render(
        title=title,
        overview=overview,
        charts=_charts(overview, overview.main),
        further=_charts(overview, [measure for measure in overview.shown if measure not in overview.main])[:MOST_CHARTS],
        several_runs=len({entry.run for entry in overview.entries}) > 1,
        scored=[entry for entry in overview.entries if entry.values],
        tests=_tests(overview),
        sheets=sheets,
        alike=_alike(overview.entries),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("dist_infer"),
        width=WIDTH,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_embedded(overview, sheets),
    )


def _charts(overview: Overview, measures: list[Measure]) -> list[Chart]:
    charts = []
    for measure in measures:
        drawn = curves(measure, overview.lines) if overview.stepped else None
        charts += [chart for chart in (drawn, rows(measure, overview.lines, drawn is not None)) if chart is not None]
    return charts


def _tests(overview: Overview) -> dict[str, int]:
    """How many differences there are by test, and how many of all are more than chance."""
    differences = [difference for comparison in overview.comparisons for difference in comparison.differences.values()]
    return {
        "all": len(differences),
        "paired": sum(difference.test == "paired" for difference in differences),
        "unpaired": sum(difference.test == "unpaired" for difference in differences),
        "significant": sum(difference.significant for difference in differences),
    }


def _alike(entries: list[Entry]) -> dict[str, Any]:
    """What made all entries alike."""
    first, *others = [entry.made_by for entry in entries]
    return {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}


def _embedded(overview: Overview, sheets: list[Sheet]) -> Markup:
    """Samples as JSON that HTML cannot take for anything else."""
    several = len({entry.run for entry in overview.entries}) > 1
    names = [f"{entry.run} / {entry.label}" if several else entry.label for entry in overview.entries]
    text = json.dumps({"entries": names, "sheets": [asdict(sheet) for sheet in sheets]}, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _signed(value: float) -> str:
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "±"
    return f"{sign}{number(abs(value))}"


def _breakable(text: str) -> Markup:
    """`text` with places where a narrow column may break it."""
    return Markup(re.sub(r"(?<=[,/])(?=.)", "<wbr>", str(escape(text))))


def _shown(value: Any) -> str:
    """A value of the provenance as text."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
