"""Damaged and hostile checkpoints give one clear line, and nothing in them is executed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from dist_infer.checkpoint import load, open_checkpoint
from dist_infer.checkpoint.sources import open_source
from dist_infer.checkpoint.sources.codec import verify_crc
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
        ("c_no_metadata", "", ["none of its steps (1) is complete", "step_3"]),
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


class Call:
    """Pickled, it calls `function` when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile(mark: Path) -> dict[str, tuple[Any, str]]:
    """What would touch `mark` if it were run, and what it is refused for."""
    touch = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    return {
        "system": (Call(os.system, f"touch {mark}"), "system, which"),
        "eval": (Call(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"), "eval, which"),
        "exec": (Call(exec, touch), "exec, which"),
        "method": (Call(Path.touch, mark), "getattr, which"),
        "nested": ([{"a": Call(OrderedDict, Call(os.system, f"touch {mark}"))}], "system, which"),
        "popen": (Call(subprocess.Popen, ["touch", str(mark)]), "Popen, which"),
        "load": (Call(torch.load, str(mark)), "load, which"),
        "partial": (Call(functools.partial, os.system, f"touch {mark}"), "partial, which"),
        "import": (Call(importlib.import_module, "antigravity"), "import_module, which"),
    }


@pytest.mark.parametrize("case", list(hostile(Path("x"))))
def test_nothing_is_run(run: Path, tmp_path: Path, case: str) -> None:
    content, part = hostile(tmp_path / "ran")[case]
    if case != "method":  # getattr has a harmless stand-in in metadata
        change(run, lambda metadata: metadata.planner_data.update(bomb=content))
        assert part in refusal(run) and "refused" in refusal(run)
    (run / ".metadata").write_bytes(pickle.dumps(content))
    assert "not readable as DCP metadata" in refusal(run) or "where DCP metadata is expected" in refusal(run)
    for name in ("pytorch_model.bin", "lit_model.pth"):
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        torch.save({"weight": torch.ones(2), "bomb": content}, place / name)
        message = refusal(place)
        assert part in message and "refused" in message and str(place / name) in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", list(hostile(Path("x"))))
def test_nothing_in_an_item_is_run(tmp_path: Path, run: Path, case: str) -> None:
    content, part = hostile(tmp_path / "ran")[case]
    torch.save([content, torch.ones(5000)], run / "bomb.distcp")
    change(run, move(NAME, relative_path="bomb.distcp", offset=0, length=(run / "bomb.distcp").stat().st_size))
    message = refusal(run)
    assert part in message and "refused" in message and str(run / "bomb.distcp") in message
    assert not (tmp_path / "ran").exists()


def doubled(times: int) -> bytes:
    """Pushes a tuple that holds itself twice, `times` deep."""
    return b")" + b"".join(b"r" + struct.pack("<I", at) + (b"j" + struct.pack("<I", at)) + b"\x86" for at in range(times))


LONG = struct.pack("<Q", 10**10)
BOMBS = {
    "memo": b"}r\xff\xff\xff\xff.",
    "get": b"}j\xff\xff\xff\xff.",
    "text": b"X\xff\xff\xff\xffab.",
    "text8": b"\x8d" + LONG + b"ab.",
    "bytes": b"B\xff\xff\xff\x7fab.",
    "bytes8": b"\x8e" + LONG + b"ab.",
    "bytearray8": b"\x96" + LONG + b"ab.",
    "frame": b"\x95" + LONG + b"ab.",
    "integer": b"\x8a\xff" + b"\1" * 255 + b".",
    "long integer": b"\x8b\xff\xff\xff\x7f" + b"\1" * 255 + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "key of tuples": b"}" + doubled(60) + b"Ns.",
    "set of tuples": b"\x8f(" + doubled(60) + b"\x90.",
    "value of tuples": b"}X\1\0\0\0a" + doubled(60) + b"s.",
    "marks": b"(" * 200_000,
    "lists": b"]" + b"]a" * 5 + b"a" * 10,
    "deep": b"]" * 100_000 + b"a" * 99_999 + b".",
    "empty": b"",
    "no end": b"}" * 1000,
    "duplicates": b"}" + b"2" * 1000 + b".",
    "extension": b"\x82\1.",
    "instance": b"(ios\nsystem\n.",
    "old name": b"cos\nsystem\n(S'true'\ntR.",
    "name of nothing": b"]]\x93.",
    "call of a number": b"K\1)R.",
    "size of a size": b"ctorch\nSize\n(" + b"K\1" * 5000 + b"tR.",
    "many unknown": b"".join(b"ctorch.distributed.checkpoint.metadata\nA%d\n" % number for number in range(1000)) + b".",
    "name of two lines": b"\x8c\2os\x8c\7sys\ntem\x93.",
}  # fmt: skip


def peak(read: Callable[[], object]) -> int:
    """The most bytes of Python objects that were alive at once while `read` ran."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", list(BOMBS))
def test_bombs_in_pickles(run: Path, tmp_path: Path, case: str) -> None:
    (run / ".metadata").write_bytes(b"\x80\4" + BOMBS[case])

    def read() -> None:
        assert ".metadata" in refusal(run)

    assert peak(read) < 20 << 20
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\2" + BOMBS[case])
    if case != "value of tuples":  # harmless: nobody looks at it

        def read_file() -> None:
            assert str(file) in refusal(file)

        assert peak(read_file) < 20 << 20


def test_tables_that_say_one_thing_many_times(run: Path) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[NAME]
        entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((0, 4)))] * 2000
        metadata.state_dict_metadata.update({f"w{number}": entry for number in range(2000)})

    change(run, edit)
    assert "more chunks than a file of its size can hold" in refusal(run)


def test_dicts_that_hold_each_other(tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "pytorch_model.bin")
    assert "nests or repeats" in refusal(tmp_path)
    inner["self"] = inner
    torch.save(inner, tmp_path / "pytorch_model.bin")
    assert "nests or repeats" in refusal(tmp_path)


def move(fqn: str, **changes: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        key = next(key for key in metadata.storage_data if key.fqn == fqn)
        metadata.storage_data[key] = dataclasses.replace(metadata.storage_data[key], **changes)

    return edit


def chunks(edit_chunks: Callable[[list[ChunkStorageMetadata]], None]) -> Callable[[Metadata], None]:
    return lambda metadata: edit_chunks(metadata.state_dict_metadata[NAME].chunks)


def resize(size: tuple[Any, ...]) -> Callable[[Metadata], None]:
    return lambda metadata: setattr(metadata.state_dict_metadata[NAME], "size", size)


def rename(name: str) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.state_dict_metadata.update({name: metadata.state_dict_metadata.pop(NAME)})


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
        (move(NAME, offset=7), [f"weight {NAME}: what lies at byte 7 is not a tensor saved by torch.save"]),
        (move(NAME, transform_descriptors=["zstd"]), [NAME, "zstd", "only plain items"]),
        (move(NAME, transform_descriptors=["stream.crypt/1"]), [NAME, "stream.crypt/1", "only plain items"]),
        (chunks(lambda found: found.pop()), [NAME, "of its", "incomplete"]),
        (chunks(lambda found: found.append(found[0])), [NAME, "overlap"]),
        (forget, [NAME, "no file holds"]),
        (swap_dtype, ["bfloat16", "float16"]),
        (lambda metadata: metadata.state_dict_metadata.pop(NAME), ["missing", NAME]),
        (lambda metadata: metadata.state_dict_metadata.update({NAME: 5}), [NAME, "neither tensor nor bytes"]),
        (lambda metadata: setattr(metadata.state_dict_metadata[NAME], "size", "12"), ["damaged"]),
        (lambda metadata: metadata.storage_data.update({MetadataIndex("x"): 3}), ["table of storage"]),
        (move(NAME, relative_path="a\nb"), ["is not a file name"]),
        (move(NAME, relative_path="x" * 900), ["too long"]),
        (move(NAME, relative_path=["__0_0.distcp"]), ["damaged"]),
        (move(NAME, length=2000), [NAME, "has 2,000 bytes where its chunk takes"]),
        (move(NAME, offset=1 << 80), [NAME, "cut short"]),
        (rename("a\nb"), ["'a\\nb' cannot be the name of a weight"]),
        (resize((1 << 40, 1 << 40)), [NAME, "no tensor can have"]),
        (resize((2,) * 40), [NAME, "no shape of at most 8 dims"]),
        (resize((-1, 64)), [NAME, "no tensor can have"]),
        (resize(("a", None)), [NAME, "no tensor can have"]),
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


def test_a_newer_version_is_read_and_what_is_ignored_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, module = open_and_load(run), sys.modules[Metadata.__module__]
    newer = dataclasses.make_dataclass("Compression", ["level"])
    newer.__module__ = module.__name__
    monkeypatch.setattr(module, "Compression", newer, raising=False)

    def edit(metadata: Metadata) -> None:
        metadata.version = "2.0.0"
        metadata.compression = newer(3)  # type: ignore[attr-defined]
        metadata.state_dict_metadata["model.notes"] = newer(4)  # type: ignore[assignment]
        metadata.state_dict_metadata[NAME].owner = "rank 0"  # type: ignore[attr-defined]
        for key, info in metadata.storage_data.items():
            object.__setattr__(key, "shard", 1)
            info.checksum = 7

    change(run, edit)
    found = open_and_load(run)
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert set(open_source(run).ignored) == {
        "version '2.0.0'", "class Compression", "'model.notes', a Compression", "Metadata.compression",
        "TensorMetadata.owner", "StorageKey.shard", "StorageInfo.checksum",
    }  # fmt: skip
    assert open_source(FIXTURES / "kempnerforge" / STEP).ignored == ()


def test_a_save_that_was_interrupted(run: Path) -> None:
    (run / ".metadata.tmp").write_bytes((run / ".metadata").read_bytes()[:-9])
    assert "writing it was interrupted" in refusal(run)
    (run / ".metadata").unlink()
    assert "writing it was interrupted" in refusal(run)
    (run / ".metadata.tmp").rename(run / ".metadata")
    assert "its pickle" in refusal(run) and str(run / ".metadata") in refusal(run)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_stale_checksums(run: Path, tmp_path: Path) -> None:
    entry = open_source(run).index()[NAME]
    assert all(verify_crc(run, chunk, entry.dtype) for chunk in entry.chunks)
    chunk = entry.chunks[-1]
    flip(run / chunk.file, chunk.offset + chunk.length // 2)
    open_and_load(run)  # by default only what has to be looked at is
    with pytest.raises(ValueError, match=rf"{run / chunk.file}: weight {NAME}: bytes .* have CRC-32 .* the file is damaged"):
        verify_crc(run, chunk, entry.dtype)
    torch.save({"a": torch.ones(100)}, tmp_path / "lit_model.pth")
    chunk = open_source(tmp_path).index()["a"].chunks[0]
    assert verify_crc(tmp_path, chunk, "float32") == 400
    flip(tmp_path / "lit_model.pth", chunk.offset + 5)
    with pytest.raises(ValueError, match="have CRC-32"):
        verify_crc(tmp_path, chunk, "float32")
    source = open_source(FIXTURES / "hf_llama")
    assert not any(verify_crc(source.root, chunk, entry.dtype) for entry in source.index().values() for chunk in entry.chunks)


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
