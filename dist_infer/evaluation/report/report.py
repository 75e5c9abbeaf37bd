"""A report: page, plots, table and summary from directories of results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_infer.evaluation.report.collect import collect
from dist_infer.evaluation.report.overview import Overview
from dist_infer.evaluation.report.page import page
from dist_infer.evaluation.report.plots import write_plots
from dist_infer.evaluation.report.samples import Sheet, sheets_of
from dist_infer.evaluation.report.table import comma_separated, table
from dist_infer.evaluation.whole_file import write_whole

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
    overview, sheets = read(directories)
    try:
        plots = write_plots(overview, out.parent / "plots")
    except ImportError:
        plots = []
        overview.problems.append("no PNG files were drawn: matplotlib is not installed; pip install 'dist_infer[eval]'")
    title = f"Evaluation of {' and '.join(dict.fromkeys(entry.run for entry in overview.entries))}"
    write_whole(out, [page(overview, sheets, title)])
    summary = out.with_name("summary.csv")
    write_whole(summary, [comma_separated(overview)])
    return Report(out, plots, summary, table(overview, width), overview.problems)


def read(directories: list[Path]) -> tuple[Overview, list[Sheet]]:
    """What there is to show of all results below `directories`; raises as `build_report`."""
    entries, problems = collect(directories)
    sheets = sheets_of(entries, problems)
    return Overview.of(entries, problems), sheets
