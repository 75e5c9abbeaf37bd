"""Ranks that would not compute the same thing refuse to begin, all with one sentence."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from dist_infer.config.options import read_options
from dist_infer.engine import meeting
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.session import Session
from tests.engine.jobs import FLOAT32
from tests.engine.references import make_model
from tests.ranks import Ranks


def refusal(paths: list[str], programs: list[str]) -> str:
    """Why this rank begins no session on its own path, with its own program."""
    rank = dist.get_rank()
    options = read_options([f"model.path={paths[rank]}", "parallel.tp=2", *FLOAT32])
    with patch.object(meeting, "program", lambda: programs[rank]), pytest.raises(ValueError) as refused:
        Session(options, lambda: Blueprint.of(options), scripted=True)
    return str(refused.value)


def test_ranks_that_differ_refuse_alike(ranks: Ranks, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("one", "another")]
    for seed, path in enumerate(paths):
        make_model(Path(path), seed=seed, num_hidden_layers=1 + seed)
    twice = [paths[0]] * 2
    other_program = "rank 1 runs another dist_infer than rank 0 does: is it the same on all hosts?"
    assert ranks(2).run(refusal, twice, ["old", "new"]) == [other_program] * 2
    other_checkpoint = "rank 1 finds another checkpoint than rank 0 does: is their file system the same?"
    assert ranks(2).run(refusal, paths, ["same", "same"]) == [other_checkpoint] * 2
    missing = "rank 1: /no/such/run: no such path"
    assert all(missing in said for said in ranks(2).run(refusal, [paths[0], "/no/such/run"], ["same", "same"]))


def test_a_program_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    source = tmp_path / "inner" / "module.py"
    source.write_text("1")
    with patch.object(meeting, "__file__", str(source)):
        first = meeting.program()
        (tmp_path / "notes.txt").write_text("anything")
        assert meeting.program() == first
        source.write_text("2")
        assert meeting.program() != first
