"""`dist-infer report`: results of sweeps and evaluations as one page, plots and a table."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_infer.cli.arguments import parse
from dist_infer.evaluation.report import build_report
from dist_infer.evaluation.report.report import TABLE_WIDTH

COMPARISON = "comparison"  # where the page of several directories goes by default


def run(arguments: Sequence[str]) -> int:
    """Run the command; it starts no ranks."""
    words = [word for word in arguments if not word.startswith("-") and ("=" not in word or Path(word).is_dir())]
    output = parse([word for word in arguments if word not in words]).output
    if not words:
        raise ValueError("no directory is given: name one that holds results, such as dist-infer report sweep_out")
    directories = list(dict.fromkeys(Path(word) for word in words))
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: there is no such directory; name one in which a sweep or an eval has left results")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else TABLE_WIDTH
    report = build_report(directories, _page(output, directories), width)
    print(report.table)
    for problem in report.problems:
        print(f"note: {problem}", file=sys.stderr)
    print(
        f"\n{report.page}: the page; beside it {report.summary.name}"
        + (f" and {len(report.plots)} PNG files in plots/" if report.plots else "")
    )
    return 0


def _page(output: str | None, directories: list[Path]) -> Path:
    """Where the page goes: as asked, else into the one directory, else into one for comparisons."""
    if output is not None:
        page = Path(output)
        if page.suffix not in (".html", ".htm"):
            raise ValueError(f"output={output}: name an HTML file, such as output=report.html")
        if not page.absolute().parent.is_dir():
            raise FileNotFoundError(f"output={output}: there is no directory {page.absolute().parent}")
    elif len(directories) == 1:
        page = directories[0] / "report.html"
    else:
        Path(COMPARISON).mkdir(exist_ok=True)
        page = Path(COMPARISON, "report.html")
    if not os.access(page.absolute().parent, os.W_OK):
        raise PermissionError(f"output={page}: the directory {page.absolute().parent} cannot be written to")
    return page
