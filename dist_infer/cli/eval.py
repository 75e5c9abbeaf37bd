"""`dist-infer eval`: tasks of lm-evaluation-harness on a checkpoint."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from dist_infer.checkpoint.locate import step_numbers
from dist_infer.cli.arguments import parse
from dist_infer.cli.ranks import run_on_ranks, say
from dist_infer.config.options import Options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import provenance, summary
from dist_infer.engine.session import Session
from dist_infer.evaluation.executor import Executor
from dist_infer.evaluation.journal import Journal
from dist_infer.evaluation.progress import Progress

# lm-evaluation-harness is imported late: it is an extra, takes seconds, and only the conductor needs it.


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(arguments)
    if options.prompts or options.input:
        raise ValueError("prompts and input belong to generate; eval takes eval.tasks=[...]")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'dist_infer[eval]'")
    if options.output is not None and options.journal is None:
        options.journal = str(Path(options.output) / "journal")
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

        assert session.engine is not None
        began, made_by, blueprint = datetime.now(UTC), provenance(session), session.blueprint
        identity = made_by["identity"] or ""
        with tempfile.TemporaryDirectory() as nothing, Progress(replicas=session.mesh.shape.replicas) as progress:
            executor = Executor(session, Journal(Path(self.options.journal or nothing), say), progress)
            model = HarnessModel(Intake(blueprint), executor.run, session.engine.max_model_len, identity, self.tasks.versions)
            results = evaluate(self.options.eval, model, self.tasks)
        made_by["versions"] |= {"lm_eval": importlib.metadata.version("lm_eval")}
        if self.output is not None:
            times = {"started": began.isoformat(timespec="seconds"), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
            path = Path(made_by["checkpoint"])
            where = {"checkpoint": str(path), "step": next(iter(step_numbers(path)), None), "label": path.name, "grid": {}}
            write_results(self.output, results, {**where, "provenance": made_by, **times, "attempt": 1})
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
