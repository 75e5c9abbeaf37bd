"""A communicator that counts what passes through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator
from dist_infer.distributed.connect import Connector


@dataclass(frozen=True)
class Call:
    """One collective: which, and what this rank brought to it (its shape, and how many bytes)."""

    kind: str
    shape: tuple[int, ...]
    bytes: int


class Counting(Communicator):
    """Another communicator, whose calls are written down.

    Attributes:
        calls: Of this rank, in order.
    """

    def __init__(self, counted: Communicator, calls: list[Call]) -> None:
        """Count the calls of `counted` in `calls`."""
        self.rank, self.size = counted.rank, counted.size
        self.counted, self.calls = counted, calls

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Counted."""
        self._note("all_reduce", tensor)
        return self.counted.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Counted."""
        self._note("broadcast", tensor)
        return self.counted.broadcast(tensor, source)

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Counted."""
        self._note("gather", tensor)
        return self.counted.gather(tensor, target)

    def barrier(self) -> None:
        """Not counted."""
        self.counted.barrier()

    def abort(self, error: Exception) -> None:
        """Of the counted one."""
        self.counted.abort(error)

    def close(self) -> None:
        """Of the counted one."""
        self.counted.close()

    def _note(self, kind: str, tensor: Tensor) -> None:
        self.calls.append(Call(kind, tuple(tensor.shape), tensor.nbytes))


@contextmanager
def counted_calls() -> Iterator[list[Call]]:
    """The calls of all communicators of meshes made inside, on this rank."""
    calls: list[Call] = []
    connect = Connector.connect

    def counting(connector: Connector, ranks: tuple[int, ...], device: torch.device) -> Communicator:
        return Counting(connect(connector, ranks, device), calls)

    with patch.object(Connector, "connect", counting):
        yield calls
