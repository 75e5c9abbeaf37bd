"""Memory of large pages, for what every step reads from end to end: looking up small ones costs a tenth of the bandwidth."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor, nn

PAGE = 2 << 20  # bytes of a large page on x86-64


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros; memory is taken as it is written, in large pages where the system has them to give."""
    size = math.prod(shape) * dtype.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    return torch.frombuffer(memory, dtype=dtype, offset=start, count=math.prod(shape)).view(shape)


def use(module: nn.Module) -> None:
    """Give the larger parameters of a module on the CPU, which is still to be filled, such memory."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.nbytes >= PAGE:
                setattr(owner, name, nn.Parameter(zeros(tuple(parameter.shape), parameter.dtype), requires_grad=False))
