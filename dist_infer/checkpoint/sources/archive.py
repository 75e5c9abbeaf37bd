"""Finds tensors' bytes inside an archive that `torch.save` wrote, without loading anything from it."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from itertools import pairwise
from typing import Any, NamedTuple

from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk, short
from dist_infer.checkpoint.sources.unpickle import refused, unpickle

ITEM_BUDGET = 1 << 20  # bytes of directory and headers that an archive of one tensor can reasonably have
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
_READ = 8 << 20  # bytes read at once to check them

# What Python's reader of zip directories can raise for a damaged or hostile one.
_DAMAGE = (zipfile.BadZipFile, struct.error, EOFError, LookupError, TypeError, AttributeError, NotImplementedError, OverflowError)


class StoredTensor(NamedTuple):
    """A tensor as a pickle describes it.

    Attributes:
        dtype: Element type.
        record: Name of the record that holds its storage.
        first: Its first element in that storage.
        shape: Its shape.
        strides: Its strides, in elements.
    """

    dtype: str
    record: str
    first: int
    shape: Any
    strides: Any


class Place(NamedTuple):
    """Where a record's bytes lie in the file, and their CRC-32 (0 when the writer kept none)."""

    offset: int
    length: int
    crc: int


class Window(io.RawIOBase):
    """A read-only view of bytes `offset` to `offset + length` of an open file, of which only `budget` bytes may be read."""

    def __init__(self, fd: int, offset: int, length: int, budget: int) -> None:
        self.fd, self.offset, self.length, self.budget = fd, offset, length, budget
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
            raise zipfile.BadZipFile("its directory leads outside it")
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes from here on."""
        rest = max(self.length - self.position, 0)
        size = rest if size is None or size < 0 else min(size, rest)
        self.bytes_read += size
        if self.bytes_read > self.budget:
            raise zipfile.BadZipFile(f"its directory is larger than the {self.budget:,} bytes that one like it can have")
        data = os.pread(self.fd, size, self.offset + self.position)
        self.position += len(data)
        return data


class Archive:
    """The records of an archive, and what its pickle says of the tensors in them."""

    def __init__(self, fd: int, offset: int, length: int, budget: int) -> None:
        """Read the directory of the archive at `offset` of the file open at `fd`.

        Raises:
            ValueError: It is damaged, or is not what `torch.save` writes on a little-endian machine.
        """
        self._window = Window(fd, offset, length, budget)
        try:
            with zipfile.ZipFile(self._window) as archive:  # type: ignore[arg-type]
                self._records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except _DAMAGE as error:
            raise ValueError(f"its zip directory is damaged: {str(error)[:100]}") from error
        if "byteorder" in self._records and self._read("byteorder") != b"little":
            raise ValueError("it is big-endian, and only little-endian tensors can be read")

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of it."""
        return self._window.bytes_read

    def content(self) -> Any:
        """What was saved, with a `StoredTensor` for each tensor.

        Raises:
            ValueError: It holds something else than plain containers, numbers, strings and plain tensors.
        """
        return unpickle(self._read("data.pkl"), _find, _storage)

    def place(self, name: str) -> Place:
        """Where the bytes of record `name` lie.

        Raises:
            ValueError: There is no such record, it is compressed, or reaches outside the archive.
        """
        info, window = self._records.get(name), self._window
        if info is None:
            raise ValueError(f"it has no record {short(name)}")
        header = b""
        if 0 <= info.header_offset < window.length:
            window.seek(info.header_offset)
            header = window.read(30)
        if len(header) != 30 or header[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"its record {short(name)} is not a plain stored one")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        if info.compress_size != info.file_size or start + info.file_size > window.length:
            raise ValueError(f"its record {short(name)} reaches outside it")
        return Place(window.offset + start, info.file_size, info.CRC)

    def elements(self, tensor: StoredTensor) -> tuple[int, Place]:
        """Where the first element of `tensor` lies in the file, and its whole record.

        Raises:
            ValueError: The tensor is not row-major, or reaches outside its record.
        """
        if not _row_major(tensor.shape, tensor.strides):
            raise ValueError(f"its strides are {short(tensor.strides)}, and only row-major tensors can be read; save contiguous tensors")
        place, item = self.place(tensor.record), ITEM_SIZES[tensor.dtype]
        if not 0 <= tensor.first <= place.length // item - math.prod(tensor.shape):
            raise ValueError(f"its data record has {place.length:,} bytes, which is too short")
        return place.offset + tensor.first * item, place

    def _read(self, name: str) -> bytes:
        place, window = self.place(name), self._window
        window.seek(place.offset - window.offset)
        try:
            data = window.read(place.length)
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from error
        if len(data) != place.length or (place.crc and zlib.crc32(data) != place.crc):
            raise ValueError(f"its record {name} is not what was written; the file is damaged")
        return data


