"""Gumbel noise added to logits on GPUs, in one pass; the numbers are those of `noise`, but for roundings."""

# A launch takes other arguments than the kernel it names says.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_infer.model.transfer import to_device

CHUNK = 1024  # tokens of a program


@triton.jit
def _add_gumbel(scaled, keys, out, first_token, size, step: tl.constexpr, mix1: tl.constexpr, mix2: tl.constexpr, chunk: tl.constexpr):
    """A piece of one row; see `noise` for the generator."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * chunk + tl.arange(0, chunk)
    there = columns < size
    x = (columns.to(tl.int64) + first_token + 1) * step
    x = (x ^ (x >> 30)) * mix1
    x = x ^ (x >> 27)
    bits = (x + tl.load(keys + row * 2)) * tl.load(keys + row * 2 + 1)
    bits = ((bits ^ (bits >> 32)) * mix2) & 0x7FFFFFFFFFFFFFFF
    v = tl.minimum(tl.maximum(bits.to(tl.float32) * 1.0842021724855044e-19, 5.421010862427522e-20), 0.99999994)
    # -log(1 - v): GPUs' logarithm has an absolute error, which near 1 is too much, so small v go by the series.
    series = v * (1 + v * (0.5 + v * (1 / 3 + v * (0.25 + v * (0.2 + v * (1 / 6 + v * (1 / 7)))))))
    exponential = tl.where(v < 0.05, series, -tl.log(1 - v))
    noised = tl.load(scaled + row * size + columns, mask=there) - tl.log(exponential)
    tl.store(out + row * size + columns, noised, mask=there)


def add_gumbel(scaled: Tensor, keys: np.ndarray, first_token: int, multipliers: tuple[int, int, int]) -> Tensor:
    """`scaled` [rows, n] float32, contiguous, plus the noise of tokens `first_token`... under `keys` [rows, 2].

    Args:
        scaled: Logits.
        keys: From `row_keys`.
        first_token: Token id of the first column.
        multipliers: The generator's, as int64.
    """
    rows, size = scaled.shape
    out = torch.empty_like(scaled)
    where = (to_device(keys, scaled.device), out, first_token, size)
    _add_gumbel[rows, triton.cdiv(size, CHUNK)](scaled, *where, *multipliers, chunk=CHUNK)
    return out
