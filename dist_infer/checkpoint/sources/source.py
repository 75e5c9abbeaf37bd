"""What a checkpoint format tells of itself: which tensors there are and where their bytes lie."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

Box = tuple[tuple[int, int], ...]  # (start, stop) for each dim

ITEM_SIZES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
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
            of the archive at `offset`, whose place is looked up when the chunk is first read.
    """

    file: str
    offset: int
    length: int
    box: Box
    codec: str = "raw"


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
    """A checkpoint in some format, opened for reading."""

    kind: str
    root: Path
    other_bytes: int

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor that may belong to a model; optimizer state and the like is only counted in `other_bytes`."""
        ...


def tensor_entry(name: str, dtype: str, shape: tuple[int, ...], chunks: list[Chunk]) -> TensorEntry:
    """The entry of tensor `name`, its chunks in order.

    Raises:
        ValueError: The chunks do not hold every element exactly once.
    """
    chunks = sorted((chunk for chunk in chunks if all(stop > start for start, stop in chunk.box)), key=lambda chunk: chunk.box)
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


def check_name(file: object, told_by: str) -> str:
    """`file`, when it names a file inside the checkpoint's directory.

    Raises:
        ValueError: It is no file name, or leads outside the directory.
    """
    if not isinstance(file, str) or not file:
        raise ValueError(f"{told_by}: {file!r} is not a file name")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\0" in file or "\\" in file:
        raise ValueError(f"{told_by}: refers to {file!r}, which is outside the checkpoint's directory")
    return file


def file_size(root: Path, file: str, told_by: str) -> int:
    """Bytes of `file` in `root`.

    Raises:
        FileNotFoundError: It is not there.
    """
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, but {told_by} refers to it; copy the checkpoint again, with all its files")
    return path.stat().st_size
