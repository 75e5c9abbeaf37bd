"""Reads the pickle in a DCP directory's `.metadata` without letting it run anything.

A pickle names the callables it wants. Here a name never leads to an import: it is looked up in a
fixed table of stand-ins of our own, which only keep what they are given, and every other name is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.sources.source import ITEM_SIZES


class Record:
    """A stand-in for any of the metadata classes: it holds the attributes it was saved with."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class Metadata(Record):
    """Stands for torch.distributed.checkpoint.metadata.Metadata."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class TensorMetadata(Record):
    """Stands for TensorStorageMetadata."""

    properties: Properties
    size: tuple[int, ...]
    chunks: list[ChunkMetadata]


class ChunkMetadata(Record):
    """Stands for ChunkStorageMetadata."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class BytesMetadata(Record):
    """Stands for BytesStorageMetadata: something that is not a tensor."""


class Properties(Record):
    """Stands for TensorProperties, whose saved state is a tuple that begins with the dtype."""

    dtype: str

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class StorageKey(Record):
    """Stands for MetadataIndex."""

    fqn: str
    offset: tuple[int, ...] | None = None


class StorageInfo(Record):
    """Stands for _StorageInfo: where an item lies."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None


def _keep(*values: Any) -> tuple[Any, ...]:
    """Stand-in for functions and enumerations whose result nobody needs."""
    return values


_DCP = "torch.distributed.checkpoint"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # where two of the classes lived before torch 2.3
_TABLE: dict[tuple[str, str], Callable[..., Any]] = {
    (f"{_DCP}.metadata", "Metadata"): Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): TensorMetadata,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): ChunkMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): BytesMetadata,
    (f"{_DCP}.metadata", "TensorProperties"): Properties,
    (_OLD, "TensorProperties"): Properties,
    (f"{_DCP}.metadata", "MetadataIndex"): StorageKey,
    (f"{_DCP}.metadata", "StorageMeta"): Record,
    (f"{_DCP}.filesystem", "_StorageInfo"): StorageInfo,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _keep,
    (_OLD, "MEM_FORMAT_ENCODING"): _keep,
    ("torch.serialization", "_get_layout"): _keep,
    ("builtins", "getattr"): _keep,  # how Python 3.11.0 to 3.11.3 pickled members of an enumeration
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("pathlib", "PosixPath"): _keep,
    ("pathlib", "PurePosixPath"): _keep,
    ("pathlib._local", "PosixPath"): _keep,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in ITEM_SIZES:
            return global_name
        found = _TABLE.get((module_name, global_name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which a checkpoint's metadata has no use for; refused")
        return found


def read_metadata(path: Path) -> Metadata:
    """The content of `.metadata` at `path`.

    Raises:
        ValueError: It is damaged, or asks for anything but the few classes such a file may hold.
    """
    with path.open("rb") as stream:
        try:
            metadata = _Unpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: not readable as DCP metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: holds a {type(metadata).__name__} where DCP metadata is expected")
    if not all(isinstance(getattr(metadata, field, None), dict) for field in ("state_dict_metadata", "storage_data")):
        raise ValueError(f"{path}: DCP metadata without its tables of tensors and storage; the file is damaged")
    return metadata
