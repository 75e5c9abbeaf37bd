"""What a checkpoint format tells of itself: which tensors there are and where their bytes lie."""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

Box = tuple[tuple[int, int], ...]  # (start, stop) for each dim

MOST_DIMS = 8
_MOST_ELEMENTS = 1 << 62
ITEM_SIZES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e8m0fnu": 1, "complex64": 8, "complex128": 16,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


class Chunk(NamedTuple):
    """A box of a tensor that lies in one piece, row by row, in one file.

    Attributes:
        file: Name relative to the source's root.
        offset: Where it begins in the file, in bytes.
        length: How many bytes it takes there.
        box: The region of the tensor it holds.
        codec: How its elements are found: "raw", they begin at `offset`; "torch_save", they are a record
            of the archive at `offset`, whose place is looked up when the chunk is first read; "zstd", such an
            archive in one compressed stream, which can only be read whole.
        crc: CRC-32 of the chunk's bytes, where the index holds one.
        weight: The tensor's name, for messages.
    """

    file: str
    offset: int
    length: int
    box: Box
    codec: str = "raw"
    crc: int | None = None
    weight: str = ""

    @property
    def about(self) -> str:
        """File and weight, as messages begin."""
        return f"{self.file}: weight {self.weight}"


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor: its type, global shape, and the chunks that together hold every element once.

    Attributes:
        dtype: Name of the element type as torch spells it ("bfloat16").
        shape: Global shape.
        chunks: In order of their first row.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return ITEM_SIZES[self.dtype]

    @property
    def elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @cached_property
    def _starts(self) -> list[int]:
        return [chunk.box[0][0] for chunk in self.chunks]

    @cached_property
    def _reach(self) -> int:
        return max(chunk.box[0][1] - chunk.box[0][0] for chunk in self.chunks)

    def touching(self, start: int, stop: int) -> tuple[Chunk, ...]:
        """The chunks that may hold rows `start` to `stop`; a superset, found without looking at the others."""
        if len(self.chunks) == 1 or not self.shape:
            return self.chunks
        first = bisect_left(self._starts, start - self._reach + 1)
        return self.chunks[first : bisect_left(self._starts, stop, lo=first)]


class Source(Protocol):
    """A checkpoint in some format, opened for reading.

    Attributes:
        kind: Name of the format.
        root: The directory its files lie in.
        other_bytes: Bytes of what is no part of a model, where the index tells.
        ignored: What its index holds that is not known here, as a newer writer may have added.
    """

    kind: str
    root: Path
    other_bytes: int
    ignored: tuple[str, ...]

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor that may belong to a model; optimizer state and the like is only counted in `other_bytes`."""
        ...


def tensor_entry(name: str, dtype: str, shape: tuple[int, ...], chunks: list[Chunk]) -> TensorEntry:
    """The entry of tensor `name`, its chunks in order.

    Raises:
        ValueError: The chunks do not hold every element exactly once.
    """
    assert len(shape) <= MOST_DIMS, name  # see `check_weight`
    held = (chunk._replace(weight=name) for chunk in chunks if all(stop > start for start, stop in chunk.box))
    chunks = sorted(held, key=lambda chunk: chunk.box)
    boxes = [chunk.box for chunk in chunks]
    if not _is_rows(shape, boxes):
        _check_cover(name, shape, boxes)
    return TensorEntry(dtype, shape, tuple(chunks))


def _is_rows(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Whether `boxes`, in order, are whole rows that follow one another: the common case, told quickly."""
    whole, row = tuple((0, size) for size in shape[1:]), 0
    for box in boxes:
        if not shape or box[0][0] != row or box[1:] != whole:
            return False
        row = box[0][1]
    return bool(shape) and row == shape[0]


