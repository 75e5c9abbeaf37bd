"""The content hash is of the weights alone: not of their cut, format or names; damage is found before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dist_infer.checkpoint import Checkpoint, content, open_checkpoint
from dist_infer.checkpoint.content import content_hash, hash_weights
from dist_infer.model.config import ModelConfig
from tests.checkpoint.test_load import DCP, FIXTURES, nine_heads, random_tensors, save


def whole_hash(checkpoint: Checkpoint, config: ModelConfig, parts: int = 1) -> str:
    hashes: dict[str, str] = {}
    for part in range(parts):
        found = hash_weights(checkpoint, config, part, parts, threads=2)
        assert not found.keys() & hashes.keys()
        hashes |= found
    return content_hash(checkpoint, config, hashes)


def test_formats_and_parts_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = nine_heads()
    tensors = random_tensors(config, torch.float32)
    one = whole_hash(save("safetensors", tensors, tmp_path / "a"), config)
    other = save("dcp", tensors, tmp_path / "b")
    assert whole_hash(other, config, parts=3) == one
    monkeypatch.setattr(content, "_SLICE", 1000)  # several slices of each weight, the last one shorter
    assert whole_hash(other, config) == one
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] += 1e-6
    assert whole_hash(save("dcp", tensors, tmp_path / "c"), config) != one
    as_bfloat16 = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert whole_hash(save("dcp", as_bfloat16, tmp_path / "d"), config) != one


def test_names_and_row_orders_do_not_matter(tmp_path: Path) -> None:
    """torchtitan keeps rotary pairs side by side under names of its own."""
    theirs = open_checkpoint(str(FIXTURES / "torchtitan_llama3" / DCP["torchtitan_llama3"]))
    config = theirs.config()
    from tests.checkpoint.test_load import reference

    ours = save("safetensors", {name: tensor.clone() for name, tensor in reference("torchtitan_llama3", config).items()}, tmp_path / "c")
    assert whole_hash(ours, config) == whole_hash(theirs, config)


def test_bytes_that_changed_since_they_were_saved(tmp_path: Path) -> None:
    place = tmp_path / "c"
    shutil.copytree(FIXTURES / "kempnerforge" / DCP["kempnerforge"], place)
    shutil.copy(FIXTURES / "kempnerforge" / "config.toml", place)
    checkpoint = open_checkpoint(str(place))
    config = checkpoint.config()
    whole_hash(checkpoint, config)
    stored = dcp.FileSystemReader(place).read_metadata().state_dict_metadata
    name = next(name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata) and name.endswith("up_proj.weight"))
    chunk = checkpoint.index[name].chunks[0]
    with (place / chunk.file).open("r+b") as file:
        file.seek(chunk.offset + chunk.length // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))  # finite as before, and in no index
    with pytest.raises(ValueError, match=rf"{chunk.file}.*CRC"):
        whole_hash(checkpoint, config, parts=2)
