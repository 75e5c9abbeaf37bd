"""A sweep on two nodes with two ranks each, left alone and disturbed in every way that clusters know: the results are the same."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job, until
from tests.cluster.sweeps import OTHER_MESH, REQUESTS, STEPS, TOLERANCE, Sweep, assert_same

pytestmark = pytest.mark.xdist_group("cluster")

EARLY = REQUESTS * 27 // 100  # in the middle of the second checkpoint
LIMIT_S = 240.0
IN_FLIGHT = 4 * 4  # sequences of all leaders


@pytest.fixture(scope="session")
def undisturbed(whole_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The sweep that was left alone."""
    sweep = Sweep(whole_cluster, tmp_path_factory.mktemp("undisturbed"))
    sweep.submit().wait(LIMIT_S)
    assert sweep.lines() == len(sweep.requests())
    return sweep


@pytest.fixture
def sweep(cluster: Cluster, tmp_path: Path) -> Iterator[Sweep]:
    """One to disturb."""
    yield Sweep(cluster, tmp_path)


def assert_went_on(job: Job, sweep: Sweep, undisturbed: Sweep, tolerance: float = TOLERANCE) -> None:
    """The job ends, after at least one more attempt, with the results of the sweep that was left alone, and little computed twice."""
    job.wait(LIMIT_S)
    assert int(job.show()["Restarts"]) >= 1, job.log()
    assert_same(sweep, undisturbed, tolerance)
    assert sweep.lines() - len(sweep.requests()) <= IN_FLIGHT


