"""Whole sweeps of the quickstart's checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_infer.cli.main import main

RUN = "examples/quickstart/run"
COMMON = (
    f"sweep.checkpoints=[{RUN}]",
    "eval.include_path=examples/quickstart/tasks",
    "eval.tasks=[quickstart]",
    "model.dtype=float32",
    "device=cpu",
    "engine.kv_cache_gib=0.05",
)


def sweep(output: Path, *overrides: str) -> int:
    return main(["sweep", *COMMON, f"output={output}", *overrides])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "journal").iterdir()}


def metrics(output: Path, label: str) -> dict[str, Any]:
    found = json.loads((output / label / "results.json").read_text())["results"]
    return {task: {name: value for name, value in of.items() if name.startswith(("acc", "exact"))} for task, of in found.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    asked = [{"id": "a", "prompt": "What is 2 + 3?"}, {"id": "b", "prompt": ""}, {"id": "c", "prompt": "Sort 3 1 2:"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in asked))
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """A sweep of two checkpoints, run to its end."""
    output = tmp_path_factory.mktemp("sweeps") / "two"
    assert sweep(output, "sweep.steps=50,800", "eval.limit=8", f"sweep.inputs=[{prompts}]") == 0
    return output


def test_a_sweep_leaves_results_samples_and_a_report(done: Path) -> None:
    assert {path.name for path in done.iterdir()} >= {"step_50", "step_800", "journal", "requests.jsonl", "report.html", "status.json"}
    assert json.loads((done / "status.json").read_text())["outcome"] == "complete"
    about = json.loads((done / "step_800" / "results.json").read_text())["dist_infer"]
    assert (about["step"], about["label"], about["checkpoint"]) == (800, "step_800", f"{RUN}/step_800")
    assert about["provenance"]["identity"] and about["provenance"]["options"]["eval.limit"] == 8
    accuracy = [metrics(done, label)["quickstart_choices"]["acc,none"] for label in ("step_50", "step_800")]
    assert accuracy[0] < accuracy[1] == 1.0
    assert len(lines(done / "step_50" / "samples_quickstart_answers.jsonl")) == 8
    keys = [line["key"] for line in lines(done / "requests.jsonl")]
    assert len(keys) == len(set(keys)) == 2 * (8 + 8 * 4 + 2)


def test_a_sweep_generates_from_prompt_files(done: Path) -> None:
    answers = lines(done / "step_800" / "outputs_sums.jsonl")
    assert [answer["id"] for answer in answers] == ["a", "b", "c"]
    assert answers[0]["outputs"][0]["text"] == " 2 + 3 = 5."
    assert answers[1]["error"].startswith("the prompt is empty") and answers[1]["line"] == 2
    assert answers[0]["provenance"]["checkpoint"] == f"{RUN}/step_800"


def test_what_is_done_is_not_done_again(done: Path, prompts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    same = ("sweep.steps=50,800", "eval.limit=8", f"sweep.inputs=[{prompts}]")
    before, results = parts(done), (done / "step_50" / "results.json").read_bytes()
    assert sweep(done, *same) == 0
    assert "2 of 2 points are done" in capfd.readouterr().err
    assert (done / "step_50" / "results.json").read_bytes() == results
    samples = (done / "step_50" / "samples_quickstart_choices.jsonl").read_bytes()
    (done / "step_50" / "results.json").unlink()
    assert sweep(done, *same) == 0, "answered by the journal"
    assert (done / "step_50" / "samples_quickstart_choices.jsonl").read_bytes() == samples
    assert parts(done) == before


def test_a_point_made_by_other_settings_is_made_anew(done: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, output], check=True)
    assert sweep(output, "sweep.steps=800", "eval.limit=9") == 0
    assert len(lines(output / "step_800" / "samples_quickstart_answers.jsonl")) == 9
    assert sum(len(content.splitlines()) for content in parts(output).values()) == sum(
        len(content.splitlines()) for content in parts(done).values()
    ) + (1 + 4), "only what is new was run"


def test_a_grid_loads_each_checkpoint_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grid = "sweep.grid={sampling.seed: [1, 2], sampling.temperature: [0, 0.9]}"
    assert sweep(tmp_path / "grid", "sweep.steps=50,100", "eval.limit=2", "eval.tasks=[quickstart_answers]", grid) == 0
    assert "weights were loaded 2 times for 2 checkpoints" in capfd.readouterr().err
    found = {path.name for path in (tmp_path / "grid").iterdir() if path.is_dir()}
    assert {
        f"step_{step},sampling.seed={seed},sampling.temperature={t}" for step in (50, 100) for seed in (1, 2) for t in ("0", "0.9")
    } <= found
    texts = [
        [line["resps"] for line in lines(tmp_path / "grid" / f"step_100,sampling.seed={seed},sampling.temperature=0.9" / name)]
        for seed in (1, 2)
        for name in ["samples_quickstart_answers.jsonl"]
    ]
    assert texts[0] != texts[1], "seeds matter"


def test_shares_make_the_report_of_the_whole(done: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output, same = tmp_path / "array", ("sweep.steps=50,800", "eval.limit=8", f"sweep.inputs=[{prompts}]")
    assert sweep(output, *same, "sweep.share=1/2") == 0
    assert "the last one to end makes the report" in capfd.readouterr().err
    assert not (output / "report.html").exists()
    assert sweep(output, *same, "sweep.share=0/2") == 0
    assert (output / "report.html").exists()
    assert [metrics(output, label) for label in ("step_50", "step_800")] == [metrics(done, label) for label in ("step_50", "step_800")]
    assert sorted(line["key"] for line in lines(output / "requests.jsonl")) == sorted(
        line["key"] for line in lines(done / "requests.jsonl")
    )


def test_a_signal_stops_it_and_other_ranks_go_on(tmp_path: Path) -> None:
    """Two replicas are stopped in the middle of work; two ranks of one replica do the rest, and nothing twice."""
    output, straight = tmp_path / "stopped", tmp_path / "straight"
    same = [*COMMON, "sweep.steps=50,200,800", f"output={output}"]
    command = [sys.executable, "-m", "dist_infer", "sweep", *same, "parallel.replicas=2", "parallel.tp=1"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (output / "journal").exists() or sum(content.count(b"\n") for content in parts(output).values()) < 30:
            assert run.poll() is None and time.monotonic() < deadline, "work has begun"
            time.sleep(0.01)
        run.send_signal(signal.SIGUSR1)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 75, said
    assert said.splitlines()[-1] == "dist-infer: error: stopped by SIGUSR1; the same command goes on from here"
    status = json.loads((output / "status.json").read_text())
    assert (status["outcome"], status["requeue"]) == ("stopped", True)
    assert main(["sweep", *same, "parallel.tp=2"]) == 0
    assert sweep(straight, "sweep.steps=50,200,800") == 0
    merged, expected = ({line["key"]: line for line in lines(place / "requests.jsonl")} for place in (output, straight))
    assert merged.keys() == expected.keys()
    written = [line["key"] for content in parts(output).values() for line in map(json.loads, content.splitlines())]
    assert len(written) == len(set(written)) == len(expected), "nothing was computed twice"
    for key, line in expected.items():
        assert [output["token_ids"] for output in merged[key]["outputs"]] == [output["token_ids"] for output in line["outputs"]]
        if line["score"] is not None:
            assert merged[key]["score"]["logprob"] == pytest.approx(line["score"]["logprob"], abs=1e-4)
            assert merged[key]["score"]["is_greedy"] == line["score"]["is_greedy"]


def test_a_damaged_checkpoint_fails_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", RUN, run], check=True)
    for step in (50, 400):
        shutil.rmtree(run / f"step_{step}")
        damage(run / "step_200", run / f"step_{step}")
    same = (f"sweep.checkpoints=[{run}]", "sweep.steps=50,100,400,800", "eval.limit=3")
    for _ in range(2):  # the second time it begins with a damaged one
        assert sweep(tmp_path / "out", *same) == 2
        said = capfd.readouterr().err.splitlines()
        assert "is nan" in said[-1] and "1 more failed" in said[-1]
    assert metrics(tmp_path / "out", "step_800")["quickstart_choices"]["acc,none"] == 1.0
    assert not (tmp_path / "out" / "step_50" / "results.json").exists()
    assert json.loads((tmp_path / "out" / "status.json").read_text())["outcome"] == "mistake"


def damage(path: Path, target: Path) -> None:
    """A copy whose weights hold NaN."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, checkpoint_id=path)
    next(tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() == 2 and "norm" not in name)[0, 0] = (
        math.nan
    )
    dcp.save(tensors, checkpoint_id=target, no_dist=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output="], "output is not given"),
        (["eval.tasks=[]"], "nothing to do: give eval.tasks"),
        (["eval.tasks=[quickstart_answer]"], "did you mean quickstart_answers"),
        (["sweep.checkpoints=[no/such/run]"], "no/such/run: no such path"),
        (["sweep.inputs=[no/such.jsonl]"], "no/such.jsonl: no such file"),
        (["sweep.share=5/6"], "none of 5 checkpoints falls to this share"),
        (["sweep.checkpoints=[examples/quickstart/run,tests/data/fixtures/kempnerforge]"], "load it as a new one"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(
    overrides: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "never", *overrides) == 2
    said = capfd.readouterr().err.strip()
    assert message in said and "\n" not in said
    assert not list(tmp_path.glob("never/step_*"))
