"""Safetensors: one file, or several with an index."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk, TensorEntry, check_name, file_size, tensor_entry

INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000  # bytes; the format's own limit
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class SafetensorsSource:
    """A safetensors file, or a directory of them; every header is checked when it is opened."""

    kind = "safetensors"
    other_bytes = 0

    def __init__(self, path: Path) -> None:
        """Read and check the headers of the file or directory `path`.

        Raises:
            ValueError: A header or the index is damaged or contradicts the files.
            FileNotFoundError: A shard is missing.
        """
        self.root = path.parent if path.is_file() else path
        self._index: dict[str, TensorEntry] = {}
        if path.is_file():
            self._index = self._header(path.name)
        elif (path / INDEX).is_file():
            self._read_sharded()
        else:
            single = path / "model.safetensors"
            for file in [single] if single.is_file() else sorted(path.glob("*.safetensors")):
                found = self._header(file.name)
                twice = found.keys() & self._index.keys()
                if twice:
                    raise ValueError(f"{path}: weight {min(twice)} is in two files; give the one file that is meant, or an {INDEX}")
                self._index |= found

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor of the files."""
        return self._index

    def _read_sharded(self) -> None:
        path = self.root / INDEX
        weight_map = _parse(path.read_bytes(), path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{path}: has no weight_map; it is not an index of safetensors files")
        headers: dict[str, dict[str, TensorEntry]] = {}
        for name, file in weight_map.items():
            if file not in headers:
                check_name(file, str(path))
                file_size(self.root, file, str(path))
                headers[file] = self._header(file)
            if name not in headers[file]:
                raise ValueError(f"{path}: says that {name} is in {file}, which does not hold it")
            self._index[name] = headers[file][name]

    def _header(self, file: str) -> dict[str, TensorEntry]:
        path = self.root / file
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise ValueError(
                    f"{path}: says its header has {length:,} bytes, the file has {size:,}; it is cut short or no safetensors file"
                )
            header = _parse(stream.read(length), path)
        entries, ends = {}, []
        for name, fields in header.items():
            if name != "__metadata__":
                entries[name] = self._entry(file, name, fields, 8 + length, size)
                chunk = entries[name].chunks[0]
                ends.append((chunk.offset, chunk.offset + chunk.length, name))
        ends.sort()
        for (_, stop, one), (start, _, other) in pairwise(ends):
            if start < stop:
                raise ValueError(f"{path}: {one} and {other} share bytes; the header is damaged")
        return entries

    def _entry(self, file: str, name: str, fields: Any, base: int, size: int) -> TensorEntry:
        path = self.root / file
        try:
            dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
            dims_valid = all(isinstance(dim, int) and dim >= 0 for dim in (*shape, start, stop))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: weight {name} is not described as safetensors do; the header is damaged") from error
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: weight {name} has element type {dtype!r}, which is not known here")
        length = math.prod(shape) * ITEM_SIZES[_DTYPES[dtype]] if dims_valid else -1
        if length != stop - start:
            raise ValueError(f"{path}: weight {name} of {dtype} {shape} does not fill bytes {start!r} to {stop!r}; the header is damaged")
        if base + stop > size:
            raise ValueError(f"{path}: has {size:,} bytes but {name} ends at byte {base + stop:,}; the file is cut short, copy it again")
        box = tuple((0, dim) for dim in shape)
        return tensor_entry(name, _DTYPES[dtype], shape, [Chunk(file, base + start, length, box)])


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: holds a JSON {type(parsed).__name__} where an object is expected")
    return parsed
