"""A sweep: every point of it evaluated, each checkpoint loaded once, nothing computed that the journal knows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_infer.config.options import Options
from dist_infer.distributed.launch import attempt
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import provenance
from dist_infer.engine.resident import succeed
from dist_infer.engine.session import Session
from dist_infer.evaluation.executor import CheckpointFailed, Executor
from dist_infer.evaluation.harness import HarnessModel, RequestFailed, check_model, evaluate
from dist_infer.evaluation.journal import Journal
from dist_infer.evaluation.points import Point, points, share_of
from dist_infer.evaluation.progress import Progress
from dist_infer.evaluation.request_file import RequestFile
from dist_infer.evaluation.results import RESULTS, write_results
from dist_infer.evaluation.tasks import Tasks, check_tasks
from dist_infer.evaluation.whole_file import write_whole

MERGED = "requests.jsonl"


class Sweep:
    """One sweep, on one rank of it.

    Args:
        options: The run's; `sweep`, `eval` and `output` are read.
        say: Prints a line for the user.

    Raises:
        ValueError, OSError: A mistake in the options.
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        if options.output is None:
            raise ValueError("output is not given: name the directory of the sweep, such as output=sweeps/first; it goes on where it was")
        if not options.eval.tasks and not options.sweep.inputs:
            raise ValueError("nothing to do: give eval.tasks=[...], or sweep.inputs=[FILE.jsonl] to generate from")
        self.output = Path(options.output)
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"output={self.output}: is a file; name a directory")
        notes: list[str] = []
        self.all = points(options, notes)
        self.journal = Path(options.journal) if options.journal is not None else self.output / "journal"
        self.points = share_of(self.all, options.sweep.share)
        if not self.points:
            count = len({point.path for point in self.all})
            raise ValueError(f"sweep.share={options.sweep.share}: none of {count} checkpoints falls to this share")
        self.notes = notes
        self._say = say

    @property
    def options(self) -> Options:
        """Those the model is started with: of the first point that has no results yet."""
        first = next((point for point in self.points if not self._results(point).exists()), self.points[0])
        return replace(first.options, journal=str(self.journal), logs=first.options.logs or str(self.output / "logs"))

    def check(self, blueprint: Blueprint) -> None:
        """Check all that can be known before a rank is started (on the conductor): tasks, files, every checkpoint.

        Raises:
            ValueError, OSError: A mistake; nothing was written but the output directory.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if not os.access(self.output, os.W_OK):
            raise PermissionError(f"output={self.output}: the directory cannot be written to")
        for line in self.notes:
            self._say(line)
        self._tasks: Tasks | None = check_tasks(blueprint.options.eval) if blueprint.options.eval.tasks else None
        self._blueprints = {blueprint.options.model.path or "": blueprint}
        for point in self.all:
            path = str(point.path)
            if path not in self._blueprints:
                self._blueprints[path] = succeed(blueprint, path)
        if self._tasks is not None:
            for settings in {json.dumps(point.grid): point for point in self.points}.values():
                check_model(settings.options.eval, self._blueprint(settings), self._tasks)
        for name in blueprint.options.sweep.inputs:
            file = self._requests(name, self._blueprint(self.points[0]))
            if not file.requests:
                why = file.refused[0].error if file.refused else "it is empty"
                raise ValueError(f"sweep.inputs: {name}: holds no request that can be run ({why})")

    def run(self, session: Session) -> None:
        """Evaluate every point that is not done yet (on the conductor).

        Raises:
            ValueError: Some points failed, because their checkpoint is damaged or its answers are no numbers; the others are done.
            Stopped: A signal came; the same sweep, started again, goes on from there.
            RankFailure: A rank failed.
        """
        journal = Journal(self.journal, self._say)
        left = [point for point in self.points if not self.is_done(point)]
        if len(left) < len(self.points):
            self._say(f"{self.output}: {len(self.points) - len(left)} of {len(self.points)} points are done")
        progress = Progress(0, self.output, session.mesh.shape.replicas)
        executor = Executor(session, journal, progress)
        failed: list[str] = []
        try:
            for number, point in enumerate(left):
                after = [later.path for later in left[number:] if later.path != point.path]
                executor.use(str(point.path), str(after[0]) if after else None)
                progress.checkpoint(point.label)
                try:
                    self._evaluate(point, executor, session)
                except (CheckpointFailed, RequestFailed) as error:
                    failed.append(f"{point.label}: {error}")
                    self._say(f"failed: {failed[-1]}")
                progress.expect(executor.asked * (len(left) - number - 1) // (number + 1))
        finally:
            progress.close()
        if failed:
            rest = f"; {len(failed) - 1} more failed, see above" if len(failed) > 1 else ""
            raise ValueError(f"{len(left) - len(failed)} of {len(left)} points are done; {failed[0]}{rest}")
        self._say(f"weights were loaded {session.resident.loads} times for {len({point.path for point in left})} checkpoints")

    def finish(self) -> bool:
        """Merge the journal if every point of the whole sweep is done (on the conductor); whether it is."""
        if not all(self.is_done(point) for point in self.all):
            return False
        Journal(self.journal).merge(self.output / MERGED)
        return True

    def is_done(self, point: Point) -> bool:
        """Whether the results of `point` are there, made by what it says."""
        try:
            about = json.loads(self._results(point).read_text(encoding="utf-8"))["dist_infer"]
        except (OSError, ValueError, KeyError):
            return False
        return about.get("key") == self._key(point)

    def _evaluate(self, point: Point, executor: Executor, session: Session) -> None:
        """All tasks and inputs of one point."""
        directory, blueprint = self.output / point.label, self._blueprint(point)
        assert blueprint.checkpoint is not None
        identity, started = blueprint.checkpoint.identity, _now()
        directory.mkdir(parents=True, exist_ok=True)
        made_by = provenance(session, blueprint)
        made_by["versions"] |= {"lm_eval": importlib.metadata.version("lm_eval")}
        start = attempt()
        for name in point.options.sweep.inputs:
            file = self._requests(name, blueprint)
            results = {result.index: result for result in [*executor.run(list(file.requests.values())), *file.refused]}
            lines = (file.line(results[index], start, made_by) for index in range(len(file)))
            shown = ({"prompt": file.prompts[line["index"]]} | line if line["index"] in file.prompts else line for line in lines)
            texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in shown)
            write_whole(directory / f"outputs_{Path(name).stem}.jsonl", texts)
        found: dict[str, Any] = {"results": {}}
        if self._tasks is not None:
            assert session.engine is not None
            model = HarnessModel(Intake(blueprint), executor.run, session.engine.max_model_len, identity, self._tasks.versions)
            found = evaluate(point.options.eval, model, self._tasks)
        about = {
            "checkpoint": str(point.path),
            "step": point.step,
            "label": point.label,
            "grid": point.grid,
            "key": self._key(point),
            "provenance": made_by,
            "started": started,
            "finished": _now(),
            "attempt": start,
        }
        write_results(directory, found, about)

    def _results(self, point: Point) -> Path:
        return self.output / point.label / RESULTS

    def _blueprint(self, point: Point) -> Blueprint:
        return replace(self._blueprints[str(point.path)], options=point.options)

    def _requests(self, name: str, blueprint: Blueprint) -> RequestFile:
        assert blueprint.checkpoint is not None
        if not Path(name).is_file():
            raise FileNotFoundError(f"sweep.inputs: {name}: no such file; name JSONL files of requests")
        return RequestFile(Path(name), Intake(blueprint).line, blueprint.checkpoint.identity)

    def _key(self, point: Point) -> str:
        """Hash of what determines the results of `point`."""
        blueprint = self._blueprint(point)
        assert blueprint.checkpoint is not None
        options = point.options
        inputs = [hashlib.blake2b(Path(name).read_bytes()).hexdigest() for name in options.sweep.inputs]
        versions = self._tasks.versions if self._tasks is not None else {}
        what = [blueprint.checkpoint.identity, asdict(options.eval), asdict(options.sampling), asdict(options.model), versions, inputs]
        what[3]["path"] = None
        return hashlib.blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
