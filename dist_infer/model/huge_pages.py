"""Memory of large pages, for what is filled once and read from end to end: small ones cost a fault each, and a tenth of the bandwidth."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable
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


def prefer(tensors: Iterable[Tensor]) -> None:
    """Ask the kernel for large pages below fresh CPU tensors that lie as they do; where it gives none, nothing changes."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    library = ctypes.CDLL(None)
    for tensor in tensors:
        if tensor.device.type == "cpu":
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = tensor.data_ptr() + tensor.nbytes - start
            if length > 0:
                library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
