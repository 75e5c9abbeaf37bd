"""Which of several communicators sums tensors of a size: the one that was faster when they met."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator

# Bytes of a decode step's row, of 32 rows and of a prefill step's, of a hidden size of 2,048; and how often each is summed:
# a start must not wait long for a slow network. GPUs are soon done, and starting their kernels varies more than that.
SIZES = {4 << 10: 4, 128 << 10: 2, 4 << 20: 1}
ON_GPUS = 10  # times as often


class BySize(Communicator):
    """Sums each tensor through the communicator that is fastest for its size; does everything else through the fastest for small ones.

    Args:
        communicators: One for each of `SIZES`, all of the same group. Tensors between two sizes go with the one they are nearer to.
    """

    def __init__(self, communicators: Sequence[Communicator]) -> None:
        self._communicators, self._first = list(communicators), communicators[0]
        self.rank, self.size = self._first.rank, self._first.size
        self.capturable = all(communicator.capturable for communicator in communicators)
        self._limits = [math.isqrt(small * large) for small, large in pairwise(SIZES)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum through the one for this size."""
        return self._communicators[bisect.bisect_left(self._limits, tensor.nbytes)].all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite with `source`'s."""
        return self._first.broadcast(tensor, source)

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Collect on `target`."""
        return self._first.gather(tensor, target)

    def barrier(self) -> None:
        """Wait for everyone."""
        self._first.barrier()

    def wait_for(self, ready: torch.cuda.Event) -> None:
        """Wait for the GPU."""
        self._first.wait_for(ready)

    def abort(self, error: Exception) -> None:
        """End the calls of all of them."""
        for communicator in self._communicators:
            communicator.abort(error)

    def close(self) -> None:
        """Close all of them."""
        for communicator in self._communicators:
            communicator.close()


def measure(communicator: Communicator, device: torch.device) -> list[float]:
    """Seconds that this rank spends in a sum of each of `SIZES`; all ranks of the group call this."""
    tensors = {size: torch.zeros(size // 2, dtype=torch.bfloat16, device=device) for size in SIZES}
    for tensor in tensors.values():  # connections are made, by NCCL for each way of summing that a size is the first to take
        communicator.all_reduce(tensor)
    often = ON_GPUS if device.type == "cuda" else 1
    return [_seconds(communicator, tensors[size], often * calls) for size, calls in SIZES.items()]


def _seconds(communicator: Communicator, tensor: Tensor, calls: int) -> float:
    """Of one call, in the mean."""
    _sync(tensor.device)
    started = time.perf_counter()
    for _ in range(calls):
        communicator.all_reduce(tensor)
    _sync(tensor.device)
    return (time.perf_counter() - started) / calls


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(figures: Mapping[str, Sequence[Sequence[float]]]) -> tuple[list[str], str]:
    """The best for each of `SIZES`, and a sentence about it.

    Args:
        figures: By name, of each rank what `measure` says. The slowest rank's counts, as all wait for it.
    """
    slowest = {name: [max(of_size) for of_size in zip(*of_ranks, strict=True)] for name, of_ranks in figures.items()}
    best = [min(slowest, key=lambda name: slowest[name][place]) for place in range(len(SIZES))]
    sizes = [f"{size >> 10} KiB" for size in SIZES]
    chosen = best[0] if len(set(best)) == 1 else ", ".join(f"{name} for {size}" for name, size in zip(best, sizes, strict=True))
    times = "; ".join(f"{name} {', '.join(f'{1e6 * seconds:,.0f}' for seconds in of_name)}" for name, of_name in slowest.items())
    return best, f"{chosen} (measured in us for {', '.join(sizes)}: {times})"
