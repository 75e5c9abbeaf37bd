"""A report: page, plots, table and summary from directories of results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_infer.evaluation.report.collect import collect
from dist_infer.evaluation.report.overview import Overview
from dist_infer.evaluation.report.page import page
from dist_infer.evaluation.report.plots import write_plots
from dist_infer.evaluation.report.samples import sheets_of
from dist_infer.evaluation.report.table import comma_separated, table

TABLE_WIDTH = 120  # characters


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: The HTML file.
        plots: PNG files, one for each measure.
        summary: The CSV file.
        table: For the terminal.
        problems: What is missing or cannot be compared, a sentence each.
    """

    page: Path
    plots: list[Path]
    summary: Path
    table: str
    problems: list[str]


def build_report(directories: list[Path], out: Path, width: int = TABLE_WIDTH) -> Report:
    """Write `out`, and beside it `plots/*.png` and `summary.csv`, from all results below `directories`.

    Args:
        directories: Of runs; two or more are compared with the first.
        out: The HTML file; its directory exists.
        width: Of the table, in characters.

    Raises:
        FileNotFoundError: A directory is not there.
        ValueError: There are no results below one.
    """
    entries, problems = collect(directories)
    sheets = sheets_of(entries, problems)
    overview = Overview.of(entries, problems)
    try:
        plots = write_plots(overview, out.parent / "plots")
    except ImportError:
        plots = []
        problems.append("no PNG files were drawn: matplotlib is not installed; pip install 'dist_infer[eval]'")
    title = f"Evaluation of {' and '.join(dict.fromkeys(entry.run for entry in entries))}"
    _write(out, page(overview, sheets, title))
    summary = out.with_name("summary.csv")
    _write(summary, comma_separated(overview))
    return Report(out, plots, summary, table(overview, width), problems)


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)
