"""Damaged and hostile checkpoints give one clear line, and nothing in them is executed."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from dist_infer.checkpoint import load, open_checkpoint
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.weights import describe

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
STEP = "checkpoints/step_3"
NAME = "model.layers.1.mlp.down_proj.weight"


def open_and_load(path: Path, config: Path | None = None) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(path))
    model = checkpoint.config(str(config) if config else None)
    checkpoint.match(model)
    weights = list(describe(model))
    room = {weight.parameter: torch.full(weight.shape, torch.nan) for weight in weights}
    load(checkpoint, model, weights, 1, 0, room, LoaderOptions())
    return room


def refusal(path: Path, config: Path | None = None) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_and_load(path, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("case", "inner", "parts"),
    [
        ("a_truncated_distcp", STEP, ["__1_0.distcp", "optimizer.state.norm.weight.exp_avg", "cut short"]),
        ("b_missing_distcp", STEP, ["__1_0.distcp", "missing"]),
        ("c_no_metadata", STEP, ["incomplete", ".metadata is"]),
        ("c_no_metadata", "", ["none of its 1 steps is a complete checkpoint", "step_3"]),
        ("d_pickle_exec", STEP, ["posix.system", "refused"]),
        ("f_nan", STEP, ["model.layers.1.mlp.down_proj.weight[35, 4]", "nan"]),
        ("g_safetensors_header_too_long", "", ["model.safetensors", "header", "cut short"]),
        ("h_index_missing_shard", "", ["model-00002-of-00004.safetensors", "missing"]),
        ("i_vocab_mismatch", STEP, ["model.token_embedding.embedding.weight", "512x64", "640x64"]),
    ],
)
def test_bad_fixtures(case: str, inner: str, parts: list[str]) -> None:
    message = refusal(FIXTURES / "bad" / case / inner)
    for part in parts:
        assert part.replace(".metadata is", ".metadata, which is") in message


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a run, to be damaged."""
    shutil.copytree(FIXTURES / "kempnerforge", tmp_path / "run")
    return tmp_path / "run" / STEP


def change(run: Path, edit: Callable[[Metadata], None]) -> None:
    """Rewrite the metadata of `run`, a file this test trusts."""
    path = run / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_hidden_in_metadata_is_run(run: Path, tmp_path: Path) -> None:
    change(run, lambda metadata: metadata.planner_data.update(bomb=Bomb(tmp_path / "ran")))
    assert "refused" in refusal(run)
    assert not (tmp_path / "ran").exists()


def test_nothing_hidden_in_an_item_is_run(tmp_path: Path, run: Path) -> None:
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "item")
    item = (tmp_path / "item").read_bytes()

    def edit(metadata: Metadata) -> None:
        for key in list(metadata.storage_data):
            if key.fqn == NAME:
                metadata.storage_data[key] = _StorageInfo("bomb.distcp", 0, len(item))

    (run / "bomb.distcp").write_bytes(item)
    change(run, edit)
    assert "refused" in refusal(run)
    assert not (tmp_path / "ran").exists()


def move(fqn: str, **changes: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        key = next(key for key in metadata.storage_data if key.fqn == fqn)
        metadata.storage_data[key] = dataclasses.replace(metadata.storage_data[key], **changes)

    return edit


def chunks(edit_chunks: Callable[[list[ChunkStorageMetadata]], None]) -> Callable[[Metadata], None]:
    return lambda metadata: edit_chunks(metadata.state_dict_metadata[NAME].chunks)


def swap_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[NAME].properties.dtype = torch.float16


def forget(metadata: Metadata) -> None:
    del metadata.storage_data[next(key for key in metadata.storage_data if key.fqn == NAME)]


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (move(NAME, relative_path="../__0_0.distcp"), ["'../__0_0.distcp'", "outside"]),
        (move(NAME, relative_path="/etc/passwd"), ["'/etc/passwd'", "outside"]),
        (move(NAME, length=10**9), ["cut short", NAME]),
        (move(NAME, offset=-5), [NAME, "no place in a file"]),
        (move(NAME, offset=7), ["item at byte 7 is not a tensor saved by torch.save"]),
        (move(NAME, transform_descriptors=["zstd"]), [NAME, "zstd", "without compression"]),
        (chunks(lambda found: found.pop()), [NAME, "of its", "incomplete"]),
        (chunks(lambda found: found.append(found[0])), [NAME, "overlap"]),
        (forget, [NAME, "no file holds"]),
        (swap_dtype, ["bfloat16", "float16"]),
        (lambda metadata: metadata.state_dict_metadata.pop(NAME), ["missing", NAME]),
        (lambda metadata: metadata.state_dict_metadata.update({NAME: 5}), [NAME, "neither tensor nor bytes"]),
        (lambda metadata: setattr(metadata.state_dict_metadata[NAME], "size", "12"), ["damaged"]),
        (lambda metadata: metadata.storage_data.update({MetadataIndex("x"): 3}), ["table of storage"]),
    ],
)
def test_damaged_metadata(run: Path, edit: Callable[[Metadata], None], parts: list[str]) -> None:
    change(run, edit)
    message = refusal(run)
    for part in parts:
        assert part in message, message


