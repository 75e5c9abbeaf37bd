"""`dist-infer eval`: tasks of lm-evaluation-harness on a checkpoint."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_infer.cli.arguments import parse
from dist_infer.cli.ranks import run_on_ranks, say
from dist_infer.config.options import Options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import provenance, summary
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session

# lm-evaluation-harness is imported late: it is an extra, takes seconds, and only the conductor needs it.


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(arguments)
    if options.prompts or options.input:
        raise ValueError("prompts and input belong to generate; eval takes eval.tasks=[...]")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'dist_infer[eval]'")
    job = EvalJob(options)
    return run_on_ranks(options, job.run, job.check, stoppable=True)


class EvalJob:
    """The tasks of one evaluation and its output."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.output = Path(options.output) if options.output is not None else None

    def check(self, blueprint: Blueprint) -> None:
        """Find and load the tasks, and check that model and output will do; nothing is written.

        Raises:
            ValueError: A task, its dataset or the output is not as it should be.
        """
        from dist_infer.evaluation.harness import check_model
        from dist_infer.evaluation.tasks import check_tasks

        if self.output is not None:
            _check_output(self.output)
        self.tasks = check_tasks(self.options.eval)
        check_model(self.options.eval, blueprint, self.tasks)

    def run(self, session: Session) -> None:
        """Evaluate, write the results and print a table of them."""
        from dist_infer.evaluation.harness import HarnessModel, evaluate
        from dist_infer.evaluation.results import table, write_results

        began, made_by = datetime.now(UTC), provenance(session)
        assert session.engine is not None

        def answers(requests: list[Request]) -> list[Result]:
            found: list[Result] = []
            with tqdm(total=len(requests), unit="request", disable=not sys.stderr.isatty(), leave=False) as bar:

                def sink(_: Any, results: list[Result]) -> None:
                    found.extend(results)
                    bar.update(len(results))

                session.run(requests, sink)
            return sorted(found, key=lambda result: result.index)

        identity = made_by["identity"] or ""
        model = HarnessModel(Intake(session.blueprint), answers, session.engine.max_model_len, identity, self.tasks.versions)
        results = evaluate(self.options.eval, model, self.tasks)
        made_by["versions"] |= {"lm_eval": importlib.metadata.version("lm_eval")}
        if self.output is not None:
            times = {"started": began.isoformat(timespec="seconds"), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
            write_results(self.output, results, {"checkpoint": made_by["checkpoint"], "provenance": made_by, **times})
        print(table(results), flush=True)
        say(summary(session))


def _check_output(output: Path) -> None:
    """Refuse a directory that cannot be made or written, or that holds results."""
    if (output / "results.json").exists():
        raise ValueError(f"output={output}: it holds a results.json already; remove it or name another directory")
    there = next(place for place in (output.absolute(), *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output={output}: {there} is no directory; name one to be made")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"output={output}: the directory {there} cannot be written to")
