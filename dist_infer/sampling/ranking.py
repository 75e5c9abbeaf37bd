"""The order of tokens: the greater value first, among equals the lower id."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_infer.sampling import compiled


def best(values: Tensor) -> tuple[Tensor, Tensor]:
    """Value and index of the first token of each row of `values` [rows, n]; NaN wins, so that it is seen."""
    if values.device.type == "cpu" and values.is_contiguous() and values.dtype == torch.float32:
        found = compiled.best(values, with_sums=False)
        if found is not None:
            return found[0], found[1]
    value, index = values.max(dim=1)
    return value, index


def log_sum(values: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of `values` [rows, n], finite even where all are -inf, and the sum of exp(value - greatest), both [rows]."""
    least = torch.finfo(values.dtype).min
    if values.device.type == "cpu" and values.is_contiguous() and values.dtype == torch.float32:
        found = compiled.best(values, with_sums=True)
        if found is not None and found[2] is not None:
            return found[0].clamp_min(least), found[2]
    greatest = values.amax(dim=1).clamp_min(least)
    return greatest, (values - greatest[:, None]).exp_().sum(dim=1)


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the first k tokens of each row of `values` [rows, n] float32, in order.

    `torch.topk` picks any of equals, and bf16 models make many: here value and index make one integer key, so no two are equal.
    """
    if values.device.type == "cpu":
        found = compiled.best_few(values.contiguous(), k)
        if found is not None:
            return found
    index = _index(_keys(values).topk(k, dim=1).values, values.shape[1])
    return values.gather(1, index), index


def in_order(values: Tensor) -> Tensor:
    """Indices of all of `values` [n] float32 on the CPU, as `top` orders them; sorted as integers, which takes less than `argsort`."""
    keys = np.sort(_keys(values[None])[0].numpy())[::-1]
    return _index(torch.from_numpy(keys.copy()), len(values))


def _keys(values: Tensor) -> Tensor:
    """An int64 of each of `values` [rows, n], no two of a row equal: the greater comes first."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the order of floats as the order of integers
    keys = bits.to(torch.int64) << 32
    keys |= values.shape[1] - 1 - torch.arange(values.shape[1], device=values.device)
    return keys


def _index(keys: Tensor, count: int) -> Tensor:
    """Which of `count` values the keys are of."""
    return count - 1 - (keys & 0xFFFFFFFF)
