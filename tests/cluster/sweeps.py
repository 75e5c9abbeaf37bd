"""Sweeps of the quickstart checkpoints as batch jobs, and what must be the same of two of them."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster, Job, until

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart"
TASKS = ("quickstart_choices", "quickstart_answers")
STEPS = (50, 100, 200, 400, 800)
REQUESTS = len(STEPS) * (40 * 4 + 40)  # choices scored, and answers generated
TOLERANCE = 1e-5
OTHER_MESH = 1e-4  # another tp adds up the same float32 numbers in another order
OPTIONS = (
    f"sweep.checkpoints=[{QUICKSTART / 'run'}]",
    f"eval.tasks=[{','.join(TASKS)}]",
    f"eval.include_path={QUICKSTART / 'tasks'}",
    "eval.bootstrap_iters=0",
    "model.dtype=float32",
    "engine.max_sequences=4",  # so that there is time to disturb it
)


class Sweep:
    """One output directory.

    Args:
        cluster: Where its jobs run.
        directory: Logs, and below it the output.
        output: If it is to lie elsewhere, as the nodes see it.
    """

    def __init__(self, cluster: Cluster, directory: Path, output: Path | None = None) -> None:
        self.cluster, self.directory = cluster, directory
        self._output = output or directory / "out"
        self.output = cluster.seen(self._output) if output is not None else self._output

    def submit(self, *sbatch: str, options: tuple[str, ...] = (), script: str = "sweep") -> Job:
        """A job of this sweep, on two nodes with two ranks each unless `sbatch` says otherwise."""
        variables = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": "active",
            "OMP_NUM_THREADS": "1",
            "SLURM_WAIT": "10",
        }
        command = ["--nodes=2", "--ntasks-per-node=2", *sbatch, str(ROOT / f"slurm/{script}.sbatch"), *OPTIONS, *options]
        return Job(self.cluster, self.directory, [*command, f"output={self._output}"], variables)

    def lines(self, parts: str = "*") -> int:
        """How many results the journal has, or those of its parts of such a name, each as often as it was computed."""
        return sum(path.read_bytes().count(b"\n") for path in (self.output / "journal").glob(f"{parts}.jsonl"))

    def reach(self, lines: int, parts: str = "*") -> None:
        """Wait until the journal has so many results."""
        try:
            until(lambda: self.lines(parts) >= lines, 120.0, f"{lines} results in the journal's parts {parts}")
        except TimeoutError as error:
            logs = [path.read_text() for path in sorted(self.directory.glob("*.log"))]
            raise AssertionError(f"{error}; there are {self.lines()}\n{''.join(logs)}") from None

    def requests(self) -> dict[str, dict[str, Any]]:
        """The finished requests by key, each of which is there once."""
        lines = [json.loads(line) for line in (self.output / "requests.jsonl").read_text().splitlines()]
        found = {line["key"]: line for line in lines}
        assert len(found) == len(lines)
        return found

    def results(self) -> dict[str, Any]:
        """What each point's tasks came to."""
        return {path.parent.name: json.loads(path.read_text())["results"] for path in self.output.glob("*/results.json")}

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The samples of each point and task, in their order."""
        files = sorted(self.output.glob("*/samples_*.jsonl"))
        return {f"{path.parent.name}/{path.name}": [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def assert_same(sweep: Sweep, undisturbed: Sweep, tolerance: float = TOLERANCE) -> None:
    """The same requests, texts, choices, results and samples, and log-probabilities within `tolerance`."""
    ours, theirs = sweep.requests(), undisturbed.requests()
    assert set(ours) == set(theirs)
    for key, line in ours.items():
        _assert_close(_content(line), _content(theirs[key]), key, tolerance)
    _assert_close(sweep.results(), undisturbed.results(), "results", tolerance)
    _assert_close(sweep.samples(), undisturbed.samples(), "samples", tolerance)


def _content(line: dict[str, Any]) -> dict[str, Any]:
    """What a request's result says; what it cost may differ."""
    return {name: line[name] for name in ("outputs", "score", "error")}


def _assert_close(ours: Any, theirs: Any, place: str, tolerance: float) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert set(ours) == set(theirs), place
        for name in ours:
            _assert_close(ours[name], theirs[name], f"{place}/{name}", tolerance)
    elif isinstance(ours, list) and isinstance(theirs, list):
        assert len(ours) == len(theirs), place
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _assert_close(one, other, f"{place}/{number}", tolerance)
    else:
        one, other = _number(ours), _number(theirs)
        same = ours == theirs if one is None or other is None else math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance)
        assert same, f"{place}: {ours!r} and {theirs!r}"


def _number(value: Any) -> float | None:
    """A log-probability; in samples they are written as text."""
    if isinstance(value, float):
        return value
    try:
        return float(value) if isinstance(value, str) and "." in value else None
    except ValueError:
        return None
