"""`dist-infer plan`: a table for people, figures as JSON, and one line for mistakes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_infer.cli.main import MISTAKE, main
from dist_infer.cli.plan import MOST_SHOWN
from dist_infer.config.field import check_ranges
from dist_infer.config.options import read_options
from dist_infer.engine import this_machine
from dist_infer.engine.cluster import Cluster, Link
from tests.engine.references import make_model

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "configs/clusters").glob("*.yaml"))
LARGE = f"model.path={ROOT / 'configs/models/llama-3.1-405b.json'}"
H100 = f"cluster.machine={ROOT / 'configs/clusters/h100x8.yaml'}"
QUICKSTART = f"model.path={ROOT / 'examples/quickstart/run/step_800'}"
LIMITS = ("engine.max_model_len=8192", "engine.kv_cache_fraction=0.8")


def cluster(path: Path) -> Cluster:
    return Cluster.described(read_options([f"cluster.machine={path}"]).cluster)


def test_405b_on_two_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    assert main(["plan", LARGE, H100, "cluster.nodes=2", *LIMITS, f"output={output}"]) == 0
    said = capsys.readouterr().out
    assert "parallel.tp=16" in said and "traffic" in said
    fitting, _, others = said.partition("do not fit")
    assert f"{2:>8} {1:>5} {8:>4} " in others and f"{2:>8} {1:>5} {8:>4} " not in fitting
    meshes = {tuple(mesh["shape"].values()): mesh for mesh in json.loads(output.read_text())["meshes"]}
    assert next(iter(meshes)) == (1, 1, 16)
    for shape in ((1, 1, 16), (1, 2, 8)):
        held = meshes[shape]["footprint"]
        assert held["missing"] == 0
        assert held["weights"] == pytest.approx(2 * 405.85e9 / 16, rel=0.02)  # 16 ranks hold 8 KV heads twice
    lacking = meshes[2, 1, 8]["footprint"]
    assert lacking["missing"] > 15 << 30
    assert lacking["weights"] == pytest.approx(2 * 405.85e9 / 8, rel=0.01)


def test_a_thousand_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LARGE, H100, "cluster.nodes=128", "workload.sequences=16384", *LIMITS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("of a decode step is reading the weights") or " step is " in line for line in lines) == MOST_SHOWN


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_machines_that_are_named(path: Path) -> None:
    section = yaml.safe_load(path.read_text())["cluster"]
    check_ranges(read_options((), str(path)).cluster, "cluster")
    found = cluster(path)
    assert found.devices == 8 and found.products.bandwidth == pytest.approx(section["attained"] * section["memory_gb_s"] * 1e9)
    assert found.memory == pytest.approx((section["memory_gib"] - section["reserved_gib"]) * 2**30)


def test_figures_go_over_a_machine() -> None:
    options = read_options([H100, "cluster.gpus_per_node=4", "cluster.tflops=500"])
    found = Cluster.described(options.cluster)
    assert (found.devices, found.products.flops) == (4, pytest.approx(0.7 * 500e12))


def test_a_checkpoint_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it is measured with is what the run would use; the measuring itself is not of this test."""
    asked = []

    def measure(dtype: torch.dtype, pack: bool, native: bool) -> Cluster:
        asked.append((dtype, pack, native))
        return replace(cluster(CLUSTERS[0]), inter=Link(math.inf, 0))

    monkeypatch.setattr(this_machine, "measure", measure)
    output = tmp_path / "plan.json"
    work = ["workload.prompt_tokens=64", "workload.output_tokens=64", f"output={output}"]
    assert main(["plan", QUICKSTART, "engine.native_kernels=false", *work]) == 0
    assert json.loads(output.read_text())["cluster"]["inter"]["bandwidth"] is None
    assert asked == [(torch.bfloat16, True, False)]
    assert "4 heads" in capsys.readouterr().out


def test_weights_are_of_the_type_they_are_stored_in(tmp_path: Path) -> None:
    """Whatever the configuration says; and as such they are read, whatever they become."""
    make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))

    def mesh(*overrides: str) -> dict[str, Any]:
        output = tmp_path / "plan.json"
        work = ["workload.prompt_tokens=8", "workload.output_tokens=8", f"output={output}"]
        assert main(["plan", f"model.path={tmp_path}", H100, "cluster.gpus_per_node=1", *work, *overrides]) == 0
        return json.loads(output.read_text())["meshes"][0]

    stored, converted = mesh(), mesh("model.dtype=bfloat16")
    assert stored["footprint"]["weights"] == 2 * converted["footprint"]["weights"]
    assert stored["load_s"] == converted["load_s"]


def test_a_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its file, by the directory of that file, and as model.config."""
    (tmp_path / "config.json").write_text(Path(LARGE.partition("=")[2]).read_text())
    said = []
    for model in (f"model.path={tmp_path}", f"model.path={tmp_path / 'config.json'}", f"model.config={tmp_path}"):
        assert main(["plan", model, H100, "cluster.nodes=2", *LIMITS]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1


@pytest.mark.long
def test_this_machine_is_measured() -> None:
    found = this_machine.measure(torch.float32, True, True)
    for rates in (found.products, found.gathered_products, found.attention):
        assert 1e6 < rates.bandwidth < 1e12 and 1e7 < rates.flops < 1e14
    assert found.kind == "cpu" and found.nodes == 1 and found.memory > 0
    assert 0 <= found.layer_s < 1 and 0 <= found.step_s < 1 and found.storage > 1e6 and found.fresh > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model.path is not given"),
        ([LARGE, "cluster.tflops=1"], "cluster.gpus_per_node, cluster.memory_gib, cluster.memory_gb_s, cluster.storage_gb_s: not given"),
        ([LARGE, "cluster.nodes=2"], "cluster.machine=configs/clusters/h100x8.yaml"),
        ([LARGE, "cluster.machine=none.yaml"], "none.yaml: No such file"),
        ([LARGE, H100, "cluster.nodes=0"], "cluster.nodes=0: must be at least 1"),
        ([LARGE, H100, "cluster.attained=1.5"], "cluster.attained=1.5: must be at most 1"),
        ([LARGE, H100, "cluster.gpu=8"], "cluster.gpu: there is no such option; did you mean"),
        ([LARGE, H100, "parallel.tp=3"], "parallel: tp=3: no mesh of 8 ranks"),
        ([LARGE, H100, "workload.prompt_tokens=131072"], "a sequence has at most 131072 tokens"),
        ([LARGE, H100, "output=/no/such/plan.json"], "there is no directory /no/such"),
        (["model.path=/no/such/config.json", H100], "/no/such/config.json: no such path"),
        ([f"model.path={ROOT / 'launch'}", H100], "a directory that is no checkpoint"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "measure", lambda *_: pytest.fail("measured before the mistake was found"))
    assert main(["plan", *arguments]) == MISTAKE
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err, said.err
