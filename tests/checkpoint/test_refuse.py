"""Damaged checkpoints give one clear line; most of these are DCP's."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from dist_infer.checkpoint import load, open_checkpoint
from dist_infer.checkpoint.sources import open_source
from dist_infer.checkpoint.sources.codec import verify_crc
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.weights import describe
from tests.checkpoint.damage import FIXTURES, NAME, STEP, change, move, open_and_load, refusal


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
