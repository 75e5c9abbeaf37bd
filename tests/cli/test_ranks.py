"""The program on several ranks, as a person starts it: alone, under torchrun, under srun's variables; and when a rank dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = f"model.path={ROOT / 'examples/quickstart/run'}"
PROGRAM = [sys.executable, "-m", "dist_infer"]
ANSWERS = "> What is 12 + 7?\n 12 + 7 = 19.\n> What is the capital of Norway?\n The capital of Norway is Oslo.\n"
PROMPTS = 'prompts=["What is 12 + 7?", "What is the capital of Norway?"]'
TIMEOUT = 120


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE") and not key.startswith("SLURM_")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def run(*arguments: str, program: list[str] = PROGRAM) -> subprocess.CompletedProcess[str]:
    """The program, run to its end."""
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=TIMEOUT, env=environment(), cwd=ROOT)


@contextmanager
def started(*arguments: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """The program, running; killed with all its ranks when the test is over."""
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**extra),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers(parent: int) -> list[int]:
    """Ranks that process `parent` started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_alone_the_process_is_rank_0() -> None:
    done = run("generate", QUICKSTART, PROMPTS, "parallel.tp=2", "parallel.fsdp=2")
    assert (done.returncode, done.stdout) == (0, ANSWERS), done.stderr
    assert "fsdp=2 tp=2" in done.stderr.splitlines()[-1]


def test_under_torchrun_with_nothing_given() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dist_infer"]
    done = run("generate", QUICKSTART, PROMPTS, program=torchrun)
    assert (done.returncode, done.stdout) == (0, ANSWERS), done.stderr
    assert "fsdp=1 tp=2" in done.stderr


def test_a_mistake_under_torchrun_is_said_once() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dist_infer"]
    done = run("generate", QUICKSTART, PROMPTS, "parallel.tp=3", program=torchrun)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("dist-infer: error:") == 1
    assert "tp=3 = 3 ranks, but the world has 2" in done.stderr


def test_under_srun_variables() -> None:
    with socket.socket() as probe:  # a port that is free now, where a job's own is made from its id
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    common |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = ("generate", QUICKSTART, PROMPTS, "parallel.tp=2")
    with (
        started(*arguments, SLURM_PROCID="0", SLURM_LOCALID="0", **common) as first,
        started(*arguments, SLURM_PROCID="1", SLURM_LOCALID="1", **common) as second,
    ):
        assert second.communicate(timeout=TIMEOUT)[0] == ""
        out, error = first.communicate(timeout=TIMEOUT)
    assert (first.returncode, second.returncode, out) == (0, 0, ANSWERS), error


def test_damaged_weights_on_two_ranks() -> None:
    bad = ROOT / "tests/data/fixtures/bad/f_nan"
    path = [
        f"model.path={bad / 'checkpoints'}",
        f"model.config={bad / 'config.toml'}",
        f"model.tokenizer={ROOT / 'examples/quickstart/run'}",
    ]
    done = run("generate", PROMPTS, "parallel.tp=2", *path)
    assert done.returncode == 2 and done.stdout == ""
    assert "weight model.layers.1.mlp.down_proj.weight[35, 4] is nan" in done.stderr.splitlines()[-1]


def test_replicas_share_a_file(tmp_path: Path) -> None:
    lines = [{"id": str(i), "prompt": f"What is {i} + 9?"} for i in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("generate", QUICKSTART, f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out.jsonl'}", "parallel.replicas=2")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in results] == [str(i) for i in range(30)]
    right = sum(line["outputs"][0]["text"] == f" {i} + 9 = {i + 9}." for i, line in enumerate(results))
    assert right >= 28  # the model itself is not always right


def test_a_killed_rank_is_named_and_nobody_is_left(tmp_path: Path) -> None:
    lines = [{"id": str(i), "prompt": f"What is {i} + 9?", "sampling": {"max_tokens": 200, "ignore_eos": True}} for i in range(400)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial = tmp_path / "out.jsonl.partial"
    with started("generate", QUICKSTART, f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out.jsonl'}", "parallel.tp=3") as process:
        deadline = time.monotonic() + 5 * TIMEOUT  # ranks on a busy machine start slowly
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        ranks = workers(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, error = process.communicate(timeout=60)
        assert time.monotonic() - killed < 15  # what is promised
        assert process.returncode == 1
        assert re.search(rf"rank 2 (\(host .*, pid {ranks[1]}\) )?was killed by SIGKILL", error.splitlines()[-1])
        assert not any(alive(rank) for rank in ranks)
    assert partial.exists() and not (tmp_path / "out.jsonl").exists()


def test_an_idle_chat_outlives_the_time_out() -> None:
    arguments = ("chat", QUICKSTART, "parallel.tp=2", "parallel.timeout_s=5", "parallel.collectives=process_group")
    with started(*arguments) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("What is 3 + 4?\n")
        process.stdin.flush()
        assert process.stdout.readline() == " 3 + 4 = 7.\n"
        time.sleep(8)  # idleness is what is tested
        out, error = process.communicate("What is 2 + 2?\n", timeout=TIMEOUT)
    assert (process.returncode, out) == (0, " 2 + 2 = 4.\n"), error