def _check_cover(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Raise ValueError unless `boxes` tile a tensor of `shape` exactly.

    A set of boxes tiles a region exactly when their signed corners add up to the region's own (the
    sum of their indicator functions is then the region's); that needs no look at pairs of boxes.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for box, weight in [*((box, 1) for box in boxes), (tuple((0, size) for size in shape), -1)]:
        for ends in product((0, 1), repeat=len(shape)):
            corner = tuple(edges[end] for edges, end in zip(box, ends, strict=True))
            corners[corner] += weight * (-1) ** sum(ends)
    if not any(corners.values()):
        return
    stored, wanted = sum(math.prod(stop - start for start, stop in box) for box in boxes), math.prod(shape)
    if stored < wanted:
        raise ValueError(
            f"weight {name}: chunks hold {stored:,} of its {wanted:,} elements; the checkpoint is incomplete, save or copy it again"
        )
    raise ValueError(f"weight {name}: chunks overlap or reach outside its shape {shape}; the checkpoint's index is damaged")


def check_weight(name: object, shape: object, told_by: str) -> tuple[int, ...]:
    """`shape`, when it and `name` are what a weight can have.

    Raises:
        ValueError: They are not, and what was told of the weight is damaged or hostile.
    """
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 1000:
        raise ValueError(f"{told_by}: {short(name)} cannot be the name of a weight; the file is damaged")
    return check_dims(name, shape, told_by)


def check_dims(name: str, dims: object, told_by: str) -> tuple[int, ...]:
    """`dims`, when they can be sizes or offsets in a weight called `name`.

    Raises:
        ValueError: They cannot, and what was told of the weight is damaged or hostile.
    """
    if not isinstance(dims, tuple | list) or len(dims) > MOST_DIMS:
        raise ValueError(f"{told_by}: weight {name} has no shape of at most {MOST_DIMS} dims; the file is damaged")
    elements = 1
    for size in dims:
        if not isinstance(size, int) or not 0 <= size < _MOST_ELEMENTS:
            elements = _MOST_ELEMENTS
            break
        elements *= size
    if elements >= _MOST_ELEMENTS:
        raise ValueError(f"{told_by}: weight {name} has shape {short(dims)}, which no tensor can have; the file is damaged")
    return tuple(dims)


def check_name(file: object, told_by: str) -> str:
    """`file`, when it names a file inside the checkpoint's directory.

    Raises:
        ValueError: It is no file name, or leads outside the directory.
    """
    if not isinstance(file, str) or not file.isprintable() or not 0 < len(file) <= 1000:
        raise ValueError(f"{told_by}: {short(file)} is not a file name")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file:
        raise ValueError(f"{told_by}: refers to {short(file)}, which is outside the checkpoint's directory")
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError(f"{told_by}: {short(file)} is too long for a file name")
    return file


def short(value: object) -> str:
    """`value` as one short line of an error message, however long it is and whatever it holds."""
    if isinstance(value, str):
        return repr(value[:80])
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    if isinstance(value, tuple | list) and len(value) < 10:
        inner = ", ".join(short(item) if isinstance(item, int | str) else f"a {type(item).__name__}" for item in value)
        return f"({inner})"
    return f"a {type(value).__name__}"


def file_size(root: Path, file: str, told_by: str) -> int:
    """Bytes of `file` in `root`.

    Raises:
        FileNotFoundError: It is not there.
    """
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, but {told_by} refers to it; copy the checkpoint again, with all its files")
    return path.stat().st_size


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, which was read from `path`.

    Raises:
        ValueError: It is none, or a key is in it twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: holds a JSON {type(parsed).__name__} where an object is expected")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def read_weight_map(path: Path) -> dict[str, str]:
    """The files that the index at `path`, of Hugging Face's form, names for each weight.

    Raises:
        FileNotFoundError: A file it names is missing.
        ValueError: It is no such index, or leads outside its directory.
    """
    weight_map = parse_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: has no weight_map; it is not an index of a sharded checkpoint")
    return check_weight_map(weight_map, path)


def check_weight_map(weight_map: dict[Any, Any], path: Path) -> dict[str, str]:
    """`weight_map`, when all files it names are there; see `read_weight_map`."""
    sizes: dict[str, int] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or file not in sizes:
            check_name(file, str(path))
            sizes[file] = file_size(path.parent, file, str(path))
    return weight_map


# Parts of names below which training state is kept, not the model.
_OTHER = re.compile(r"(^|\.)(optim|optimizer|optimizers|lr_scheduler|scheduler|train_state|dataloader|rng_state)(\.|$)")


def is_other(name: str) -> bool:
    """Whether `name` is that of training state, by what it is kept under."""
    return _OTHER.search(name) is not None
