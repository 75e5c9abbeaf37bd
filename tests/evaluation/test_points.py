"""Checkpoints and settings of a sweep, from what its options say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_infer.config.options import Options, read_options
from dist_infer.evaluation.points import Point, points, share_of

RUN = Path("examples/quickstart/run")


def of(*overrides: str) -> list[Point]:
    return points(read_options(overrides), [])


def labels(*overrides: str) -> list[str]:
    return [point.label for point in of(*overrides)]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, `a` with three steps of which the last is not complete, and `b` with one."""
    for run, steps in {"a": (50, 100), "b": (800,)}.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.json").symlink_to((RUN / "config.json").resolve())
        for step in steps:
            (tmp_path / run / f"step_{step}").symlink_to((RUN / f"step_{step}").resolve())
    unfinished = tmp_path / "a" / "step_200"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"begun")
    return tmp_path


def test_a_run_means_all_its_steps_in_order() -> None:
    found = of(f"sweep.checkpoints=[{RUN}]")
    assert [(point.path, point.step, point.label) for point in found] == [
        (RUN / f"step_{step}", step, f"step_{step}") for step in (50, 100, 200, 400, 800)
    ]
    assert [point.options.model.path for point in found] == [str(point.path) for point in found]
    assert labels(f"model.path={RUN}") == labels(f"sweep.checkpoints=[{RUN}]"), "without sweep.checkpoints it is model.path"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("100", [100]), ("50,800", [50, 800]), ("100-400", [100, 200, 400]), ("0-800:400", [400, 800]), ("800,50-100", [50, 100, 800])],
)
def test_steps(steps: str, expected: list[int]) -> None:
    assert [point.step for point in of(f"sweep.checkpoints=[{RUN}]", f"sweep.steps={steps}")] == expected


def test_patterns_name_each_checkpoint_once(runs: Path) -> None:
    found = of(f"sweep.checkpoints=[{runs}/*/step_*, {runs}/b]")
    assert [point.label for point in found] == ["a-step_50", "a-step_100", "b-step_800"]


def test_what_is_not_complete_is_passed_over_and_said(runs: Path) -> None:
    said: list[str] = []
    found = points(read_options([f"sweep.checkpoints=[{runs}/a]"]), said)
    assert [point.step for point in found] == [50, 100]
    assert len(said) == 1 and "step_200" in said[0]
    with pytest.raises(FileNotFoundError, match="step_200"):
        of(f"sweep.checkpoints=[{runs}/a/step_200]")


def test_the_grid_sets_options_and_names_the_points() -> None:
    found = of(f"sweep.checkpoints=[{RUN}/step_50]", "sweep.grid={sampling.temperature: [0, 0.7], eval.num_fewshot: [0, 2]}")
    assert [point.label for point in found] == [
        f"step_50,sampling.temperature={temperature},eval.num_fewshot={shots}" for temperature in ("0", "0.7") for shots in (0, 2)
    ]
    assert [(point.options.sampling.temperature, point.options.eval.num_fewshot) for point in found] == [(0, 0), (0, 2), (0.7, 0), (0.7, 2)]
    assert found[1].grid == {"sampling.temperature": 0, "eval.num_fewshot": 2}


def test_shares_part_the_checkpoints() -> None:
    every = of(f"sweep.checkpoints=[{RUN}]", "sweep.grid={sampling.seed: [1, 2]}")
    shares = [share_of(every, f"{number}/2") for number in range(2)]
    assert [point.step for point in shares[0]] == [50, 50, 200, 200, 800, 800]
    assert sorted(point.label for share in shares for point in share) == sorted(point.label for point in every)
    assert share_of(every, None) == every
    assert share_of(every, "6/7") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "sweep.checkpoints is not given"),
        (["sweep.checkpoints=[no/such]"], "no/such: no such path"),
        (["sweep.checkpoints=['no/such*']"], "nothing matches this pattern"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.steps=7"], "no complete checkpoint with steps 7"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.steps=5-"], "sweep.steps=5-: write steps as"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={parallel.tp: [1]}"], "parallel.tp: must be an option of sampling or eval"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={sampling.sed: [1]}"], "sampling.sed: must be"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={eval.tasks: [[a], [b]]}"], "eval.tasks: must be"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={sampling.seed: []}"], "give at least one value"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={sampling.seed: [1, 1]}"], "two of the values are the same"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={sampling.temperature: [-1]}"], "sampling.temperature=-1: must be at least 0"),
        ([f"sweep.checkpoints=[{RUN}]", "sweep.grid={eval.num_fewshot: [x]}"], "eval.num_fewshot='x': must be a whole number"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        of(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", ["1", "2/2", "a/b", "-1/2"])
def test_a_share_that_is_none(share: str) -> None:
    with pytest.raises(ValueError, match=r"sweep\.share"):
        share_of([Point(RUN, None, "x", {}, Options())], share)
