"""What ranks say to each other, behind one small interface."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveTimeout(RuntimeError):
    """A collective waited for other ranks for too long."""


class Communicator(ABC):
    """Collectives over one group of ranks; every rank of the group makes the same calls in the same order.

    Attributes:
        rank: Index of this rank in the group.
        size: Ranks in the group.
        waiting: Whether a call waits for other ranks, or did so in vain.
        capturable: Whether a CUDA graph may hold its sums.
        timeout_s: How long other ranks may keep this one waiting.
    """

    rank: int
    size: int
    waiting: bool = False
    capturable: bool = False
    timeout_s: float = math.inf
    _error: Exception | None = None  # what `abort` was given

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum the contiguous `tensor` over the ranks, in place; every rank gets the same bits. Returns it."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite the contiguous `tensor` with group rank `source`'s, in place. Returns it."""

    @abstractmethod
    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Every rank's `tensor` (same shape and dtype) on group rank `target`; None elsewhere."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has come here."""

    def wait_for(self, ready: torch.cuda.Event) -> None:
        """Return once the GPU has come to `ready`, which may lie behind sums of these ranks that a graph holds: no backend watches those.

        Raises:
            CollectiveTimeout: It did not for `timeout_s`.
        """
        self.waiting, began = True, time.monotonic()
        while not ready.query():
            if self._error is not None:
                raise self._error
            if time.monotonic() - began > self.timeout_s:
                raise CollectiveTimeout(f"the GPU has waited for other ranks for longer than parallel.timeout_s={self.timeout_s:g} s")
            time.sleep(0)  # other threads may want the interpreter
        self.waiting = False

    @abstractmethod
    def abort(self, error: Exception) -> None:
        """Make the call in progress, and every later one, raise `error`. Called from another thread."""

    @abstractmethod
    def close(self) -> None:
        """Free what this communicator holds."""


class SingleRank(Communicator):
    """A group of one: nothing to say."""

    rank = 0
    size = 1
    capturable = True

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of one tensor is itself."""
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Nobody else to send to."""
        return tensor

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """A copy, as elsewhere."""
        return [tensor.clone()]

    def barrier(self) -> None:
        """Everyone is here."""

    def wait_for(self, ready: torch.cuda.Event) -> None:
        """The GPU waits for nobody."""
        ready.synchronize()

    def abort(self, error: Exception) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing to free."""


class ProcessGroup(Communicator):
    """A torch process group: gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
        """Use `group`, whose own time-out is `timeout_s`, for tensors on `device`."""
        self.rank, self.size, self.timeout_s = group.rank(), group.size(), timeout_s
        self.group = group
        self._device = device
        self._backend = group._get_backend(device)
        self._gloo = self._backend.name() == "gloo"
        self.capturable = not self._gloo

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Each element is summed on one rank and sent to the others, so all have the same bits."""
        # gloo rounds to the tensor's type after every rank.
        half = self._gloo and self.size > 2 and tensor.dtype in (torch.bfloat16, torch.float16)
        with self._aborting():
            if half:
                total = tensor.float()
                dist.all_reduce(total, group=self.group)
                tensor.copy_(total)
            else:
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite with `source`'s."""
        with self._aborting():
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Collect on `target`."""
        # gloo gathers on the CPU only.
        sent = tensor.cpu() if self._gloo else tensor
        parts = [torch.empty_like(sent) for _ in range(self.size)] if self.rank == target else None
        with self._aborting():
            dist.gather(sent, parts, group=self.group, group_dst=target)
        return None if parts is None else [part.to(tensor.device) for part in parts]

    def barrier(self) -> None:
        """Wait for everyone."""
        with self._aborting():
            dist.barrier(group=self.group)

    def abort(self, error: Exception) -> None:
        """NCCL stops at once; gloo when a peer's connection closes, as those of ranks that leave do."""
        self._error = error
        if not self._gloo:
            self._backend.abort()

    def close(self) -> None:
        """Nothing: the group goes with the process's default one, and the next mesh of a script uses it again."""

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        """Raise the error given to `abort` instead of what the backend makes of it."""
        if self._error:
            raise self._error
        self.waiting = True
        try:
            yield
        except RuntimeError as error:
            if self._error:
                raise self._error from error
            if "timed out waiting" in str(error).lower():  # gloo's words
                raise CollectiveTimeout("a collective did not end within parallel.timeout_s") from error
            raise
        self.waiting = False
