"""Copies to the device that computes, which nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 16  # bytes at which each of several arrays starts


def to_device(values: Tensor | np.ndarray | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the CPU on `device`; what a CUDA device does meanwhile is not waited for, as it is with memory that is not pinned."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Each of `arrays` on `device`, by one copy."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNED) * _ALIGNED
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    bytes_of = packed.numpy()
    for array, start in zip(arrays, starts, strict=True):
        bytes_of[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    types = (torch.from_numpy(array[:0]).dtype for array in arrays)
    parts = zip(arrays, starts, types, strict=True)
    return [there[start : start + array.nbytes].view(dtype).view(array.shape) for array, start, dtype in parts]
