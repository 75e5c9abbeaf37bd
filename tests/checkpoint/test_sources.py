"""Each format is read in place to the tensors that were saved."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from dist_infer.checkpoint import reader
from dist_infer.checkpoint.locate import locate
from dist_infer.checkpoint.sources import codec, is_checkpoint, open_source
from dist_infer.checkpoint.sources.codec import verify_crc
from tests.checkpoint.whole import same, tensors

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
FORMS = FIXTURES / "dcp_forms"  # one state of two gloo ranks, saved by torch 2.13 in each of its forms
SMALL = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(7), "c": torch.randn(5).bfloat16(), "none": torch.empty(0, 3)}


def test_a_file_of_litgpt() -> None:
    source = open_source(FIXTURES / "litgpt_llama")
    stored = torch.load(FIXTURES / "litgpt_llama/lit_model.pth", weights_only=True)
    assert source.kind == "torch_save" and same(tensors(source), stored)
    assert all(chunk.codec == "raw" for entry in source.index().values() for chunk in entry.chunks)
    assert sum(verify_crc(source.root, entry.chunks[0], entry.dtype) for entry in source.index().values()) > 0


def test_what_files_of_torch_save_hold_beside_tensors(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 2), "norm": torch.nn.BatchNorm1d(2)})
    saved = {
        "model": {**module.state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)), "deep": {"er": SMALL["c"], 3: SMALL["b"]}},
        "state": module.state_dict(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0]}]},
        "step": 10**12, "name": "run é", "flags": (True, None, b"bytes"),
    }  # fmt: skip
    torch.save(saved, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    wanted = {f"model.{name}": value for name, value in module.state_dict().items()}
    wanted |= {f"state.{name}": value for name, value in module.state_dict().items()}
    wanted |= {"model.parameter": torch.ones(2), "model.deep.er": SMALL["c"], "model.deep.3": SMALL["b"]}
    assert same(tensors(source), wanted) and source.other_bytes > 36


def test_types_that_have_no_storage_of_their_own(tmp_path: Path) -> None:
    saved = {"a": torch.ones(4).to(torch.float8_e4m3fn), "b": torch.arange(6).to(torch.uint16)[2:]}
    torch.save(saved, tmp_path / "lit_model.pth")
    index = open_source(tmp_path).index()
    assert [(entry.dtype, entry.shape) for entry in index.values()] == [("float8_e4m3fn", (4,)), ("uint16", (4,))]
    (chunk,) = index["b"].chunks
    stored = (tmp_path / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
    assert stored == bytes([2, 0, 3, 0, 4, 0, 5, 0])


def test_complex_tables_of_older_trainers(tmp_path: Path) -> None:
    saved = {"freqs_cis": torch.polar(torch.ones(4, 2), torch.randn(4, 2)), "weight": torch.ones(3)}
    torch.save(saved, tmp_path / "lit_model.pth")
    save_file(saved, tmp_path / "some.safetensors")
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for path in (tmp_path / "lit_model.pth", tmp_path / "some.safetensors", tmp_path / "dcp"):
        assert {name: entry.dtype for name, entry in open_source(path).index().items()} == {"freqs_cis": "complex64", "weight": "float32"}


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    saved = {"embed": whole, "head": whole, "rows": whole[2:5], "flat": whole.view(-1)[3:7]}
    torch.save(saved, tmp_path / "lit_model.pth")
    source = open_source(tmp_path / "lit_model.pth")
    assert same(tensors(source), saved)
    compared = {name: verify_crc(tmp_path, entry.chunks[0], entry.dtype) for name, entry in source.index().items()}
    assert compared == {"embed": 96, "head": 96, "rows": 0, "flat": 0}  # a CRC is kept of whole records


def test_sharded_bin_files(tmp_path: Path) -> None:
    torch.save({"a": SMALL["a"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": SMALL["b"], "c": SMALL["c"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin", "c": "pytorch_model-00002-of-00002.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert locate(str(tmp_path)).path == locate(str(index)).path == tmp_path
    assert same(tensors(open_source(tmp_path)), {name: SMALL[name] for name in "abc"})
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002.bin: missing"):
        open_source(tmp_path)


def test_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SMALL, tmp_path / "lit_model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    source = open_source(tmp_path)
    assert same(tensors(source), SMALL)
    assert verify_crc(tmp_path, source.index()["a"].chunks[0], "float32") == 0


@pytest.mark.parametrize(("form", "kind"), [("ranks", "dcp"), ("safetensors", "dcp"), ("pieces", "safetensors"), ("zstd", "dcp")])
def test_forms_of_dcp(form: str, kind: str) -> None:
    if form == "zstd":
        pytest.importorskip("zstandard")
    source = open_source(locate(str(FORMS / form)).path)
    assert source.kind == kind and source.ignored == ()
    assert same(tensors(source), load_file(FORMS / "reference.safetensors"))


def test_compressed_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"weight model\.\w is compressed with zstd.*pip install zstandard"):
        open_source(FORMS / "zstd")


class Inflater:
    """Stands for zstandard's decoder, whatever is installed: the tests compress with zlib."""

    def __init__(self, max_window_size: int) -> None:
        self.inflate = zlib.decompressobj()

    def stream_reader(self, window: Any) -> Inflater:
        self.window = window
        return self

    def read(self, size: int) -> bytes:
        while True:
            rest = self.inflate.unconsumed_tail or self.window.read(1 << 10)
            data = self.inflate.decompress(rest, size)
            if data or not rest:
                return data


