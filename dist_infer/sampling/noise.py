"""Gumbel noise as a pure function of (seed, sequence, position, token id).

A counter-based generator has no state to keep in step: any rank computes the noise of any token, and a
token is the same whatever the batch, the topology or the order of work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_infer.model.cuda_probe import kernels_start
from dist_infer.model.transfer import to_device
from dist_infer.sampling import compiled

# Weyl increment and finalizer multipliers of the splitmix64 family.
_STEP = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK63 = 2**63 - 1


def row_keys(seeds: Sequence[int], sequences: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Keys of rows of noise, [rows, 2] int64; the second of each is odd."""
    key = np.zeros(len(seeds), np.uint64)
    for part in (seeds, sequences, positions):
        key = _mix(key + np.array(part, np.uint64) + np.uint64(_STEP))
    pair = np.stack([_mix(key + np.uint64(_STEP)), _mix(key ^ np.uint64(_STEP)) | np.uint64(1)], axis=1)
    return pair.view(np.int64)


def gumbel(keys: np.ndarray, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of token ids under each key.

    Args:
        keys: From `row_keys`, [rows, 2].
        ids: int64 token ids, [n] alike for all rows or [rows, n]; the result lies on their device.

    Returns:
        [rows, n] float32. Sixty-three random bits stand behind each number, so that the upper tail is as fine as float32 can say.
    """
    pairs = to_device(keys, ids.device)
    found = compiled.gumbel(pairs, ids) if ids.device.type == "cpu" else None
    if found is not None:
        return found
    shift, factor = pairs.T[..., None]
    # The ids are mixed before the keys meet them (once for all rows), so a row costs one round: multiply, fold, multiply.
    bits = (_mixed(ids) + shift).mul_(factor)
    folded = torch.bitwise_right_shift(bits, 32)
    bits.bitwise_xor_(folded).mul_(_signed(_MIX2)).bitwise_and_(_MASK63)
    # -log(-log(1 - v)) with v uniform: written in v, not 1 - v, because the largest noise comes from the smallest v.
    minus_v = bits.to(torch.float32).mul_(-(2.0**-63)).clamp_(-(1 - 2.0**-24), -(2.0**-64))
    return minus_v.log1p_().neg_().log_().neg_()


def noised(scaled: Tensor, keys: np.ndarray, first_token: int) -> Tensor:
    """`scaled` [rows, n] float32 plus the noise of the n token ids from `first_token` on."""
    if scaled.device.type == "cuda" and kernels_start():
        from dist_infer.sampling.cuda_noise import add_gumbel  # half a second that no start on CPU should cost

        return add_gumbel(scaled.contiguous(), keys, first_token, (_signed(_STEP), _signed(_MIX1), _signed(_MIX2)))
    return gumbel(keys, torch.arange(first_token, first_token + scaled.shape[1], device=scaled.device)).add_(scaled)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def _mixed(ids: Tensor) -> Tensor:
    """Scattered 64-bit numbers, one for each id (int64 arithmetic wraps; its right shift keeps the sign, which costs a bit)."""
    x = (ids + 1) * _signed(_STEP)
    x = (x ^ (x >> 30)) * _signed(_MIX1)
    return x ^ (x >> 27)


def _signed(x: int) -> int:
    """The int64 with the same bits as the uint64 `x`."""
    return x - 2**64 if x >= 2**63 else x