def find_elements(fd: int, chunk: Chunk, dtype: str) -> tuple[int, int]:
    """Where the first element of `chunk` lies in the file open at `fd`.

    Returns:
        Its offset in the file, and how many bytes were read to find it.

    Raises:
        ValueError: The archive is damaged, or holds something else than a plain row-major tensor of
            this shape and `dtype`.
    """
    offset, _, bytes_read = _one_tensor(fd, chunk, dtype)
    return offset, bytes_read


def check_crc(fd: int, place: Place, about: str) -> None:
    """Read the bytes at `place` of the file open at `fd` and compare their CRC-32 with the one kept of them.

    Raises:
        ValueError: They differ.
    """
    found, at, stop = 0, place.offset, place.offset + place.length
    while at < stop:
        data = os.pread(fd, min(_READ, stop - at), at)
        if not data:
            raise ValueError(f"{about}: the file ends at byte {at:,}, in the middle of it")
        found, at = zlib.crc32(data, found), at + len(data)
    if found != place.crc:
        raise ValueError(
            f"{about}: bytes {place.offset:,} to {stop:,} have CRC-32 {found:08x} where {place.crc:08x} was kept when they were saved; "
            "the file is damaged, copy it again"
        )


def record_of(fd: int, chunk: Chunk, dtype: str) -> Place:
    """The record that holds `chunk`, an archive of one tensor; raises as `find_elements` does."""
    return _one_tensor(fd, chunk, dtype)[1]


def _one_tensor(fd: int, chunk: Chunk, dtype: str) -> tuple[int, Place, int]:
    shape = tuple(stop - start for start, stop in chunk.box)
    try:
        archive = Archive(fd, chunk.offset, chunk.length, ITEM_BUDGET)
        stored = archive.content()
        if not isinstance(stored, StoredTensor):
            raise ValueError(f"it holds a {type(stored).__name__}")
        if stored.dtype != dtype or stored.shape != shape:
            raise ValueError(f"it holds {stored.dtype} {short(stored.shape)} where the metadata says {dtype} {shape}")
        offset, place = archive.elements(stored)
    except ValueError as error:
        raise ValueError(f"{chunk.about}: what lies at byte {chunk.offset:,} is not a tensor saved by torch.save: {error}") from error
    return offset, place, archive.bytes_read


def check_apart(places: dict[str, Place]) -> None:
    """Raise ValueError when two of these records share bytes."""
    ordered = sorted((place.offset, place.offset + place.length, name) for name, place in places.items())
    for (_, stop, one), (start, _, other) in pairwise(ordered):
        if start < stop:
            raise ValueError(f"its records {short(one)} and {short(other)} share bytes; its directory is damaged")


def _find(module: str, name: str) -> Any:
    """What stands in for a name in a pickle of tensors."""
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _STORAGES[name]
    if module == "torch" and name in ITEM_SIZES:
        return name
    found = _TABLE.get((module, name))
    if found is None:
        raise refused(module, name, "a file of plain tensors")
    return found


def _storage(identity: Any) -> Any:
    """(dtype, record) for the id of a storage: ("storage", type, key, device, elements)."""
    _, dtype, key, *_ = identity
    if not isinstance(dtype, str) or not isinstance(key, str | int) or dtype not in ITEM_SIZES:
        raise ValueError("its pickle refers to a storage of no known type")
    return dtype, f"data/{key}"


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Stands for torch._utils._rebuild_tensor_v2."""
    return _typed(storage, first, shape, strides, storage[0])


def _tensor_v3(storage: Any, first: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> StoredTensor:
    """Stands for torch._utils._rebuild_tensor_v3, whose storage has no type of its own."""
    return _typed(storage, first, shape, strides, dtype)


def _typed(storage: Any, first: Any, shape: Any, strides: Any, dtype: Any) -> StoredTensor:
    dims = (shape, strides)
    plain = all(isinstance(sizes, tuple) and len(sizes) < 100 and all(isinstance(size, int) for size in sizes) for sizes in dims)
    if not plain or len(shape) != len(strides) or not isinstance(first, int) or dtype not in ITEM_SIZES or min(shape, default=0) < 0:
        raise ValueError("its pickle describes a tensor that cannot be")
    return StoredTensor(dtype, storage[1], first, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return tensor


def _size(values: Any) -> Any:
    """Stands for torch.Size; `_typed` looks at what it is."""
    return values


def _bytes(*_: Any) -> None:
    """Stands for how bytes are pickled; a tensor needs none."""


_TABLE: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _bytes,
}


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
