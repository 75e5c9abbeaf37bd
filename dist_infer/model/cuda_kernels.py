"""What `native` is on CPU, for GPUs: attention of all spans in one call, and compiled elementwise operations. Not yet run on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from dist_infer.model.attention import Attention
from dist_infer.model.attention_plan import SpanTable
from dist_infer.model.cuda_attention import attend_varlen, fits, works
from dist_infer.model.decoder import Decoder
from dist_infer.model.fallback.decoder import FallbackDecoder
from dist_infer.model.native import Kernels
from dist_infer.model.rotary import rotate


class CudaKernels(Kernels):
    """The kernels of `native`, but for its matrix products, as operations of torch.

    Args:
        compiled: Fuse elementwise operations with inductor, which needs triton.
    """

    def __init__(self, compiled: bool) -> None:
        self.can_multiply = False
        made = _compiled if compiled else lambda function: function
        self._norm, self._rotate, self._gate = made(_add_rms_norm), made(_rotate_and_cache), made(_silu_and_multiply)

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """As `Kernels`."""
        return self._norm(x, delta, weight, eps, offset)

    def rotate_and_cache(
        self,
        qkv: Tensor,
        heads: int,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        offset: float,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """As `Kernels`."""
        self._rotate(qkv, heads, cos, sin, q_weight, k_weight, eps, offset, slots, keys, values)

    def paged_attention(
        self,
        q: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: SpanTable,
        groups: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        """As `Kernels`, for equal `groups` and no `softcap`."""
        assert softcap is None, "layers that cap their scores do not fit"
        where = (spans.offsets, spans.contexts, spans.tables, spans.longest, spans.longest_context)
        out.copy_(attend_varlen(q, keys, values, *where, window, scale))

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor:
        """As `Kernels`."""
        return self._gate(gate_up)


def cuda_kernels(
    decoder: Decoder | FallbackDecoder, dtype: torch.dtype, block_size: int, compiled: bool | None = None
) -> CudaKernels | None:
    """The kernels for this rank's layers, or None where torch's attention is not made for them.

    Args:
        decoder: The model; one of transformers' own modules has no layers of ours, and none.
        dtype: Of its weights.
        block_size: Token slots in a KV-cache block.
        compiled: Whether elementwise operations are compiled; default: where triton is.
    """
    if not isinstance(decoder, Decoder):
        return None
    device = decoder.rotary.device
    for attention in decoder.modules():
        if isinstance(attention, Attention):
            groups = attention.groups.diff().tolist()
            if not fits(dtype, attention.head_dim, block_size, groups, attention.softcap):
                return None
            if not works(device, dtype, attention.heads, attention.kv_heads, attention.head_dim, block_size):
                return None
    return CudaKernels(has_triton() if compiled is None else compiled)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for any number of rows; what is built is kept for later processes."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / "dist_infer" / "inductor"))
    return torch.compile(function, dynamic=True)


def _add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float) -> Tensor:
    if delta is not None:
        x.add_(delta)
    return _normalized(x, weight, eps, offset)


def _normalized(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Root-mean-square normalization over the last dim, in float32 inside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)).to(x.dtype)


def _rotate_and_cache(
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    kv_heads, block_size = keys.shape[1], keys.shape[2]
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if q_weight is not None:
        q.copy_(_normalized(q, q_weight, eps, offset))
    if k_weight is not None:
        k.copy_(_normalized(k, k_weight, eps, offset))
    rotate(qkv[:, : heads + kv_heads], cos, sin)
    block, place = slots // block_size, slots % block_size
    keys[block, :, place] = k
    values[block, :, place] = v


def _silu_and_multiply(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
