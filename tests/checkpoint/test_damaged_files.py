"""Damaged files of torch.save and safetensors give one clear line."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dist_infer.checkpoint import load, open_checkpoint
from dist_infer.checkpoint.sources import open_source
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.weights import describe
from tests.checkpoint.damage import FIXTURES, refusal


def repack(file: Path, changes: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write `file`, which torch.save wrote, anew with other records."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, changes.get(name.partition("/")[2], data))


def patch_directory(file: Path, name: bytes, at: int, value: bytes) -> None:
    """Overwrite bytes of the entry of record `name` in the zip directory of `file`."""
    data = bytearray(file.read_bytes())
    entry = data.rindex(name) - 46
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + at : entry + at + len(value)] = value
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-200]), "zip directory is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:700]), "zip directory is damaged"),
        (lambda file: file.write_bytes(b""), "no file of torch.save"),
        (lambda file: file.write_bytes(bytes(5000)), "no file of torch.save"),
        (lambda file: repack(file, {}, zipfile.ZIP_DEFLATED), "not a plain stored one"),
        (lambda file: repack(file, {"byteorder": b"big"}), "big-endian"),
        (lambda file: repack(file, {"data/0": b"1234"}), "weight a: its data record has 4 bytes, which is too short"),
        (lambda file: patch_directory(file, b"x/data/0", 20, struct.pack("<II", 1 << 30, 1 << 30)), "record 'data/0' reaches outside"),
        (lambda file: patch_directory(file, b"x/data/0", 42, struct.pack("<I", 1 << 30)), "record 'data/0' is not a plain"),
        (lambda file: patch_directory(file, b"x/data/0", 42, struct.pack("<I", 3)), "record 'data/0' is not a plain"),
        (lambda file: patch_directory(file, b"x/data/0", 20, struct.pack("<II", 4000, 4000)), "share bytes"),
        (lambda file: patch_directory(file, b"x/data.pkl", 16, b"abcd"), "record data.pkl is not what was written"),
        (lambda file: torch.save({"a": torch.ones(4, 3).t()}, file), "weight a: its strides are (1, 3)"),
        (lambda file: torch.save({"a": torch.ones(1).expand(1 << 40)}, file), "weight a: its strides are (0)"),
        (lambda file: torch.save([torch.ones(3)], file), "a list where a dict"),
        (lambda file: torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False), "before torch 1.6"),
        (lambda file: torch.save({"a": torch.ones(3).to_sparse()}, file), "_rebuild_sparse_tensor, which a file of plain tensors"),
        (lambda file: torch.save({"a.b": torch.ones(3), "a": {"b": torch.ones(3)}}, file), "weight 'a.b' is there twice"),
        (lambda file: torch.save({"a\nb": torch.ones(3)}, file), "'a\\nb' cannot be the name"),
    ],
)  # fmt: skip
def test_damaged_files_of_torch_save(tmp_path: Path, damage: Callable[[Path], object], part: str) -> None:
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(30, 30), "b": torch.ones(50)}, file)
    damage(file)
    message = refusal(file)
    assert part in message and message.startswith(str(file)), message


def test_damaged_safetensors_items(tmp_path: Path) -> None:
    form = FIXTURES / "dcp_forms/safetensors"
    for case, damage in {
        "cut": lambda data: data[:-20],
        "other": lambda data: data.replace(b'"model.d"', b'"model.e"'),
        "moved": lambda data: data.replace(b'\\"saved_offsets\\": [5', b'\\"saved_offsets\\": [4'),
        "header": lambda data: data.replace(b"\0\0\0{", b"\0\1\0{"),
    }.items():
        shutil.copytree(form, tmp_path / case)
        for file in (tmp_path / case).glob("*.distcp"):
            file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=r"distcp: .*(cut short|does not hold the chunk of weight model\.\w)"):
            open_source(tmp_path / case)


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
        ({"a": {**entry(0, 16, [4]), "data_offsets": [0, "16"]}}, ["header is damaged"]),
        ({"a": {**entry(0, 16, [4]), "data_offsets": [0.0, 16.0]}}, ["does not fill"]),
        ({"a": entry(0, 16, [1] * 60)}, ["no shape of at most 8 dims"]),
        ({"a": entry(0, 16, [1 << 70, 0])}, ["no tensor can have"]),
        ({"a": entry(0, 16, [4], ["F32"])}, ["element type ('F32')"]),  # type: ignore[arg-type]
        ({"a\n": entry(0, 16, [4])}, ["cannot be the name of a weight"]),
        ({"a": entry(0, 16, [4]), "__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0, 4]}}'}}, ["said to belong at"]),
        ({"a": entry(0, 16, [4]), "__metadata__": {"DCP_SHARDING_INFO": "{"}}, ["not readable as JSON"]),
        ([1], ["object is expected"]),
    ],
)
def test_damaged_safetensors(tmp_path: Path, header: Any, parts: list[str]) -> None:
    safetensors_file(tmp_path / "model.safetensors", header, 32)
    message = refusal(tmp_path)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "text", ['{"a": ' * 100_000, '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", "\xff\xff", '{"a": "\\ud800"', "[" * 100_000]
)
def test_json_that_is_no_plain_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin1")
    assert "model.safetensors.index.json: not readable as JSON" in refusal(tmp_path)
    data = text.encode("latin1")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    assert "model.safetensors: not readable as JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "../other.safetensors"}, "outside"),
        ({"a": "/etc/passwd"}, "outside"),
        ({"a": "x/../../model.safetensors"}, "outside"),
        ({"a": ["model.safetensors"]}, "not a file name"),
        ({"a": "model.safetensors\0"}, "not a file name"),
        ({"a": "y" * 300}, "too long"),
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
    with pytest.raises(ValueError, match=r"weight model\.\S+: the file ends at byte .* it changed while it was read"):
        load(checkpoint, config, weights, 1, 0, {weight.parameter: torch.empty(weight.shape) for weight in weights}, LoaderOptions())
