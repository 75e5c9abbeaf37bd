"""Safetensors: one file, several with an index, or the pieces that the ranks of a distributed save left."""

from __future__ import annotations

import math
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dist_infer.checkpoint.sources.source import (
    ITEM_SIZES,
    Chunk,
    TensorEntry,
    check_name,
    check_weight,
    file_size,
    parse_json,
    read_weight_map,
    short,
    tensor_entry,
)

INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000  # bytes; the format's own limit
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_PIECES = "DCP_SHARDING_INFO"  # where torch's Hugging Face writer keeps which piece of a weight a file holds
_NUMBERED = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")


class Stored(NamedTuple):
    """A tensor of one file: its type, shape, place, and where in the whole weight it belongs."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    origin: tuple[int, ...]

    def chunk(self, file: str) -> Chunk:
        """The chunk it is."""
        box = tuple((start, start + size) for start, size in zip(self.origin, self.shape, strict=True))
        return Chunk(file, self.offset, self.length, box)


class SafetensorsSource:
    """A safetensors file, or a directory of them; every header is checked when it is opened."""

    kind = "safetensors"
    other_bytes = 0
    ignored: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        """Read and check the headers of the file or directory `path`.

        Raises:
            ValueError: A header or the index is damaged or contradicts the files.
            FileNotFoundError: A shard is missing.
        """
        self.root = path.parent if path.is_file() else path
        if path.is_file():
            self._index = self._join([path.name])
        elif (path / INDEX).is_file():
            self._index = read_indexed(path, read_weight_map(path / INDEX), path / INDEX)
        else:
            single = path / "model.safetensors"
            self._index = self._join([single.name] if single.is_file() else self._files())

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor of the files."""
        return self._index

    def _files(self) -> list[str]:
        """All files of the directory, when none of a numbered set is missing."""
        files = sorted(file.name for file in self.root.glob("*.safetensors"))
        numbered = [(found[1], int(found[2])) for file in files if (found := _NUMBERED.fullmatch(file))]
        for stem, count in set(numbered):
            if numbered.count((stem, count)) < count:
                raise FileNotFoundError(
                    f"{self.root}: has {numbered.count((stem, count))} of the {count} files {stem}-*.safetensors and no {INDEX}; "
                    "it was not written or copied whole"
                )
        return files

    def _join(self, files: list[str]) -> dict[str, TensorEntry]:
        """The tensors of `files`, of which each may hold a piece."""
        pieces: dict[str, list[tuple[str, Stored]]] = {}
        for file in files:
            for name, stored in read_header(self.root, file).items():
                pieces.setdefault(name, []).append((file, stored))
        return {name: self._entry(name, found) for name, found in pieces.items()}

    def _entry(self, name: str, pieces: list[tuple[str, Stored]]) -> TensorEntry:
        kinds = {(stored.dtype, len(stored.shape)) for _, stored in pieces}
        origins = {stored.origin for _, stored in pieces}
        if len(pieces) > 1 and (len(kinds) > 1 or len(origins) < len(pieces)):
            raise ValueError(f"{self.root}: weight {name} is in two files; give the one file that is meant, or an {INDEX}")
        ends = [[start + size for start, size in zip(stored.origin, stored.shape, strict=True)] for _, stored in pieces]
        shape = check_weight(name, [max(sizes) for sizes in zip(*ends, strict=True)], str(self.root))
        try:
            return tensor_entry(name, pieces[0][1].dtype, shape, [stored.chunk(file) for file, stored in pieces])
        except ValueError as error:
            raise ValueError(f"{self.root}: {error}") from error


def read_indexed(root: Path, weight_map: dict[str, str], told_by: Path) -> dict[str, TensorEntry]:
    """The tensors that `weight_map`, read from `told_by`, says are in files of `root`.

    Raises:
        ValueError: A header is damaged, or a file does not hold what is said.
    """
    index: dict[str, TensorEntry] = {}
    headers = {file: read_header(root, file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        stored = headers[file].get(name)
        if stored is None:
            raise ValueError(f"{told_by}: says that {short(name)} is in {file}, which does not hold it")
        index[name] = tensor_entry(name, stored.dtype, stored.shape, [stored._replace(origin=(0,) * len(stored.shape)).chunk(file)])
    return index


def read_header(root: Path, file: str, base: int = 0) -> dict[str, Stored]:
    """The tensors of the safetensors data that begin at byte `base` of `file` in `root` and go on to its end.

    Raises:
        ValueError: The header is damaged, or the file is cut short.
    """
    path, size = root / file, file_size(root, check_name(file, str(root)), str(root))
    with path.open("rb") as stream:
        stream.seek(base)
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MOST_HEADER, size - base - 8):
            raise ValueError(f"{path}: says its header has {length:,} bytes, the file has {size:,}; it is cut short or no safetensors file")
        header = parse_json(stream.read(length), path)
    origins = _origins(header.pop("__metadata__", None), path)
    found = {name: _stored(path, name, fields, base + 8 + length, size, origins.get(name)) for name, fields in header.items()}
    ordered = sorted((stored.offset, stored.offset + stored.length, name) for name, stored in found.items())
    for (_, stop, one), (start, _, other) in pairwise(ordered):
        if start < stop:
            raise ValueError(f"{path}: {one} and {other} share bytes; the header is damaged")
    return found


def _stored(path: Path, name: str, fields: Any, base: int, size: int, origin: Any) -> Stored:
    try:
        dtype, sizes, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        ordered = 0 <= start <= stop
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: weight {short(name)} is not described as safetensors do; the header is damaged") from error
    shape = check_weight(name, sizes, str(path))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: weight {name} has element type {short(dtype)}, which is not known here")
    length = math.prod(shape) * ITEM_SIZES[_DTYPES[dtype]]
    if not isinstance(start, int) or not isinstance(stop, int) or not ordered or length != stop - start:
        at = f"bytes {short(start)} to {short(stop)}"
        raise ValueError(f"{path}: weight {name} of {dtype} {shape} does not fill {at}; the header is damaged")
    if base + stop > size:
        raise ValueError(f"{path}: has {size:,} bytes but {name} ends at byte {base + stop:,}; the file is cut short, copy it again")
    origin = (0,) * len(shape) if origin is None else check_weight(name, origin, str(path))
    if len(origin) != len(shape):
        raise ValueError(f"{path}: weight {name} of shape {shape} is said to belong at {origin}; the header is damaged")
    return Stored(_DTYPES[dtype], shape, base + start, length, origin)


def _origins(metadata: Any, path: Path) -> dict[str, Any]:
    """Where in the whole weight each tensor of a file belongs, where its metadata say so."""
    text = metadata.get(_PIECES) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        return {}
    pieces = parse_json(text.encode(errors="replace"), path)
    return {name: fields.get("saved_offsets") for name, fields in pieces.items() if isinstance(fields, dict)}
