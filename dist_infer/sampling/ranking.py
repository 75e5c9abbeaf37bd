"""The order of tokens: the greater value first, among equals the lower id."""

from __future__ import annotations

import torch
from torch import Tensor


def best(values: Tensor) -> tuple[Tensor, Tensor]:
    """Value and index of the first token of each row of `values` [rows, n]; NaN wins, so that it is seen."""
    value, index = values.max(dim=1)
    return value, index


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the first k tokens of each row of `values` [rows, n] float32, in order.

    `torch.topk` picks any of equals, and bf16 models make many: here value and index make one integer key, so no two are equal.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the order of floats as the order of integers
    last = values.shape[1] - 1
    keys = bits.to(torch.int64) << 32
    keys |= last - torch.arange(values.shape[1], device=values.device)
    index = last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, index), index
