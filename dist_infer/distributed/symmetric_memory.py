"""Sums between GPUs that read each other's memory. Written from torch's sources; not yet run on GPUs.

This rank's tensor is copied into a buffer that all others see; `torch.ops.symm_mem.one_shot_all_reduce_out` waits for theirs, and reads
and adds all of them in rank order, so all ranks get the same bits; bfloat16 is rounded after every rank, as NCCL does. (torch has both
in one kernel, `one_shot_all_reduce_copy_out`; but some threads of a block of it may tell the others that this rank's numbers are there
while the rest of the block is still writing them. Between two kernels nothing is left unwritten.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator, ProcessGroup
from dist_infer.distributed.world import World

SLOT = 1 << 20  # bytes; every rank reads all of every other's, so larger sums are better shared out, as NCCL does
ALIGNMENT = 16  # bytes a thread moves at once


class SymmetricMemory(Communicator):
    """GPUs of one host. What is large or not aligned, and all that is no sum, goes through NCCL.

    A kernel that waits for a rank that is gone cannot be aborted: `wait_for` raises, and the GPU is free again when the process ends.
    """

    capturable = True

    def __init__(self, others: ProcessGroup, buffer: Tensor) -> None:
        """Use `buffer` (uint8, `SLOT` bytes), allocated and met as symmetric memory by all of the group."""
        self.rank, self.size = others.rank, others.size
        self._others, self._buffer, self._name = others, buffer, others.group.group_name

    @classmethod
    def connect(cls, world: World, ranks: tuple[int, ...], others: ProcessGroup) -> SymmetricMemory | str:
        """Make the buffer on all of `ranks`, which must all call this; a reason if any of them cannot."""
        import torch.distributed._symmetric_memory as symmetric_memory

        made: list[Tensor] = []

        def make() -> None:
            made.append(symmetric_memory.empty(SLOT, dtype=torch.uint8, device=world.device))

        def meet() -> None:
            symmetric_memory.rendezvous(made[0], others.group.group_name)

        for act in (make, meet):  # one after the other: whoever has no buffer would be waited for
            wrong = None
            try:
                act()
            except RuntimeError as error:
                wrong = str(error).partition("\n")[0]
            found = world.exchange(f"symmetric memory.{'-'.join(map(str, ranks))}", wrong, ranks)
            refused = next((text for text in found if text is not None), None)
            if refused is not None:
                return f"the GPUs do not reach each other's memory: {refused}"
        return cls(others, made[0])

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in rank order."""
        if self._error:
            raise self._error
        if not fits(tensor):
            return self._others.all_reduce(tensor)
        buffer = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return torch.ops.symm_mem.one_shot_all_reduce_out(buffer, "sum", self._name, tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Through NCCL."""
        return self._others.broadcast(tensor, source)

    def gather(self, tensor: Tensor, target: int = 0) -> list[Tensor] | None:
        """Through NCCL."""
        return self._others.gather(tensor, target)

    def barrier(self) -> None:
        """Through NCCL."""
        self._others.barrier()

    def wait_for(self, ready: torch.cuda.Event) -> None:
        """As for sums through NCCL."""
        self._others.wait_for(ready)

    def abort(self, error: Exception) -> None:
        """Later calls raise `error`, and NCCL's at once."""
        self._error = error
        self._others.abort(error)

    def close(self) -> None:
        """Let go of the buffer."""
        self._buffer = torch.empty(0, dtype=torch.uint8)


def fits(tensor: Tensor) -> bool:
    """Whether the kernel takes `tensor`."""
    start = tensor.storage_offset() * tensor.element_size()
    aligned = tensor.nbytes % ALIGNMENT == start % ALIGNMENT == 0
    return aligned and 0 < tensor.nbytes <= SLOT and tensor.dtype in (torch.float32, torch.bfloat16)
