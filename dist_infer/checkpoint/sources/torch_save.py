"""Files that `torch.save` wrote of a whole model: pytorch_model.bin, lit_model.pth and the like."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.sources.archive import Archive, Place, StoredTensor, check_apart
from dist_infer.checkpoint.sources.source import (
    ITEM_SIZES,
    Chunk,
    TensorEntry,
    check_weight,
    file_size,
    is_other,
    read_weight_map,
    tensor_entry,
)

BIN_INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pth", ".pt")
_SINGLE = ("pytorch_model.bin", "pytorch_model_fsdp.bin", "lit_model.pth")
_BUDGET = 32 << 20  # bytes of directory, headers and pickle: enough for 100,000 tensors
_MOST_DEPTH = 8
_LEAST_ENTRY = 8  # bytes a pickle needs to name one more thing


def holds_torch_save(directory: Path) -> bool:
    """Whether `directory` holds such a file under one of the usual names."""
    return any((directory / name).is_file() for name in (BIN_INDEX, *_SINGLE))


class TorchSaveSource:
    """One such file, or several with an index; each directory and pickle is read and checked when it is opened."""

    kind = "torch_save"
    ignored: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        """Read and check what the file or directory `path` holds.

        Raises:
            ValueError: A file is damaged, hostile, or too old a form.
            FileNotFoundError: A shard is missing.
        """
        self.root = path.parent if path.is_file() else path
        self.other_bytes = 0
        self._index: dict[str, TensorEntry] = {}
        if path.is_file():
            self._index = self._read(path.name)
        elif (path / BIN_INDEX).is_file():
            index = path / BIN_INDEX
            shards: dict[str, dict[str, TensorEntry]] = {}
            for name, file in read_weight_map(index).items():
                shard = shards[file] if file in shards else shards.setdefault(file, self._read(file))
                if name not in shard:
                    raise ValueError(f"{index}: says that {name} is in {file}, which does not hold it")
                self._index[name] = shard[name]
        else:
            self._index = self._read(next(name for name in _SINGLE if (path / name).is_file()))

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor of the files that may belong to a model."""
        return self._index

    def _read(self, file: str) -> dict[str, TensorEntry]:
        path = self.root / file
        size = file_size(self.root, file, str(self.root))
        fd = os.open(path, os.O_RDONLY)
        try:
            start = os.pread(fd, 4, 0)
            if start[:1] == b"\x80":
                raise ValueError(
                    "is the form that torch.save wrote before torch 1.6, which cannot be read without running it; "
                    "where it is trusted, torch.load it and torch.save it anew, or save it as safetensors"
                )
            if start != b"PK\3\4":
                raise ValueError("is no file of torch.save, or was cut short; copy it again")
            return self._entries(file, Archive(fd, 0, size, _BUDGET), size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        finally:
            os.close(fd)

    def _entries(self, file: str, archive: Archive, size: int) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        places: dict[str, Place] = {}
        for name, stored in _flatten(archive.content(), archive.bytes_read // _LEAST_ENTRY).items():
            shape = check_weight(name, stored.shape, str(self.root / file))
            try:
                offset, place = archive.elements(stored)
            except ValueError as error:
                raise ValueError(f"weight {name}: {error}") from error
            places[stored.record] = place
            if is_other(name):
                continue
            box = tuple((0, dim) for dim in shape)
            length = ITEM_SIZES[stored.dtype]
            for dim in shape:
                length *= dim
            crc = place.crc if (offset, length) == place[:2] else None
            entries[name] = tensor_entry(name, stored.dtype, shape, [Chunk(file, offset, length, box, crc=crc)])
        check_apart(places)
        used = {chunk.offset: chunk.length for entry in entries.values() for chunk in entry.chunks}
        self.other_bytes += max(0, size - sum(used.values()))
        return entries


def _flatten(content: Any, most: int) -> dict[str, StoredTensor]:
    """The tensors in nested dicts, their keys joined with dots, as DCP does it."""
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__} where a dict of weights is expected")
    found: dict[str, StoredTensor] = {}
    seen = 0
    nested: list[tuple[str, int, dict[Any, Any]]] = [("", 0, content)]
    while nested:
        prefix, depth, items = nested.pop()
        seen += len(items) + 1
        if seen > most or depth > _MOST_DEPTH:
            raise ValueError("its pickle nests or repeats more than a file of its size can hold")
        for key, value in items.items():
            name = f"{prefix}{str(key)[:1000]}"
            if isinstance(value, StoredTensor):
                if name in found:
                    raise ValueError(f"weight {name[:200]!r} is there twice")
                found[name] = value
            elif isinstance(value, dict):
                nested.append((f"{name}.", depth + 1, value))
    return found