def test_left_alone(undisturbed: Sweep) -> None:
    assert len(undisturbed.requests()) == REQUESTS
    results = undisturbed.results()
    assert list(sorted(results, key=lambda label: int(label.rpartition("_")[2]))) == [f"step_{step}" for step in STEPS]
    accuracies = [results[f"step_{step}"]["quickstart_answers"]["exact_match,last_word"] for step in STEPS]
    assert accuracies == sorted(accuracies) and accuracies[0] < 0.2 and accuracies[-1] > 0.9
    assert (undisturbed.output / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(("ranks", "tolerance"), [(1, OTHER_MESH), pytest.param(2, TOLERANCE, marks=pytest.mark.long)])
def test_end_of_the_time(sweep: Sweep, undisturbed: Sweep, ranks: int, tolerance: float) -> None:
    job = sweep.submit(f"--ntasks-per-node={ranks}")
    sweep.reach(EARLY)
    job.cancel("--signal=USR1", "--batch")
    assert_went_on(job, sweep, undisturbed, tolerance)
    assert "SIGUSR1" in job.log()


def test_killed_rank(sweep: Sweep, undisturbed: Sweep) -> None:
    job = sweep.submit()
    sweep.reach(EARLY)
    os.kill(job.pids(2)[1], signal.SIGKILL)
    assert_went_on(job, sweep, undisturbed)
    assert "rank 3 (host node2, " in job.log()


@pytest.mark.long
@pytest.mark.parametrize("node", [1, 2])
def test_power_cut(sweep: Sweep, undisturbed: Sweep, node: int) -> None:
    job = sweep.submit()
    sweep.reach(EARLY)
    assert job.show()["BatchHost"] == "node1"
    sweep.cluster.cut(node)
    assert_went_on(job, sweep, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("node", [1, 2])
def test_cable_pulled_while_both_copies_live(sweep: Sweep, undisturbed: Sweep, node: int) -> None:
    job = sweep.submit(options=("parallel.heartbeat_s=90",))
    sweep.reach(EARLY)
    cut_off = job.pids(node)
    sweep.cluster.unplug(node)
    until(lambda: int(job.show()["Restarts"]) == 1 and job.show()["JobState"] == "RUNNING", 90.0, "the job runs elsewhere")
    assert all(Path(f"/proc/{pid}").exists() for pid in cut_off)
    sweep.reach(1, f"job{job.id}.1-*")
    sweep.cluster.plug(node)
    job.wait(LIMIT_S)
    assert job.show()["Restarts"] == "1"  # the copy that was cut off has not queued it again
    assert_same(sweep, undisturbed)


@pytest.mark.long
def test_stopped_rank(sweep: Sweep, undisturbed: Sweep) -> None:
    job = sweep.submit()
    sweep.reach(EARLY)
    os.kill(job.pids(2)[0], signal.SIGSTOP)
    assert_went_on(job, sweep, undisturbed)
    assert "rank 2 (host node2, " in job.log()


@pytest.mark.long
def test_preempted(sweep: Sweep, undisturbed: Sweep) -> None:
    job = sweep.submit()
    sweep.reach(EARLY)
    sweep.cluster.run("srun", "--partition=high", "--nodes=3", "--exclusive", "hostname", limit_s=60.0)
    assert_went_on(job, sweep, undisturbed)


@pytest.mark.long
def test_queued_again_by_hand(sweep: Sweep, undisturbed: Sweep) -> None:
    job = sweep.submit()
    sweep.reach(EARLY)
    sweep.cluster.run("scontrol", "requeue", job.id)
    assert_went_on(job, sweep, undisturbed)


@pytest.mark.long
def test_full_disk(cluster: Cluster, tmp_path: Path, undisturbed: Sweep) -> None:
    sweep = Sweep(cluster, tmp_path, cluster.small / "out")
    job = sweep.submit()
    job.wait(LIMIT_S, "FAILED")
    last = json.loads(next(tmp_path.glob("*.status.json")).read_text())
    assert "No space left on device" in last["error"] and job.show()["ExitCode"] == "2:0"
    assert sweep.lines() > 0
    cluster.run("mount", "-o", "remount,size=64m", str(cluster.small))  # somebody makes room
    before = sweep.lines()
    sweep.submit().wait(LIMIT_S)
    assert_same(sweep, undisturbed)
    assert sweep.lines() - len(sweep.requests()) <= IN_FLIGHT and sweep.lines() > before


@pytest.mark.long
@pytest.mark.parametrize(("nodes", "ranks", "tp", "tolerance"), [(3, 2, 2, TOLERANCE), (1, 3, 1, OTHER_MESH)])
def test_other_world_and_mesh(sweep: Sweep, undisturbed: Sweep, nodes: int, ranks: int, tp: int, tolerance: float) -> None:
    job = sweep.submit()
    sweep.reach(EARLY)
    job.cancel()
    job.wait(60.0, "CANCELLED")
    before = sweep.lines()
    assert before < REQUESTS
    sweep.submit(f"--nodes={nodes}", f"--ntasks-per-node={ranks}", options=(f"parallel.tp={tp}",)).wait(LIMIT_S)
    assert_same(sweep, undisturbed, tolerance)
    assert sweep.lines() - len(sweep.requests()) <= IN_FLIGHT


@pytest.mark.long
@pytest.mark.parametrize("mesh", [("parallel.tp=2", "parallel.fsdp=2"), ("parallel.tp=4",)])
def test_mesh_over_the_nodes(sweep: Sweep, undisturbed: Sweep, mesh: tuple[str, ...]) -> None:
    sweep.submit(options=mesh).wait(LIMIT_S)
    assert_same(sweep, undisturbed, OTHER_MESH)


@pytest.mark.long
def test_array_is_one_job(sweep: Sweep, undisturbed: Sweep) -> None:
    job = sweep.submit("--nodes=1", "--ntasks-per-node=2", "--array=0-2", script="sweep_array")
    until(lambda: not sweep.cluster.run("squeue", "-h"), LIMIT_S, "array done")
    assert (sweep.output / "report.html").exists(), job.log()
    assert_same(sweep, undisturbed)


@pytest.mark.long
def test_bad_network(sweep: Sweep, undisturbed: Sweep) -> None:
    sweep.cluster.worsen(2, loss=0.05, delay_ms=20.0, jitter_ms=20.0)
    job = sweep.submit(options=("parallel.heartbeat_s=60",))
    job.wait(600.0)
    assert job.show()["Restarts"] == "0"
    assert_same(sweep, undisturbed)
