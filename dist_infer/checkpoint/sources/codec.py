"""How the elements of a chunk are found in its file: where they lie, and what has to be decoded first."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from dist_infer.checkpoint.sources.archive import ITEM_BUDGET, Place, Window, check_crc, record_of
from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk, short

_PIECE = 1 << 20  # bytes decoded at once
_KEPT = 64 << 20  # bytes of decoded chunks kept for the next reads of them
_WINDOW = 1 << 27  # the most memory a stream may ask of its decoder


def codec_of(transforms: Any) -> str:
    """The codec of an item of a DCP file whose index names `transforms`.

    Raises:
        ValueError: They are not known here, or need a package that is not installed.
    """
    if not transforms:
        return "torch_save"
    known = isinstance(transforms, list) and len(transforms) == 1 and isinstance(transforms[0], str)
    if not known or not re.fullmatch(r"stream\.zstd/1(\..*)?", transforms[0]):
        raise ValueError(f"is stored through {short(transforms)}; only plain items and stream.zstd can be read")
    if importlib.util.find_spec("zstandard") is None:
        raise ValueError("is compressed with zstd, and the package that reads it is not installed; pip install zstandard")
    return "zstd"


def is_whole(chunk: Chunk) -> bool:
    """Whether nothing of `chunk` can be read without decoding all of it."""
    return chunk.codec == "zstd"


class Decoded:
    """Chunks decoded whole, the latest kept for the next reads of them; for any number of threads."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, int], Future[tuple[BinaryIO, Chunk]]] = {}
        self._lock = Lock()

    def find(self, fd: int, chunk: Chunk, dtype: str) -> tuple[BinaryIO, Chunk, int]:
        """`chunk`, which `is_whole`, decoded from the file open at `fd`.

        Returns:
            A file in memory, which closes when nobody holds it any more; the chunk as it lies there; and how many bytes
            were read for it, which is 0 when it had been decoded before.

        Raises:
            ValueError: It is damaged, or larger than its shape says.
        """
        key = (chunk.file, chunk.offset)
        with self._lock:
            known = self._items.get(key)
            item = self._items.setdefault(key, Future())
        if known is not None:
            return *item.result(), 0
        try:
            file, there = decode(fd, chunk, dtype)
        except BaseException as error:
            item.set_exception(error)
            raise
        item.set_result((file, there))
        with self._lock:
            self._forget(key)
        return file, there, chunk.length

    def _forget(self, latest: tuple[str, int]) -> None:
        """Drop the oldest items but `latest` while they take more than `_KEPT` bytes together."""
        lengths = {key: item.result()[1].length for key, item in self._items.items() if item.done() and item.exception() is None}
        total = sum(lengths.values())
        for key, length in lengths.items():
            if total <= _KEPT:
                return
            if key != latest:
                del self._items[key]
                total -= length


def decode(fd: int, chunk: Chunk, dtype: str) -> tuple[BinaryIO, Chunk]:
    """All of `chunk`, which `is_whole`, decoded into a file in memory, and the chunk as it lies there; see `Decoded.find`."""
    zstandard = importlib.import_module("zstandard")
    most = math.prod(stop - start for start, stop in chunk.box) * ITEM_SIZES[dtype] + ITEM_BUDGET
    place = f"{chunk.file} at byte {chunk.offset:,}"
    file, written = os.fdopen(os.memfd_create("decoded"), "r+b", buffering=0), 0
    stream = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(Window(fd, chunk.offset, chunk.length, chunk.length))
    try:
        while piece := stream.read(_PIECE):
            written += len(piece)
            if written > most:
                raise ValueError(f"its shape needs at most {most:,} bytes and it has more")
            while piece:
                piece = piece[file.write(piece) or 0 :]
    except (ValueError, zstandard.ZstdError) as error:
        raise ValueError(f"{chunk.about}: what lies at byte {chunk.offset:,} cannot be decoded: {error}") from error
    return file, chunk._replace(file=place, offset=0, length=written, codec="torch_save")


def verify_crc(root: Path, chunk: Chunk, dtype: str) -> int:
    """Read all of `chunk`, of elements of `dtype`, and compare it with the CRC-32 that was kept when it was saved.

    Returns:
        Bytes compared: 0 when the format or the writer kept none.

    Raises:
        ValueError: The bytes are not those that were saved.
        OSError: The file cannot be read.
    """
    with (root / chunk.file).open("rb", buffering=0) as file:
        try:
            item = file
            if is_whole(chunk):
                item, chunk = decode(file.fileno(), chunk, dtype)
            fd = item.fileno()
            place = Place(chunk.offset, chunk.length, chunk.crc or 0) if chunk.codec == "raw" else record_of(fd, chunk, dtype)
            if place.crc:
                check_crc(fd, place, chunk.about)
        except ValueError as error:
            raise ValueError(f"{root}/{error}") from error
    return place.length if place.crc else 0
