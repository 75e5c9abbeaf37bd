"""Reading once what several ranks hold alike: one of them reads, and passes it on."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dist_infer.checkpoint import reader
from dist_infer.checkpoint.plan import Read
from dist_infer.checkpoint.reader import Batch, Job, LoadReport, batches
from dist_infer.distributed.collectives import Communicator

_HEADER = 512  # bytes before those of a parcel: the length of an error's text, and the text
_ALIGNED = 64


class Parcel(NamedTuple):
    """Batches that travel together: at most `STAGING` bytes, or one larger batch."""

    batches: tuple[Batch, ...]

    def places(self) -> Iterator[tuple[Batch, slice]]:
        """Each batch and where in the message its bytes lie."""
        at = _HEADER
        for batch in self.batches:
            yield batch, slice(at, at + batch.bytes)
            at += -(-batch.bytes // _ALIGNED) * _ALIGNED

    @property
    def bytes(self) -> int:
        """Bytes of the message."""
        return max(place.stop for _, place in self.places())


@dataclass(frozen=True)
class Relay:
    """How weights go from the rank that reads them to the others that hold them.

    All ranks go through the same parcels in the same order and take turns in reading. A parcel of what every tp rank
    holds goes from its reader to the reader's twins in the other replicas first, and from each of these to its tp ranks.

    Attributes:
        twins: The ranks of other replicas that hold the same.
        tp: The tp ranks of this replica.
        common: Parameters that every tp rank holds alike.
    """

    twins: Communicator
    tp: Communicator
    common: frozenset[str]

    def read_all(
        self,
        root: Path,
        reads: Iterable[Read],
        destinations: Mapping[str, torch.Tensor],
        threads: int,
        progress: Callable[[int], object] | None = None,
    ) -> LoadReport:
        """Fill `destinations` by `reads`, made by this rank or another; the counterpart of `reader.read_all`.

        Raises:
            ValueError: A file ends early or an item in it is not what the index says; on every rank that waits for it.
            OSError: A file cannot be read.
        """
        reads = list(reads)
        start = time.perf_counter()
        job = Job(root, destinations, progress)
        own = parcels(batches(read for read in reads if read.parameter not in self.common))
        common = parcels(batches(read for read in reads if read.parameter in self.common))
        turns = [_Turn(parcel, [(self.twins, number % self.twins.size)]) for number, parcel in enumerate(own)]
        for number, parcel in enumerate(common):
            tp, twin = number % self.tp.size, number // self.tp.size % self.twins.size
            turns.append(_Turn(parcel, [(self.twins, twin)] * (tp == self.tp.rank) + [(self.tp, tp)]))
        self._take(turns, job, threads)
        return job.report(reads, start)

    def _take(self, turns: list[_Turn], job: Job, threads: int) -> None:
        """Go through all turns; this rank reads ahead for its own."""
        largest = max((turn.parcel.bytes for turn in turns), default=0)
        incoming = torch.empty(largest, dtype=torch.uint8)
        mine = deque(turn for turn in turns if all(group.rank == source for group, source in turn.route))
        reading: deque[Future[torch.Tensor]] = deque()
        with ThreadPoolExecutor(threads, "reader") as pool:
            for turn in [mine.popleft() for _ in range(min(threads, len(mine)))]:
                reading.append(pool.submit(_read, job, turn.parcel, torch.empty(largest, dtype=torch.uint8)))
            for turn in turns:
                reads = all(group.rank == source for group, source in turn.route)
                message = reading.popleft().result() if reads else incoming
                for group, source in turn.route:
                    group.broadcast(message[: turn.parcel.bytes], source)
                length = int(message[:8].view(torch.int64))
                if length:
                    raise ValueError(bytes(message[8 : 8 + length].tolist()).decode(errors="replace"))
                for batch, place in turn.parcel.places():
                    job.place(batch, message[place])
                    if job.progress is not None and not reads:
                        job.progress(batch.bytes)
                if reads and mine:
                    reading.append(pool.submit(_read, job, mine.popleft().parcel, message))


class _Turn(NamedTuple):
    """A parcel, and over which groups it goes from which of their ranks; who is the source in all of them reads it."""

    parcel: Parcel
    route: list[tuple[Communicator, int]]


def parcels(found: Iterable[Batch]) -> list[Parcel]:
    """`found`, in order, in parcels."""
    made: list[Parcel] = []
    group: list[Batch] = []
    size = 0
    for batch in found:
        if group and size + batch.bytes > reader.STAGING:
            made.append(Parcel(tuple(group)))
            group, size = [], 0
        group.append(batch)
        size += batch.bytes
    return [*made, Parcel(tuple(group))] if group else made


def _read(job: Job, parcel: Parcel, message: torch.Tensor) -> torch.Tensor:
    """`message`, filled with the bytes of `parcel`, or with the error that reading them met."""
    message[:8] = 0
    try:
        for batch, place in parcel.places():
            fd = os.open(job.root / batch.reads[0].chunk.file, os.O_RDONLY)
            try:
                job.fetch(fd, batch, message[place])
            finally:
                os.close(fd)
    except (ValueError, OSError) as error:
        text = (str(error) or type(error).__name__).encode()[: _HEADER - 8]
        message[:8].view(torch.int64)[0] = len(text)
        message[8 : 8 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return message
