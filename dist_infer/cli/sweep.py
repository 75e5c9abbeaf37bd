"""`dist-infer sweep`: many checkpoints, the same tasks, one report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_infer.cli.arguments import parse
from dist_infer.cli.ranks import run_on_ranks, say
from dist_infer.engine.session import Session


def run(arguments: Sequence[str]) -> int:
    """Run the command; its first word may be a YAML file, as after --config."""
    if arguments and arguments[0].endswith((".yaml", ".yml")) and "=" not in arguments[0]:
        arguments = ["--config", *arguments]
    options = parse(arguments)
    try:
        from dist_infer.evaluation.sweep import Sweep
    except ModuleNotFoundError as error:
        raise ValueError(f"a sweep needs {error.name}, which is not installed: pip install 'dist_infer[eval]'") from None
    sweep = Sweep(options, say)
    begun = sweep.options
    if begun.status is None:
        sweep.output.mkdir(parents=True, exist_ok=True)
        begun.status = str(sweep.output / "status.json")

    def work(session: Session) -> None:
        sweep.run(session)
        if sweep.finish():
            _report(sweep.output)
        else:
            say(f"{sweep.output}: this share is done; the last one to end makes the report")

    return run_on_ranks(begun, work, sweep.check, stoppable=True, tolerant=True)


def _report(directory: Path) -> None:
    from dist_infer.evaluation.report import build_report

    report = build_report([directory], directory / "report.html")
    print(report.table, flush=True)
    for problem in report.problems:
        say(problem)
    say(f"report: {directory / 'report.html'}")
