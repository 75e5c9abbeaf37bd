"""What sweeps and evaluations found, as a page, plots and a table."""

from dist_infer.evaluation.report.report import Report, build_report

__all__ = ["Report", "build_report"]
