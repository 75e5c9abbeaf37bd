"""Collectives between ranks of several hosts, that cross the network as seldom as they can."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator

SLICED = 64 * 1024  # bytes from which every rank of a host carries a slice of the sum to the other hosts


class Hierarchical(Communicator):
    """Sums inside each host, then between hosts, then tells the rest of each host.

    Sums in rank order inside a host. bfloat16 and float16 are rounded once inside the host and once more between hosts.

    Args:
        whole: All ranks; gathers and barriers go through it.
        inside: The ranks of this host.
        across: The ranks of all hosts that have this one's index in theirs; None where hosts have no such rank.
        places: Of each rank of `whole`, the host (an index among hosts) and its index inside.
        even: Whether all hosts have as many ranks.
    """

    def __init__(
        self, whole: Communicator, inside: Communicator, across: Communicator | None, places: list[tuple[int, int]], even: bool
    ) -> None:
        self.rank, self.size = whole.rank, whole.size
        self._whole, self._inside, self._across = whole, inside, across
        self._places, self._even = places, even
        self.capturable = all(part.capturable for part in self._parts())

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Every element is summed by one rank of each host, and that between hosts, so all have the same bits."""
        self._inside.all_reduce(tensor)
        if self._even and tensor.nbytes >= SLICED and self._inside.size > 1:
            slices = tensor.view(-1).tensor_split(self._inside.size)
            assert self._across is not None, "even hosts have ranks of every index"
            self._across.all_reduce(slices[self._inside.rank])
            for index, part in enumerate(slices):
                self._inside.broadcast(part, index)
            return tensor
        if self._inside.rank == 0:
            assert self._across is not None, "every host has a first rank"
            self._across.all_reduce(tensor)
        return self._inside.broadcast(tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """From `source` to its host's first rank, from there to the other hosts'."""
        host, index = self._places[source]
        if index and self._places[self.rank][0] == host:
            self._inside.broadcast(tensor, index)
        if self._inside.rank == 0:
            assert self._across is not None, "every host has a first rank"
            self._across.broadcast(tensor, host)
        if not index or self._places[self.rank][0] != host:
            self._inside.broadcast(tensor)
        return tensor

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Collect on `target`; each rank's must travel anyway."""
        return self._whole.gather(tensor, target)

    def barrier(self) -> None:
        """Wait for everyone."""
        self._whole.barrier()

    def wait_for(self, ready: torch.cuda.Event) -> None:
        """Wait for the GPU."""
        self._whole.wait_for(ready)

    def abort(self, error: Exception) -> None:
        """End the calls inside and between hosts."""
        for communicator in self._parts():
            communicator.abort(error)

    def close(self) -> None:
        """Close what it is made of."""
        for communicator in self._parts():
            communicator.close()

    def _parts(self) -> list[Communicator]:
        return [part for part in (self._whole, self._inside, self._across) if part is not None]