@pytest.fixture
def compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DCP directory whose items are compressed."""
    package = types.ModuleType("zstandard")
    package.ZstdDecompressor, package.ZstdError = Inflater, zlib.error  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("zstandard", None)
    monkeypatch.setitem(sys.modules, "zstandard", package)
    dcp.save({f"w{number}": torch.full((300, 100), float(number)) for number in range(6)}, checkpoint_id=tmp_path, no_dist=True)
    metadata: Metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    stored, packed = (tmp_path / "__0_0.distcp").read_bytes(), bytearray()
    for key, info in metadata.storage_data.items():
        item = zlib.compress(stored[info.offset : info.offset + info.length])
        metadata.storage_data[key] = _StorageInfo(info.relative_path, len(packed), len(item), ["stream.zstd/1"])
        packed += item
    (tmp_path / "__0_0.distcp").write_bytes(packed)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    return tmp_path


@pytest.mark.parametrize("threads", [1, 4])
def test_compressed_items_are_decoded_once(compressed: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    decoded = []
    decode = codec.decode
    monkeypatch.setattr(reader, "STAGING", 1 << 14)  # eight reads of each item
    monkeypatch.setattr(codec, "decode", lambda fd, chunk, dtype: decoded.append(chunk.offset) or decode(fd, chunk, dtype))
    found = tensors(open_source(compressed), threads)
    assert all((found[f"w{number}"] == number).all() for number in range(6))
    assert len(decoded) == len(set(decoded)) == 6


def test_damaged_compressed_items(compressed: Path) -> None:
    source = open_source(compressed)
    entry = source.index()["w1"]
    assert verify_crc(compressed, entry.chunks[0], entry.dtype) == 120_000
    data = bytearray((compressed / "__0_0.distcp").read_bytes())
    data[entry.chunks[0].offset + 40 : entry.chunks[0].offset + 50] = bytes(10)
    (compressed / "__0_0.distcp").write_bytes(data)
    with pytest.raises(ValueError, match=r"__0_0.distcp( at byte 1?\d,\d+)?: weight w1: .*(cannot be decoded|not a tensor)"):
        tensors(source)
    bomb = zlib.compress(bytes(50_000_000))
    (compressed / "__0_0.distcp").write_bytes(bomb + bytes(1000))
    chunk = entry.chunks[0]._replace(offset=0, length=len(bomb))
    with pytest.raises(ValueError, match="needs at most 1,168,576 bytes and it has more"):
        verify_crc(compressed, chunk, "float32")


def test_stages_of_a_pipeline() -> None:
    step = FIXTURES / "kempnerforge_pp2/checkpoints/step_3"
    assert locate(str(FIXTURES / "kempnerforge_pp2")).path == step
    source = open_source(step)
    wanted: dict[str, torch.Tensor] = {}
    for stage in ("pp0", "pp1"):
        wanted |= tensors(open_source(step / stage))
    assert same(tensors(source), wanted)
    assert {chunk.file.split("/")[0] for entry in source.index().values() for chunk in entry.chunks} == {"pp0", "pp1"}


def test_stages_that_share_a_weight(tmp_path: Path) -> None:
    shared, other = torch.randn(4, 3), torch.ones(2)
    for stage, state in enumerate([{"embed": shared, "one": other}, {"embed": shared, "two": other}]):
        dcp.save(state, checkpoint_id=tmp_path / f"step_1/pp{stage}", no_dist=True)
    assert same(tensors(open_source(locate(str(tmp_path)).path)), {"embed": shared, "one": other, "two": other})
    shutil.rmtree(tmp_path / "step_1/pp1")
    dcp.save({"embed": shared.t().contiguous()}, checkpoint_id=tmp_path / "step_1/pp1", no_dist=True)
    with pytest.raises(ValueError, match=r"pp1/.metadata: weight embed is float32 \(3, 4\), and float32 \(4, 3\) in another part"):
        open_source(tmp_path / "step_1")


def test_a_stage_that_is_missing_or_not_written_whole(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "kempnerforge_pp2/checkpoints/step_3", tmp_path / "step_3")
    (tmp_path / "step_3/pp1/.metadata").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of its steps .1. is complete"):
        locate(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pp1: incomplete checkpoint: it has .distcp files but no .metadata"):
        locate(str(tmp_path / "step_3"))
    shutil.rmtree(tmp_path / "step_3/pp0")
    assert not is_checkpoint(tmp_path / "step_3")


def test_fast_llm() -> None:
    source = open_source(FIXTURES / "fast_llm_llama")
    wanted: dict[str, torch.Tensor] = {}
    for file in sorted((FIXTURES / "fast_llm_llama").glob("model_*.safetensors")):
        wanted |= load_file(file)
    assert source.kind == "fast_llm" and "decoder.0.mixer.query.weight/weights" in source.index()
    assert same(tensors(source), wanted)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("format: fast_llm", "format: distributed", "can be read by Fast-LLM alone; export the checkpoint"),
        ("fast_llm_version: 0.4.0", "fast_llm_version: 0.2.3", "only 0.3.0 and later"),
        ("fast_llm_version: 0.4.0", "fast_llm_version: [0]", "only 0.3.0 and later"),
        ("state_index:", "other:", "no metadata.state_index"),
        ("weights: model_0.safetensors", "weights: ../model_0.safetensors", "outside"),
        ("weights: model_0.safetensors", "weights: model_9.safetensors", "model_9.safetensors: missing"),
        ("weights: model_0.safetensors", "weights: model_3.safetensors", "does not hold it"),
        ("  type: gpt\n", "  type: " + "[" * 5000 + "\n", "nests more than"),
        ("  type: gpt\n", "  type: *nowhere\n", "not readable as YAML"),
    ],
)
def test_fast_llm_that_is_refused(tmp_path: Path, old: str, new: str, part: str) -> None:
    shutil.copytree(FIXTURES / "fast_llm_llama", tmp_path / "c")
    metadata = tmp_path / "c/metadata.yaml"
    text = metadata.read_text()
    assert old in text
    metadata.write_text(text.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_source(locate(str(tmp_path / "c")).path)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_pieces_that_do_not_fit(tmp_path: Path) -> None:
    shutil.copytree(FORMS / "pieces", tmp_path / "c")
    (tmp_path / "c/shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weight .* chunks hold"):
        open_source(tmp_path / "c")
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(FileNotFoundError, match="has 1 of the 3 files"):
        open_source(tmp_path)


def test_ranks_that_are_missing(tmp_path: Path) -> None:
    shutil.copytree(FORMS / "ranks", tmp_path / "c")
    (tmp_path / "c/__1.metadata").rename(tmp_path / "c/kept")
    with pytest.raises(ValueError, match=r"weight .* chunks hold .* of its .* elements"):
        open_source(tmp_path / "c")
    (tmp_path / "c/kept").rename(tmp_path / "c/__2.metadata")
    with pytest.raises(FileNotFoundError, match="incomplete checkpoint"):
        locate(str(tmp_path / "c"))


@pytest.mark.parametrize("step", ["step3/model_and_optim", "epoch_3", "step_3", "checkpoint_3/pytorch_model_fsdp_0", "step-00000003"])
def test_directories_of_trainers(tmp_path: Path, step: str) -> None:
    file = "lit_model.pth" if step.startswith("step-") else ".metadata"
    for number in ("1", "3", "7"):
        place = tmp_path / "run" / step.replace("3", number)
        place.mkdir(parents=True)
        (place / file).touch()
    top = tmp_path / "run" / step.split("/")[0]
    assert locate(str(top)).path == locate(str(top), 3).path == locate(str(tmp_path / "run"), 3).path == tmp_path / "run" / step
    assert "7" in locate(str(tmp_path / "run")).path.relative_to(tmp_path).as_posix()
    with pytest.raises(FileNotFoundError, match="has no step 4; it has 7, 3, 1"):
        locate(str(tmp_path / "run"), 4)
    with pytest.raises(ValueError, match=r"of step 3; model\.step=4"):
        locate(str(tmp_path / "run" / step), 4)
    (tmp_path / "run" / step / file).unlink()
    with pytest.raises(FileNotFoundError, match="step 3 is not a complete checkpoint"):
        locate(str(tmp_path / "run"), 3)


def test_what_training_ended_with_is_the_newest(tmp_path: Path) -> None:
    for name in ("step-00000100", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lit_model.pth").touch()
    assert locate(str(tmp_path)).path.name == "final" and locate(str(tmp_path), 100).path.name == "step-00000100"


def test_a_latest_that_was_never_filled(tmp_path: Path) -> None:
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_5/.metadata").touch()
    (tmp_path / "latest").touch()
    assert locate(str(tmp_path)).path.name == "step_5"


def test_the_directory_of_a_run_of_torchtitan() -> None:
    run = FIXTURES / "torchtitan_llama3"
    assert locate(str(run)).path == run / "outputs/checkpoint/step-3"


def test_latest_link_that_leads_away(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/step_1").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest").symlink_to(tmp_path / "elsewhere/step_1")
    with pytest.raises(ValueError, match="outside the run's directory"):
        locate(str(tmp_path / "run"))
