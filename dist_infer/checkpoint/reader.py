"""Makes planned reads: in file order, with several threads, through little memory."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import torch

from dist_infer.checkpoint.plan import Read
from dist_infer.checkpoint.sources.archive import find_elements
from dist_infer.checkpoint.sources.codec import Decoded, is_whole
from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk
from dist_infer.model.native import read_runs

STAGING = 8 << 20  # bytes a thread reads at once, and all it holds besides the weights themselves
_DENSE = 0.98  # the least part of a span that must be wanted for the span to be read in one go
_HOT = 1 << 20  # bytes looked at together while the processor's cache still holds them


@dataclass(frozen=True)
class LoadReport:
    """What a load cost.

    Attributes:
        bytes_requested: Bytes asked of the files, headers included.
        bytes_held: Bytes the rank's weights take as they are stored.
        seconds: How long it took.
        doubtful: Whether something read may hold NaN or Inf; False is certain.
    """

    bytes_requested: int
    bytes_held: int
    seconds: float
    doubtful: bool


class Batch(NamedTuple):
    """What one thread does at once, at most `STAGING` bytes.

    Attributes:
        reads: Of one chunk. With `span` given they lie within it; else there is one, read run by run.
        span: (start, stop) in elements from the chunk's first element, read in one go.
    """

    reads: tuple[Read, ...]
    span: tuple[int, int] | None

    @property
    def bytes(self) -> int:
        """Bytes it brings, those between its reads included."""
        read = self.reads[0]
        return read.bytes if self.span is None else (self.span[1] - self.span[0]) * ITEM_SIZES[read.dtype]


def read_all(
    root: Path,
    reads: Iterable[Read],
    destinations: Mapping[str, torch.Tensor],
    threads: int,
    progress: Callable[[int], object] | None = None,
) -> LoadReport:
    """Fill `destinations` by making `reads`.

    Args:
        root: The checkpoint's directory.
        reads: What to read.
        destinations: Contiguous tensors on any device, by parameter; other dtypes are converted to.
        threads: How many threads read.
        progress: Told the bytes of each finished batch, one call at a time.

    Raises:
        ValueError: A file ends early or an item in it is not what the index says.
        OSError: A file cannot be read.
    """
    reads = list(reads)
    job = Job(root, destinations, progress)
    start = time.perf_counter()
    todo = deque(batches(reads))
    with ThreadPoolExecutor(threads, "reader") as pool:
        for done in [pool.submit(job.work, todo) for _ in range(threads)]:
            done.result()
    return job.report(reads, start)


def batches(reads: Iterable[Read]) -> Iterator[Batch]:
    """`reads` in file order, cut and joined so that each batch is one sequential read or one strided one."""
    parts = (part for read in reads for part in _split(read))
    ordered = sorted(parts, key=lambda read: (read.chunk.file, read.chunk.offset, read.start))
    for _, of_chunk in groupby(ordered, key=lambda read: (read.chunk.file, read.chunk.offset)):
        group: list[Read] = []
        low = high = 0
        for read in of_chunk:
            stop = _stop(read)
            if group and (read.start > high or (max(high, stop) - low) * ITEM_SIZES[read.dtype] > STAGING):
                yield from _close(group, low, high)
                group = []
            low, high = (low, max(high, stop)) if group else (read.start, stop)
            group.append(read)
        yield from _close(group, low, high)


def _stop(read: Read) -> int:
    return read.start + (read.runs - 1) * read.stride + read.length


def _close(group: list[Read], low: int, high: int) -> Iterator[Batch]:
    if sum(read.elements for read in group) >= _DENSE * (high - low):
        yield Batch(tuple(group), (low, high))
    else:
        for read in group:
            yield Batch((read,), (read.start, _stop(read)) if read.runs == 1 else None)


def _split(read: Read) -> Iterator[Read]:
    """`read` in parts whose elements fit the staging buffer, and a run that does not fit by itself."""
    room = STAGING // ITEM_SIZES[read.dtype]
    if read.elements <= room:
        yield read
    elif read.length > room:
        for run in range(read.runs):
            for at in range(0, read.length, room):
                start, destination = read.start + run * read.stride + at, read.destination + run * read.step + at * read.spread
                length = min(room, read.length - at)
                yield read._replace(start=start, destination=destination, length=length, stride=length, step=length, runs=1)
    else:
        runs = room // read.length
        for run in range(0, read.runs, runs):
            start, destination = read.start + run * read.stride, read.destination + run * read.step
            yield read._replace(start=start, destination=destination, runs=min(runs, read.runs - run))


class Job:
    """One load: brings the bytes of batches and puts them into their places, for any number of threads."""

    def __init__(self, root: Path, destinations: Mapping[str, torch.Tensor], progress: Callable[[int], object] | None) -> None:
        self.root, self.progress = root, progress
        self.flat = {name: tensor.detach().view(-1) for name, tensor in destinations.items()}
        self.to_gpu = any(tensor.device.type == "cuda" for tensor in self.flat.values())
        self.bytes_requested = 0
        self.doubtful = False
        self.lock = Lock()
        self.found: dict[tuple[str, int], int] = {}  # (file, offset) of an archive to its first element
        self.decoded = Decoded()

    def report(self, reads: Iterable[Read], start: float) -> LoadReport:
        """What it cost to make `reads` since `start`."""
        return LoadReport(self.bytes_requested, sum(read.bytes for read in reads), time.perf_counter() - start, self.doubtful)

    def work(self, todo: deque[Batch]) -> None:
        """Do batches until none is left; a failure ends all threads."""
        staging = torch.empty(STAGING, dtype=torch.uint8, pin_memory=self.to_gpu)
        file, fd = "", -1
        try:
            while todo:
                try:
                    batch = todo.popleft()
                except IndexError:  # another thread took the last one
                    return
                if batch.reads[0].chunk.file != file:
                    if fd >= 0:
                        os.close(fd)
                    file = batch.reads[0].chunk.file
                    fd = os.open(self.root / file, os.O_RDONLY)
                direct = self._direct(batch)
                buffer = staging[: batch.bytes] if direct is None else direct.view(torch.uint8)
                self.fetch(fd, batch, buffer)
                if direct is None:
                    self.place(batch, buffer)
                else:
                    self._look(direct)
        except BaseException:
            todo.clear()
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def fetch(self, fd: int, batch: Batch, buffer: torch.Tensor) -> None:
        """Bring the bytes of `batch`, from its file open at `fd`, into all of `buffer`."""
        chunk, dtype = batch.reads[0].chunk, batch.reads[0].dtype
        size = ITEM_SIZES[dtype]
        requested = 0
        if is_whole(chunk):
            item, chunk, requested = self._decoded(fd, chunk, dtype)
            fd = item.fileno()  # open for as long as `item` is known here
        base, looked_at = self._first_element(fd, chunk, dtype)
        requested += looked_at + batch.bytes
        memory = buffer.numpy().data
        if batch.span is not None:
            _fill(fd, memory, base + batch.span[0] * size, chunk)
        else:
            (read,) = batch.reads
            width = read.length * size
            start, stride = base + read.start * size, read.stride * size
            done = read_runs(fd, buffer, start, width, stride, read.runs) or 0
            for run in range(done // width, read.runs):  # all without kernels; else the one that fails again, with its place
                _fill(fd, memory[run * width : (run + 1) * width], start + run * stride, chunk)
        with self.lock:
            self.bytes_requested += requested
            if self.progress is not None:
                self.progress(requested)

    def place(self, batch: Batch, buffer: torch.Tensor) -> None:
        """Put the bytes in `buffer`, which `fetch` brought, where they belong."""
        stored = buffer.view(getattr(torch, batch.reads[0].dtype))
        self._look(stored)
        for read in batch.reads:
            stride, first = (read.length, 0) if batch.span is None else (read.stride, read.start - batch.span[0])
            values = stored.as_strided((read.runs, read.length), (stride, 1), stored.storage_offset() + first)
            places = self._runs(read)
            if places.dtype != values.dtype:
                values = values.to(places.dtype)
                self._look(values)  # what does not fit a narrower type became Inf
            places.copy_(values)

    def _look(self, values: torch.Tensor) -> None:
        """Notice if `values`, still in the processor's cache, hold NaN or Inf: the least and the greatest are finite only if all are."""
        if self.doubtful:
            return
        for part in values.reshape(-1).split(_HOT // values.itemsize):
            if not all(math.isfinite(end.item()) for end in torch.aminmax(part)):
                self.doubtful = True

    def _decoded(self, fd: int, chunk: Chunk, dtype: str) -> tuple[BinaryIO, Chunk, int]:
        """A chunk that can only be read whole: the file it was decoded to, the chunk there, and the bytes read for it."""
        try:
            return self.decoded.find(fd, chunk, dtype)
        except ValueError as error:
            raise ValueError(f"{self.root}/{error}") from error

    def _first_element(self, fd: int, chunk: Chunk, dtype: str) -> tuple[int, int]:
        """Where the chunk's first element lies in its file, and the bytes read to find out."""
        if chunk.codec == "raw":
            return chunk.offset, 0
        found = self.found.get((chunk.file, chunk.offset))
        if found is not None:
            return found, 0
        try:
            found, requested = find_elements(fd, chunk, dtype)
        except ValueError as error:
            raise ValueError(f"{self.root}/{error}") from error
        self.found[chunk.file, chunk.offset] = found
        return found, requested

    def _runs(self, read: Read) -> torch.Tensor:
        """The [runs, length] elements that `read` fills."""
        flat = self.flat[read.parameter]
        return flat.as_strided((read.runs, read.length), (read.step, read.spread), flat.storage_offset() + read.destination)

    def _direct(self, batch: Batch) -> torch.Tensor | None:
        """The elements the batch fills, when bytes can go there as they are read."""
        read = batch.reads[0]
        flat = self.flat[read.parameter]
        if (
            len(batch.reads) > 1
            or (read.runs > 1 and (batch.span is not None or read.step != read.length))
            or read.spread > 1
            or flat.device.type != "cpu"
            or flat.dtype != getattr(torch, read.dtype)
        ):
            return None
        return flat[read.destination : read.destination + read.elements]


def _fill(fd: int, buffer: memoryview, offset: int, chunk: Chunk) -> None:
    """Read the bytes at `offset` into all of `buffer`."""
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise ValueError(f"{chunk.about}: the file ends at byte {offset:,}, in the middle of it; it changed while it was read")
        buffer, offset = buffer[count:], offset + count
