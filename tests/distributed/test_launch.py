"""Launchers' variables, and ranks that rank 0 starts itself."""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_infer.distributed.launch import RankVariables, expand_counts, expand_nodes, start_local_ranks

SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08],login",
    "SLURM_JOB_NODELIST": "other",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a[1-3,5],b", ["a1", "a2", "a3", "a5", "b"]),
        ("n[08-10,100]", ["n08", "n09", "n10", "n100"]),
        ("r[1-2]n[0-1]-ib,x.y", ["r1n0-ib", "r1n1-ib", "r2n0-ib", "r2n1-ib", "x.y"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_nodes(text) == hosts


def test_task_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="must look like"):
        expand_counts("many")


def test_srun() -> None:
    variables = RankVariables.read(SRUN)
    assert variables is not None
    assert (variables.rank, variables.world_size, variables.local_rank, variables.local_world_size) == (3, 5, 1, 2)
    assert (variables.master_addr, variables.launcher) == ("gpu07", "srun")
    ports = {RankVariables.read(SRUN | change).master_port for change in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"})}  # type: ignore[union-attr]
    assert len(ports) == 3 and all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # a batch script
        SRUN | {"SLURM_STEP_ID": str(2**32 - 6)},  # the shell of salloc
        SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_alone(environ: dict[str, str]) -> None:
    assert RankVariables.read(environ) is None


def test_torchrun_goes_before_srun() -> None:
    variables = RankVariables.read(SRUN | TORCHRUN)
    assert variables == RankVariables(1, 4, 1, 2, "a", 99)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"RANK": "four"}, "RANK='four'"), ({"RANK": "4"}, "RANK=4: .*WORLD_SIZE=4"), ({"MASTER_PORT": ""}, "MASTER_ADDR or MASTER_PORT")],
)
def test_bad_variables(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankVariables.read(TORCHRUN | change)


def test_local_ranks_get_their_variables_and_are_reaped(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "EXTRA")
    code = f"import os; open(os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in {names}))"
    local = start_local_ranks(3, [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"], 77, {"EXTRA": "e"})
    local.stop(30.0)
    assert local.poll() == {1: 0, 2: 0}
    assert [(tmp_path / rank).read_text() for rank in "12"] == ["1 3 1 77 e", "2 3 2 77 e"]


def test_local_ranks_that_do_not_end_are_killed() -> None:
    local = start_local_ranks(2, [sys.executable, "-c", "import signal; signal.pause()"], 77)
    assert local.poll() == {}
    local.stop(0.0)
    assert local.poll() == {1: -signal.SIGKILL}


def start_alone(*arguments: str) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("alone.py")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[2])}
    return subprocess.Popen([sys.executable, program, *arguments], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_gone(pids: list[int]) -> None:
    """Each process ends within seconds, if it has not."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([descriptor], [], [], 15.0)
        os.close(descriptor)
        assert ended, f"process {pid} is still there"


def test_alone_starts_its_ranks_and_leaves_none() -> None:
    process = start_alone("sum")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["total"] == 3.0
    assert_gone(json.loads(out)["pids"])
    assert err == ""


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_is_named_and_all_leave(victim: int) -> None:
    process = start_alone("loop")
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())["pids"]
    os.kill(pids[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=15)
    assert process.returncode == (-signal.SIGKILL if victim == 0 else 1)
    assert_gone(pids)
    last = err.strip().splitlines()[-1]
    assert f"rank {victim} (" in last and f"pid {pids[victim]})" in last
    assert "was killed by SIGKILL" in last or victim == 0


def test_error_of_a_worker_is_the_last_line() -> None:
    process = start_alone("raise")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    pids = json.loads(out)["pids"]
    last = err.strip().splitlines()[-1]
    assert last == f"failed: rank 2 (host {platform.node()}, pid {pids[2]}) failed: ValueError: rank two has had enough"
    assert_gone(pids)


def test_worker_that_cannot_start_is_named() -> None:
    process = start_alone("broken")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exited with code 3 while starting" in err.strip().splitlines()[-1]
