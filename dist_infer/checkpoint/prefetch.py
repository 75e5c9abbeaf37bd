"""Bringing the next checkpoint's bytes into the page cache while the present one works."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch

from dist_infer.checkpoint.plan import Read
from dist_infer.checkpoint.reader import Batch, Job, batches
from dist_infer.checkpoint.sources.codec import is_whole
from dist_infer.checkpoint.sources.source import ITEM_SIZES

_LOWEST = 19  # priority
_PIECE = 1 << 20  # bytes read at once of what is not read by batches


class Prefetch:
    """A thread of low priority that reads what a later load will read, and throws it away.

    Args:
        path: What the user calls the checkpoint.
        reads: Gives the checkpoint's directory and what is to be read of it; called on the thread.
    """

    def __init__(self, path: str, reads: Callable[[], tuple[Path, Iterable[Read]]]) -> None:
        self.path = path
        self.bytes_read = 0
        self._reads = reads
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when all is read, or reading failed."""
        self._thread.join()

    def stop(self) -> Exception | None:
        """Read no further; returns what went wrong so far."""
        self._stopping.set()
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)  # Linux: of this thread alone
            root, reads = self._reads()
            job = Job(root, {}, None)
            found = list(batches(reads))
            buffer = torch.empty(max((_size(batch) for batch in found), default=0), dtype=torch.uint8)
            for file, of_file in groupby(found, lambda batch: batch.reads[0].chunk.file):
                fd = os.open(root / file, os.O_RDONLY)
                try:
                    if not self._read_file(fd, list(of_file), job, buffer):
                        return
                finally:
                    os.close(fd)
        except Exception as error:  # kept for whoever wants to load it
            self._error = error

    def _read_file(self, fd: int, found: list[Batch], job: Job, buffer: torch.Tensor) -> bool:
        """Read the batches of one file; False when told to stop."""
        whole: set[int] = set()
        for batch, coming in zip(found, [*found[1:], None], strict=True):
            if self._stopping.is_set():
                return False
            if coming is not None:
                os.posix_fadvise(fd, *_range(coming), os.POSIX_FADV_WILLNEED)
            chunk = batch.reads[0].chunk
            if not is_whole(chunk):
                job.fetch(fd, batch, buffer[: batch.bytes])
                self.bytes_read += batch.bytes
            elif chunk.offset not in whole:
                whole.add(chunk.offset)
                for at in range(0, chunk.length, _PIECE):
                    self.bytes_read += os.preadv(fd, [buffer.numpy().data[: min(_PIECE, chunk.length - at)]], chunk.offset + at)
        return True


def _size(batch: Batch) -> int:
    """Bytes of buffer that reading `batch` takes."""
    return _PIECE if is_whole(batch.reads[0].chunk) else batch.bytes


def _range(batch: Batch) -> tuple[int, int]:
    """Offset and length in its file of what `batch` reads, about: what an archive has before its data is not known here."""
    read = batch.reads[0]
    if is_whole(read.chunk):
        return read.chunk.offset, read.chunk.length
    low, high = batch.span or (read.start, read.start + read.runs * read.stride)
    size = ITEM_SIZES[read.dtype]
    return read.chunk.offset + low * size, (high - low) * size
