"""Collectives between CPU ranks of one host, through a piece of shared memory.

Every rank owns a *slot* in each of two halves of the segment and a *flag*, a counter on a cache line of its own. Operations are
numbered; operation `n` uses half `n % 2`. `flag == n` means: this rank has posted its data of operation `n` and has finished reading
all earlier ones. So a rank may write operation `n` once every flag is at least `n - 1`, and read a peer's data once that
peer's flag is at least `n`. x86-64 shows a core's stores to the others in their order, so data needs no fence before its flag.

The segment never has a name: rank 0 makes it, the others open it through rank 0's entry in /proc. So none can be left behind.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_infer.distributed.collectives import CollectiveTimeout, Communicator

if TYPE_CHECKING:
    from dist_infer.distributed.world import World

SLOT = 256 * 1024  # bytes; larger tensors go in pieces
LINE = 8  # int64s in a cache line
TOKEN = 16  # bytes that prove that two ranks opened the same segment
VIEWS = 512  # tensor shapes whose views are remembered

SPIN_CHECKS = 400  # of the flag before the first yield, about 20 us
LENT_CHECKS = 20  # of compiled code to one of these
YIELD_S = 1e-3  # how long to yield before sleeping
SLEEP_S = 1.5e-4  # and the kernel adds 50 us
IDLE_S, NAP_S = 1.0, 2e-3  # after so long nobody is in a hurry, and a rank without work should not take a tenth of a core


class Segment(ctypes.Structure):
    """A segment as compiled code sees it (`native.cpp`), which makes sums by the same rules.

    Attributes:
        flags: Address of the flags; `line` of them are one rank's.
        slots: Address of the slots; each is of `slot` bytes.
        checks: How often it looks for late ranks before it returns.
        sequence: The operation that this rank has posted last.
        posted: Whether its sum is still to be made.
    """

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("flags", "slots")),
        *((name, ctypes.c_int64) for name in ("rank", "ranks", "slot", "line", "checks", "sequence", "posted")),
    ]


class SharedMemory(Communicator):
    """Ranks of one host; tensors must be on the CPU."""

    def __init__(self, segment: mmap.mmap, rank: int, world_ranks: tuple[int, ...], spin: bool, timeout_s: float) -> None:
        """Use a mapped, zeroed segment of `segment_size(len(world_ranks))` bytes.

        Args:
            segment: The mapping.
            rank: This rank's index in the group.
            world_ranks: The group, for error messages.
            spin: Whether every rank has a core of its own to spin on.
            timeout_s: How long a peer may keep us waiting.
        """
        self.rank, self.size = rank, len(world_ranks)
        self._world_ranks = world_ranks
        self._spin = SPIN_CHECKS if spin else 1
        self.timeout_s = timeout_s
        self._flags = memoryview(segment)[: self.size * LINE * 8].cast("q")
        self._mine = rank * LINE
        self._peers = tuple(peer * LINE for peer in range(self.size) if peer != rank)
        self._memory = torch.frombuffer(segment, dtype=torch.uint8, offset=_header(self.size))
        slots = self._memory.data_ptr()
        self._lent = Segment(slots - _header(self.size), slots, rank, self.size, SLOT, LINE, self._spin * LENT_CHECKS, 0, 0)
        self._views: dict[tuple[torch.Size, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        self._sums: dict[torch.Size, Tensor] = {}
        self._sequence = 0
        self._all_posted = 0  # every flag has been seen to be at least this

    @classmethod
    def connect(cls, world: World, ranks: tuple[int, ...], timeout_s: float) -> SharedMemory | str:
        """Map one segment on all of `ranks`, which must all call this; a reason if any of them cannot."""
        first = world.hosts[ranks[0]]
        if first.machine not in ("x86_64", "AMD64"):
            return f"{first.machine} may reorder stores; shared memory needs x86-64"
        if not all(first.sees(world.hosts[rank]) for rank in ranks):
            return "the ranks are on several hosts, or in several containers"
        index, size = ranks.index(world.rank), segment_size(len(ranks))
        topic = f"segment.{'-'.join(map(str, ranks))}"
        made = _make(size) if index == 0 else None
        offer = world.exchange(topic, made[:2] if made else None, ranks)[0]
        if offer is None:
            return f"no shared memory: {size} bytes were refused"
        segment = made[2] if made else _open(first.pid, offer[0], offer[1], size)
        mapped = all(world.exchange(topic, segment is not None, ranks))
        if made:
            os.close(made[0])
        if not mapped or segment is None:
            return "the ranks may not open each other's files in /proc"
        segment[:TOKEN] = bytes(TOKEN)
        spin = sum(host.boot_id == first.boot_id for host in world.hosts) <= len(os.sched_getaffinity(0))
        communicator = cls(segment, index, ranks, spin, timeout_s)
        world.exchange(topic, None, ranks)  # nobody posts before all have wiped the token
        return communicator

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in rank order; bfloat16 and float16 are accumulated in float32."""
        views = self._views.get((tensor.shape, tensor.dtype)) or self._new_views(tensor)
        if views is None:
            for piece in _pieces(tensor):
                self.all_reduce(piece)
            return tensor
        slots = self._post(views, tensor)
        self._wait_all(self._sequence)
        return self._sum(slots, tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy from `source`, which may run ahead of its readers by one operation."""
        views = self._views.get((tensor.shape, tensor.dtype)) or self._new_views(tensor)
        if views is None:
            for piece in _pieces(tensor):
                self.broadcast(piece, source)
        elif source == self.rank:
            self._post(views, tensor)
        else:
            sequence = self._enter()
            self._wait(source * LINE, sequence)
            tensor.copy_(views[sequence & 1][source])
        return tensor

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Copy to `target`; the others do not wait for it."""
        views = self._views.get((tensor.shape, tensor.dtype)) or self._new_views(tensor)
        if views is None:
            parts = [self.gather(piece, target) for piece in _pieces(tensor)]
            whole = zip(*(part for part in parts if part is not None), strict=True)
            return [torch.cat(of_rank).view(tensor.shape) for of_rank in whole] or None
        slots = self._post(views, tensor)
        if target != self.rank:
            return None
        self._wait_all(self._sequence)
        return [slot.clone() for slot in slots]

    def barrier(self) -> None:
        """Wait for every flag."""
        self._wait_all(self._enter())

    def abort(self, error: Exception) -> None:
        """Waiting calls look at this when they yield."""
        self._error = error

    def close(self) -> None:
        """Drop the views; the memory goes with the last of them."""
        self._error = self._error or RuntimeError("this communicator is closed")
        self._views.clear()
        self._flags.release()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lend(self) -> Segment:
        """The segment, for compiled code to make sums in until this communicator is used again; every rank does likewise."""
        if self._error:
            raise self._error
        self._wait_all(self._sequence)
        self._lent.sequence, self._lent.posted = self._sequence, False
        return self._lent

    def wait_as_lent(self) -> None:
        """Wait for the ranks that compiled code had no more patience with; whenever it has returned."""
        self._sequence = self._lent.sequence
        self._wait_all(self._sequence)

    def _new_views(self, tensor: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        """Each rank's slot in either half, seen as `tensor`'s shape and type; None if it is larger than a slot."""
        size = tensor.nbytes
        if size > SLOT:
            return None
        if len(self._views) >= VIEWS:
            self._views.clear()
            self._sums.clear()

        def slot(half: int, rank: int) -> Tensor:
            start = (half * self.size + rank) * SLOT
            return self._memory[start : start + size].view(tensor.dtype).view(tensor.shape)

        views = ([slot(0, rank) for rank in range(self.size)], [slot(1, rank) for rank in range(self.size)])
        self._views[tensor.shape, tensor.dtype] = views
        return views

    def _enter(self) -> int:
        """Begin an operation in which this rank has nothing to post; returns its number."""
        if self._error:
            raise self._error
        self._sequence += 1
        self._flags[self._mine] = self._sequence
        return self._sequence

    def _post(self, views: tuple[list[Tensor], list[Tensor]], tensor: Tensor) -> list[Tensor]:
        """Begin an operation by posting `tensor`; returns everyone's slots."""
        if self._error:
            raise self._error
        sequence = self._sequence + 1
        if self._all_posted < sequence - 1:
            self._wait_all(sequence - 1)
        slots = views[sequence & 1]
        slots[self.rank].copy_(tensor)
        self._sequence = sequence
        self._flags[self._mine] = sequence
        return slots

    def _sum(self, slots: list[Tensor], out: Tensor) -> Tensor:
        """Sum `slots` in rank order into `out`."""
        if len(slots) == 2:
            return torch.add(slots[0], slots[1], out=out)
        if out.dtype not in (torch.bfloat16, torch.float16):
            torch.add(slots[0], slots[1], out=out)
            for slot in slots[2:]:
                out.add_(slot)
            return out
        total = self._sums.get(out.shape)
        if total is None:
            total = self._sums[out.shape] = torch.empty(out.shape, dtype=torch.float32)
        total.copy_(slots[0])
        for slot in slots[1:]:
            total.add_(slot)
        return out.copy_(total)

    def _wait_all(self, sequence: int) -> None:
        """Return once every rank has posted operation `sequence`."""
        flags = self._flags
        for peer in self._peers:
            if flags[peer] < sequence:
                self._wait(peer, sequence)
        self._all_posted = sequence

    def _wait(self, peer: int, sequence: int) -> None:
        """Return once the flag at `peer` reaches `sequence`: spin, then yield, then sleep."""
        flags = self._flags
        for _ in range(self._spin):
            if flags[peer] >= sequence:
                return
        self.waiting = True
        started = time.monotonic()
        while flags[peer] < sequence:
            if self._error:
                raise self._error
            waited = time.monotonic() - started
            if waited < YIELD_S:
                os.sched_yield()
                continue
            time.sleep(SLEEP_S if waited < IDLE_S else NAP_S)
            if waited > self.timeout_s:
                late = [self._world_ranks[index // LINE] for index in self._peers if flags[index] < sequence]
                names = ", ".join(map(str, late))
                raise CollectiveTimeout(f"rank {names} did not come to a collective within parallel.timeout_s={self.timeout_s:g} s")
        self.waiting = False


def _make(size: int) -> tuple[int, str, mmap.mmap] | None:
    """A segment without a name: its descriptor, the token in it and the mapping; None if there is no memory for it."""
    token = secrets.token_bytes(TOKEN)
    try:
        descriptor = os.memfd_create("dist_infer", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)  # too little memory must show here, not as SIGBUS later
        segment = mmap.mmap(descriptor, size)
    except OSError:
        os.close(descriptor)
        return None
    segment[:TOKEN] = token
    return descriptor, token.hex(), segment


def _open(pid: int, descriptor: int, token: str, size: int) -> mmap.mmap | None:
    """Map a segment that another process made; None if it cannot be opened from here."""
    try:
        ours = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        segment = mmap.mmap(ours, size)
    except (OSError, ValueError):  # another file than we were told of
        return None
    finally:
        os.close(ours)
    return segment if segment[:TOKEN] == bytes.fromhex(token) else None


def segment_size(ranks: int) -> int:
    """Bytes of a segment for `ranks` ranks."""
    return _header(ranks) + 2 * ranks * SLOT


def _header(ranks: int) -> int:
    """Bytes of the flags, in whole pages."""
    return -(-ranks * LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor in pieces that fit a slot."""
    return tensor.view(-1).split(SLOT // tensor.element_size())
