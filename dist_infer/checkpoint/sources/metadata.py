"""Reads the pickle in a DCP directory's `.metadata` without letting it run anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_infer.checkpoint.sources.source import ITEM_SIZES
from dist_infer.checkpoint.sources.unpickle import Record, refused, unpickle

_MOST_UNKNOWN = 20  # names of unknown classes


class Metadata(Record):
    """Stands for torch.distributed.checkpoint.metadata.Metadata."""

    fields = frozenset({"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"})
    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class TensorMetadata(Record):
    """Stands for TensorStorageMetadata."""

    fields = frozenset({"properties", "size", "chunks"})
    properties: Properties
    size: tuple[int, ...]
    chunks: list[ChunkMetadata]


class ChunkMetadata(Record):
    """Stands for ChunkStorageMetadata."""

    fields = frozenset({"offsets", "sizes"})
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class BytesMetadata(Record):
    """Stands for BytesStorageMetadata: something that is not a tensor."""


class Properties(Record):
    """Stands for TensorProperties, whose saved state is a tuple that begins with the dtype."""

    fields = frozenset({"dtype", "layout", "requires_grad", "memory_format", "pin_memory"})
    dtype: str

    def build(self, state: Any) -> None:
        """Take the saved attributes."""
        if isinstance(state, tuple):
            if not 0 < len(state) < 100:
                raise ValueError("the properties of a tensor are not what DCP writes")
            self.state = {"dtype": state[0]} | {f"value {i + 1}": state[i] for i in range(5, len(state))}
        else:
            super().build(state)


class StorageKey(Record):
    """Stands for MetadataIndex."""

    fields = frozenset({"fqn", "offset", "index"})
    fqn: str
    offset: tuple[int, ...] | None


class StorageInfo(Record):
    """Stands for _StorageInfo: where an item lies."""

    fields = frozenset({"relative_path", "offset", "length", "transform_descriptors"})
    relative_path: str
    offset: int
    length: int


class StorageMeta(Record):
    """Stands for StorageMeta, which says who saved it."""


class Unknown(Record):
    """Stands for a class of DCP that is not known here."""


def _keep(*values: Any) -> tuple[Any, ...]:
    """Stand-in for functions and enumerations whose result nobody needs."""
    return values


def _size(values: Any) -> tuple[int, ...]:
    """Stand-in for torch.Size."""
    if not isinstance(values, tuple | list) or len(values) > 100:
        raise ValueError("a torch.Size in it is no short list of integers")
    return tuple(values)


_DCP = "torch.distributed.checkpoint"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # where two of the classes lived before torch 2.3
_TABLE: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): TensorMetadata,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): ChunkMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): BytesMetadata,
    (f"{_DCP}.metadata", "TensorProperties"): Properties,
    (_OLD, "TensorProperties"): Properties,
    (f"{_DCP}.metadata", "MetadataIndex"): StorageKey,
    (f"{_DCP}.metadata", "StorageMeta"): StorageMeta,
    (f"{_DCP}.filesystem", "_StorageInfo"): StorageInfo,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _keep,
    (_OLD, "MEM_FORMAT_ENCODING"): _keep,
    ("torch.serialization", "_get_layout"): _keep,
    ("builtins", "getattr"): _keep,  # how Python 3.11.0 to 3.11.3 pickled members of an enumeration
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): _keep,
    ("pathlib", "PosixPath"): _keep,
    ("pathlib", "PurePosixPath"): _keep,
    ("pathlib._local", "PosixPath"): _keep,
}


def read_metadata(path: Path) -> tuple[Metadata, list[str]]:
    """The content of `.metadata` at `path`, and which classes in it are not known here.

    Raises:
        ValueError: It is damaged, or asks for anything but the few classes such a file may hold.
    """
    unknown: dict[str, type[Unknown]] = {}

    def find(module: str, name: str) -> Any:
        if module == "torch" and name in ITEM_SIZES:
            return name
        if (module, name) in _TABLE:
            return _TABLE[module, name]
        # A class that a newer DCP added is kept as it is: nothing of it is imported, and what is needed of it will be missed.
        if module.startswith(f"{_DCP}.") and name.isidentifier() and len(unknown) < _MOST_UNKNOWN:
            return unknown.setdefault(name, type(name, (Unknown,), {}))
        raise refused(module, name, "a checkpoint's metadata")

    try:
        metadata = unpickle(path.read_bytes(), find)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as DCP metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: holds a {type(metadata).__name__} where DCP metadata is expected")
    if not all(isinstance(metadata.state.get(field), dict) for field in ("state_dict_metadata", "storage_data")):
        raise ValueError(f"{path}: DCP metadata without its tables of tensors and storage; the file is damaged")
    return metadata, sorted(unknown)
