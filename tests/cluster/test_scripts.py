"""The batch scripts on a real SLURM: ranks, signals, and what is queued again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dist_infer.cli.main import main
from tests.cluster.cluster import Cluster, Job, until

pytestmark = pytest.mark.xdist_group("cluster")

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
COMMON = "# --- from here on the same in all scripts of this directory ---"


def submit(cluster: Cluster, directory: Path, *command: str, plan: str = "", **environment: str) -> Job:
    """A job whose files lie in `directory`; with a `plan`, of the stub in place of the program."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if plan:
        stub = directory / "dist-infer"
        stub.unlink(missing_ok=True)
        stub.symlink_to(ROOT / "tests/cluster/stub.sh")
        path = f"{directory}:{path}"
    variables = {"PATH": path, "PLAN": plan, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": "active", **environment}
    return Job(cluster, directory, command, variables)


def script(name: str) -> str:
    """The path of a script."""
    return str(SCRIPTS / f"{name}.sbatch")


def test_scripts_share_what_they_have_in_common() -> None:
    scripts = {path.name: path.read_text() for path in SCRIPTS.iterdir()}
    assert sorted(scripts) == ["generate.sbatch", "sweep.sbatch", "sweep_array.sbatch"]
    assert len({text.split(COMMON)[1] for text in scripts.values()}) == 1


def test_ranks_and_their_share_of_the_node(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3", script("sweep"), "a.yaml", "b=c d", plan="ok")
    job.wait(30.0)
    lines = sorted(line for line in job.log().splitlines() if line.startswith("attempt"))
    nodes = ["node1", "node1", "node2", "node2"]
    status = tmp_path / f"sweep-{job.id}.status.json"
    assert lines == [
        f"attempt 0 rank {rank} of 4 on {node} master node1 cpus 1: sweep a.yaml b=c d status={status}" for rank, node in enumerate(nodes)
    ]
    assert not status.exists()


@pytest.mark.parametrize(
    ("options", "ranks", "cpus"), [(["--gpus-per-node=2", "--cpus-per-task=6"], 4, 3), (["--gpus-per-node=2"], 4, 1), ([], 2, 1)]
)
def test_ranks_of_gpu_nodes_and_of_plain_ones(cluster: Cluster, tmp_path: Path, options: list[str], ranks: int, cpus: int) -> None:
    job = submit(cluster, tmp_path, "--nodes=2", *options, script("generate"), plan="ok", OMP_NUM_THREADS="")
    job.wait(30.0)
    assert job.log().count(f"of {ranks} on node") == job.log().count(f"cpus {cpus}:") == ranks


def test_array_shares(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--array=4-6", script("sweep_array"), "a.yaml", plan="ok ok")
    until(lambda: not cluster.run("squeue", "-h"), 30.0, "array done")
    assert [share for share in range(3) if f"sweep a.yaml sweep.share={share}/3" in job.log()] == [0, 1, 2]


def test_failure_is_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, script("sweep"), plan="fail ok")
    job.wait(60.0)
    assert job.show()["Restarts"] == "1"
    assert "sweep: exit status 1:" in job.log() and "of attempt 0" in job.log()
    assert not (tmp_path / f"sweep-{job.id}.failures").exists()


def test_failures_have_an_end(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--hold", script("sweep"), plan="fail ok")
    (tmp_path / f"sweep-{job.id}.failures").write_text("failed\n" * 3)
    cluster.run("scontrol", "release", job.id)
    job.wait(30.0, "FAILED")
    assert job.show()["Restarts"] == "0" and job.log().splitlines()[-1] == "sweep: failed four times, given up"


def test_mistake_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, script("sweep"), plan="mistake ok")
    job.wait(30.0, "FAILED")
    assert job.show()["ExitCode"] == "2:0" and job.show()["Restarts"] == "0"


def test_end_of_the_time_stops_all_ranks_and_queues_again(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=2", script("sweep"), plan="stop ok")
    until(lambda: job.log().count("attempt 0") == 4, 30.0, "ranks started")
    job.cancel("--signal=USR1", "--batch")  # as SLURM does before the limit
    job.wait(60.0)
    assert job.log().count(" stops\n") == 4 and job.log().count("attempt 1") == 4
    assert job.show()["Restarts"] == "1"


def test_cancelled_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--nodes=2", script("sweep"), plan="stop ok")
    until(lambda: job.log().count("attempt 0") == 2, 30.0, "ranks started")
    job.cancel()
    job.wait(30.0, "CANCELLED")
    assert job.log().count(" stops\n") == 2


def test_preempted_stops_in_order_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--nodes=3", script("sweep"), plan="stop ok")
    until(lambda: job.log().count("attempt 0") == 3, 30.0, "ranks started")
    cluster.run("srun", "--partition=high", "--nodes=3", "--exclusive", "hostname", limit_s=60.0)
    job.wait(60.0)
    assert job.log().count(" stops\n") == 3 and job.log().count("attempt 1") == 3
    assert job.show()["Restarts"] == "1"


def test_rank_that_does_not_leave_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--nodes=2", script("sweep"), plan="hang ok", SLURM_WAIT="1")
    job.wait(60.0)
    assert job.show()["Restarts"] == "1" and "of attempt 0" in job.log()


def test_generate_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    prompts = [{"id": str(number), "prompt": f"What is {number} + {91 - 3 * number}?"} for number in range(1, 25)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    arguments = [f"model.path={ROOT / 'examples/quickstart/run/step_200'}", f"input={tmp_path / 'prompts.jsonl'}", "sampling.logprobs=0"]
    job = submit(cluster, tmp_path, "--nodes=2", "--gpus-per-node=2", script("generate"), *arguments, "output=two.jsonl")
    assert main(["generate", *arguments, f"output={tmp_path / 'one.jsonl'}"]) == 0
    job.wait(120.0)
    assert "replicas=2 fsdp=1 tp=2" in job.log()
    one, two = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("one.jsonl", "two.jsonl"))
    assert [(line["key"], line["outputs"][0]["text"]) for line in one] == [(line["key"], line["outputs"][0]["text"]) for line in two]
    assert len({line["id"] for line in two}) == len(prompts)
