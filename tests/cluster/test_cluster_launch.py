"""torchrun on every node, as launch/multi_node.sh starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job, until

pytestmark = pytest.mark.xdist_group("cluster")

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_torchrun_on_each_node_stops_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    request = {"prompt": "Sort 3 1 2:", "sampling": {"max_tokens": 200, "ignore_eos": True, "temperature": 1.0}}
    lines = [{"id": str(number), **request, "sampling": {**request["sampling"], "seed": number}} for number in range(100)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = [str(ROOT / "launch/multi_node.sh"), "generate", f"model.path={ROOT / 'examples/quickstart/run'}"]
    program += ["input=prompts.jsonl", "output=texts.jsonl", "status=status.json", "engine.max_sequences=2"]
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nexec srun --ntasks-per-node=1 {' '.join(program)}\n")
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": "active",
        "RANKS": "2",
        "OMP_NUM_THREADS": "1",
    }

    def submit() -> Job:
        return Job(cluster, tmp_path, ["--nodes=2", "--output=job-%j.log", str(script)], variables)

    job = submit()
    partial = tmp_path / "texts.jsonl.partial"
    until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 10, 90.0, "the first texts")
    job.cancel("--signal=USR1")
    job.wait(60.0, "FAILED")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["outcome"], status["requeue"]) == ("stopped", True)
    submit().wait(120.0)
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [text["id"] for text in texts] == [line["id"] for line in lines]
    assert {text["attempt"] for text in texts} == {1, 2}