def test_metadata_cut_short(run: Path) -> None:
    data = (run / ".metadata").read_bytes()
    (run / ".metadata").write_bytes(data[: len(data) // 2])
    assert "not readable as DCP metadata" in refusal(run)


def test_classes_of_an_absent_package_are_stood_in_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_and_load(run)
    module = types.ModuleType("olmo_core.distributed.checkpoint.filesystem")
    foreign = dataclasses.make_dataclass("_StorageInfo", ["relative_path", "offset", "length"])
    foreign.__module__, module._StorageInfo = module.__name__, foreign  # type: ignore[attr-defined]
    for name in ("olmo_core", "olmo_core.distributed", "olmo_core.distributed.checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def edit(metadata: Metadata) -> None:
        for key, info in metadata.storage_data.items():
            metadata.storage_data[key] = foreign(info.relative_path, info.offset, info.length)

    change(run, edit)
    for name in [name for name in sys.modules if name.startswith("olmo_core")]:
        monkeypatch.delitem(sys.modules, name)
    found = open_and_load(run)
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_transposed_item_is_refused(tmp_path: Path) -> None:
    dcp.save({"model.embed_tokens.weight": torch.randn(8, 4).t(), "model.layers.0.self_attn.o_proj.weight": torch.ones(2, 2)},
             checkpoint_id=tmp_path / "c", no_dist=True)  # fmt: skip
    (tmp_path / "config.json").write_text((FIXTURES / "hf_llama/config.json").read_text())
    checkpoint = open_checkpoint(str(tmp_path / "c"))
    weight = dataclasses.replace(next(describe(checkpoint.config())), shape=(4, 8))
    piece = dataclasses.replace(weight.pieces[0], shape=(4, 8), box=((0, 4), (0, 8)))
    weight = dataclasses.replace(weight, pieces=(piece,))
    with pytest.raises(ValueError, match="row-major"):
        load(checkpoint, checkpoint.config(), [weight], 1, 0, {weight.parameter: torch.empty(4, 8)}, LoaderOptions())


def test_extra_weights_and_tied_heads(tmp_path: Path) -> None:
    step = FIXTURES / "kempnerforge" / STEP
    text = (FIXTURES / "kempnerforge" / "config.toml").read_text()
    short, tied = tmp_path / "short.toml", tmp_path / "tied.toml"
    short.write_text(text.replace("n_layers = 4", "n_layers = 3"))
    tied.write_text(text.replace("tie_embeddings = false", "tie_embeddings = true"))
    assert "extra weight model.layers.3." in refusal(step, short)
    open_and_load(step, tied)


def test_missing_head_asks_for_a_declared_tie(run: Path) -> None:
    change(run, lambda metadata: metadata.state_dict_metadata.pop("model.output_head.proj.weight"))
    assert "tied" in refusal(run)


def safetensors_file(path: Path, header: dict[str, Any], data: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, ["a and b share bytes"]),
        ({"a": entry(0, 400, [100])}, ["a ends at byte", "cut short"]),
        ({"a": entry(0, 16, [5])}, ["does not fill"]),
        ({"a": entry(-16, 0, [4])}, ["does not fill"]),
        ({"a": entry(0, 16, [4], "F3")}, ["'F3'"]),
        ({"a": 3}, ["header is damaged"]),
        ([1], ["object is expected"]),
    ],
)
def test_damaged_safetensors(tmp_path: Path, header: Any, parts: list[str]) -> None:
    safetensors_file(tmp_path / "model.safetensors", header, 32)
    message = refusal(tmp_path)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "../other.safetensors"}, "outside"),
        ({"a": "/etc/passwd"}, "outside"),
        ({"b": "model.safetensors"}, "does not hold it"),
        (3, "weight_map"),
    ],
)
def test_damaged_safetensors_index(tmp_path: Path, weight_map: Any, part: str) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert part in refusal(tmp_path)


def test_a_file_that_shrinks_after_the_index_was_read(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "hf_llama", tmp_path / "c")
    checkpoint = open_checkpoint(str(tmp_path / "c"))
    file = tmp_path / "c" / "model-00001-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    config = checkpoint.config()
    weights = list(describe(config))
    with pytest.raises(ValueError, match="it changed while it was read"):
        load(checkpoint, config, weights, 1, 0, {weight.parameter: torch.empty(weight.shape) for weight in weights}, LoaderOptions())
