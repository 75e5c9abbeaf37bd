"""What a bug report needs to know."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from dist_infer.cli.main import main

RUN = Path(__file__).parents[2] / "examples/quickstart/run"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_checkpoint(alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    alone.setenv("WANDB_API_KEY", "a secret")
    alone.setenv("OMP_NUM_THREADS", "3")
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for words in (f"torch {torch.__version__}", platform.python_version(), platform.node(), "OMP_NUM_THREADS=3", "mesh of 1 rank", " lo"):
        assert words in said
    assert "secret" not in said and "WANDB" not in said
    assert "checkpoint" not in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_checkpoint_is_described(alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", f"model.path={RUN}", "parallel.tp=2"]) == 0
    env = capsys.readouterr().out
    assert "4 layers, hidden 128" in env and "source dcp, dialect huggingface" in env and "fsdp=1 x tp=2" in env
    main(["inspect", f"model.path={RUN}"])
    inspected = capsys.readouterr().out
    identity = next(line.split()[1] for line in inspected.splitlines() if line.startswith("identity"))
    assert identity in env


def test_a_launcher_is_told(alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    for name, value in (job | {"SLURM_JOB_NODELIST": "a[1-2]"}).items():
        alone.setenv(name, value)
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "by srun, 4 ranks, 2 on this host" in said and "SLURM_JOB_NODELIST=a[1-2]" in said and "tp=2" in said
    alone.setenv("SLURM_PROCID", "1")
    assert main(["env"]) == 0
    assert capsys.readouterr().out == ""
    alone.setenv("SLURM_PROCID", "0")
    alone.setenv("SLURM_LOCALID", "second")
    assert main(["env"]) == 0
    assert "wrongly: environment variable SLURM_LOCALID='second'" in " ".join(capsys.readouterr().out.split())


def test_a_path_without_a_checkpoint_is_one_line(alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["env", f"model.path={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
