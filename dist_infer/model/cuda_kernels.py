"""What `native` is on CPU, for GPUs, in Triton: attention of all spans in one call, and elementwise operations in one pass each."""

# A launch takes other arguments than the kernel it names says.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import max_shared_mem

from dist_infer.model.attention_plan import SpanTable
from dist_infer.model.cuda_attention import attend
from dist_infer.model.native import Kernels

CHUNK = 1024  # elements of a program that goes through rows piece by piece
MOST_STAGES = 3
AMPLE = 128 << 10  # bytes of shared memory that three stages of attention fit in with certainty; the GPUs of desktops have 99 KB


@triton.jit
def _add_rms_norm(x, delta, weight, out, size, eps, offset, has_delta: tl.constexpr, padded: tl.constexpr):
    """One row: add, and normalize in float32."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    there = columns < size
    at = row * size + columns
    value = tl.load(x + at, mask=there, other=0.0)
    if has_delta:
        value = (value.to(tl.float32) + tl.load(delta + at, mask=there, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, value, mask=there)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    scaled = wide * factor * (tl.load(weight + columns, mask=there, other=0.0).to(tl.float32) + offset)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=there)


@triton.jit
def _normal_factor(x, eps, head_dim: tl.constexpr, padded_dim: tl.constexpr):
    """What the elements of a head are multiplied by."""
    columns = tl.arange(0, padded_dim)
    wide = tl.load(x + columns, mask=columns < head_dim, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 0) / head_dim + eps)


@triton.jit
def _element(x, weight, columns, mask, factor, offset, normalized: tl.constexpr):
    """Elements of a head, normalized and rounded, as float32."""
    raw = tl.load(x + columns, mask=mask, other=0.0)
    if normalized:
        scaled = raw.to(tl.float32) * factor * (tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset)
        raw = scaled.to(x.dtype.element_ty)
    return raw.to(tl.float32)


@triton.jit
def _rotate_and_cache(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    slots,
    keys,
    values,
    heads,
    kv_heads,
    eps,
    offset,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    padded_half: tl.constexpr,
    norms: tl.constexpr,
):
    """One head of one token. Both halves of a pair are read by the thread that writes them, so queries may be overwritten."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = qkv + (token * (heads + 2 * kv_heads) + head) * head_dim
    columns = tl.arange(0, padded_dim)
    slot = tl.load(slots + token)
    kv_head = (head - heads) % kv_heads
    place = ((slot // block_size * kv_heads + kv_head) * block_size + slot % block_size) * head_dim
    if head >= heads + kv_heads:
        tl.store(values + place + columns, tl.load(x + columns, mask=columns < head_dim, other=0.0), mask=columns < head_dim)
    else:
        target = x
        weight = q_weight
        if head >= heads:
            target = keys + place
            weight = k_weight
        factor = 1.0
        if norms:
            factor = _normal_factor(x, eps, head_dim, padded_dim)
        half: tl.constexpr = rotary_dim // 2
        if half > 0:
            pair = tl.arange(0, padded_half)
            there = pair < half
            left = _element(x, weight, pair, there, factor, offset, norms)
            right = _element(x, weight, pair + half, there, factor, offset, norms)
            at = token * rotary_dim + pair
            left_cos, right_cos = tl.load(cos + at, mask=there), tl.load(cos + at + half, mask=there)
            left_sin, right_sin = tl.load(sin + at, mask=there), tl.load(sin + at + half, mask=there)  # the left ones are negative
            turned_left = left * left_cos.to(tl.float32) + right * left_sin.to(tl.float32)
            turned_right = right * right_cos.to(tl.float32) + left * right_sin.to(tl.float32)
            tl.store(target + pair, turned_left.to(qkv.dtype.element_ty), mask=there)
            tl.store(target + pair + half, turned_right.to(qkv.dtype.element_ty), mask=there)
        if rotary_dim < head_dim:
            rest = (columns >= rotary_dim) & (columns < head_dim)
            kept = _element(x, weight, columns, rest, factor, offset, norms)
            tl.store(target + columns, kept.to(qkv.dtype.element_ty), mask=rest)


@triton.jit
def _silu_and_multiply(gate_up, out, size, chunk: tl.constexpr):
    """A piece of one row."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * chunk + tl.arange(0, chunk)
    there = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * size + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=there)


class CudaKernels(Kernels):
    """The kernels of `native`, but for its matrix products: cuBLAS has those.

    Attributes:
        processors: Of the GPU: how many programs run at a time, about.
        stages: Tiles of attention that are on their way to a program at a time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.can_multiply = False
        self.processors, self.stages = 1, MOST_STAGES
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count
            index = torch.cuda.current_device() if device.index is None else device.index
            self.stages = MOST_STAGES if max_shared_mem(index) >= AMPLE else MOST_STAGES - 1
        self._largest_groups: dict[Tensor, int] = {}  # of each layer's `groups`, so that the GPU is asked once

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """As `Kernels`."""
        out = torch.empty_like(x)
        rows, size = x.shape
        padded = triton.next_power_of_2(size)
        pointers = (x, x if delta is None else delta, weight, out)
        if rows:
            _add_rms_norm[rows,](*pointers, size, eps, offset, has_delta=delta is not None, padded=padded, num_warps=_warps(padded))
        return out

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
        """As `Kernels`; both norms, or none."""
        tokens, all_heads, head_dim = qkv.shape
        kv_heads, block_size = keys.shape[1], keys.shape[2]
        rotary_dim, norms = cos.shape[-1], q_weight is not None
        tensors = (qkv, cos, sin, q_weight if norms else qkv, k_weight if norms else qkv, slots, keys, values)
        sizes = {"block_size": block_size, "head_dim": head_dim, "padded_dim": triton.next_power_of_2(head_dim)}
        sizes |= {"rotary_dim": rotary_dim, "padded_half": triton.next_power_of_2(max(rotary_dim // 2, 1)), "norms": norms}
        _rotate_and_cache[tokens, all_heads](*tensors, heads, kv_heads, eps, offset, **sizes, num_warps=1)

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
        """As `Kernels`."""
        if groups not in self._largest_groups:
            self._largest_groups[groups] = int(groups.diff().max())
        attend(q, out, keys, values, spans, groups, self._largest_groups[groups], window, scale, softcap, self.processors, self.stages)

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor:
        """As `Kernels`."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        if rows:
            _silu_and_multiply[rows, triton.cdiv(size, CHUNK)](gate_up, out, size, chunk=CHUNK)
        return out


def _warps(elements: int) -> int:
    """Warps of a program whose row has so many elements."""
    return min(max(elements // 512, 1), 16)
