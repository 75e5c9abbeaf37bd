"""Finds a tensor's bytes inside an archive that `torch.save` wrote, without loading anything from it."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any

from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk

_BUDGET = 1 << 20  # bytes of directory and headers that an archive of one tensor can reasonably have
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip


# What reading a damaged or hostile archive can raise.
_DAMAGE = (
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError, LookupError,
    TypeError, ValueError, AttributeError, NotImplementedError,
)  # fmt: skip


class Window(io.RawIOBase):
    """A read-only view of bytes `offset` to `offset + length` of an open file, of which only a little may be read."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self.fd, self.offset, self.length = fd, offset, length
        self.position = 0
        self.bytes_read = 0

    def seekable(self) -> bool:
        """Archives are read from their end."""
        return True

    def readable(self) -> bool:
        """It can be read."""
        return True

    def tell(self) -> int:
        """Bytes from the start of the window."""
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the window."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes from here on."""
        rest = max(self.length - self.position, 0)
        size = rest if size is None or size < 0 else min(size, rest)
        self.bytes_read += size
        if self.bytes_read > _BUDGET:
            raise ValueError("its directory is larger than an archive of one tensor can have")
        data = os.pread(self.fd, size, self.offset + self.position)
        self.position += len(data)
        return data


class _Unpickler(pickle.Unpickler):
    """Reads the description of one tensor: names lead to stand-ins of ours or are refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which a plain tensor has no use for; refused")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _describe(storage: Any, first: int, size: Any, strides: Any, *_: Any) -> tuple[str, str, int, Any, Any]:
    """(dtype, key of the storage record, first element in it, shape, strides)."""
    dtype, key = storage[1:3]
    return dtype, key, first, size, strides


def find_elements(fd: int, chunk: Chunk, dtype: str) -> tuple[int, int]:
    """Where the first element of `chunk` lies in the file open at `fd`.

    Returns:
        Its offset in the file, and how many bytes were read to find it.

    Raises:
        ValueError: The archive is damaged, or holds something else than a plain row-major tensor of
            this shape and `dtype`.
    """
    window = Window(fd, chunk.offset, chunk.length)
    shape = tuple(stop - start for start, stop in chunk.box)
    try:
        found = _find(window, shape, dtype)
    except _DAMAGE as error:
        raise ValueError(f"{chunk.file}: item at byte {chunk.offset:,} is not a tensor saved by torch.save: {error}") from error
    return chunk.offset + found, window.bytes_read


def _find(window: Window, shape: tuple[int, ...], dtype: str) -> int:
    with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
        records = {name.partition("/")[2]: name for name in archive.namelist()}
        stored_dtype, key, first, size, strides = _Unpickler(io.BytesIO(archive.read(records["data.pkl"]))).load()
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("it is big-endian, and only little-endian tensors can be read")
        record = archive.getinfo(records[f"data/{key}"])
    if stored_dtype != dtype or tuple(size) != shape:
        raise ValueError(f"it holds {stored_dtype} {tuple(size)} where the metadata says {dtype} {shape}")
    if not _row_major(shape, tuple(strides)):
        raise ValueError(f"its strides are {tuple(strides)}, and only row-major tensors can be read; save contiguous tensors")
    window.seek(record.header_offset)
    header = window.read(30)
    if len(header) != 30 or header[:4] != b"PK\3\4" or record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise ValueError("its data record is not a plain stored one")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    item = ITEM_SIZES[dtype]
    data = record.header_offset + 30 + name_length + extra_length
    if not 0 <= first <= record.file_size // item - math.prod(shape) or data + record.file_size > window.length:
        raise ValueError("its data record is too short")
    return data + first * item


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
