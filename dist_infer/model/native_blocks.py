"""A decoder's blocks in one call of compiled code, which spares a decode step the way through Python between operations.

What is computed is what the modules compute, by the same kernels in the same order: the modules hold the weights and say what
a block is. The structures are laid out as in `native.cpp`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator
from dist_infer.distributed.shared_memory import SLOT, SharedMemory
from dist_infer.model import huge_pages
from dist_infer.model.attention_plan import AttentionPlan
from dist_infer.model.cache import KVCache
from dist_infer.model.layers import GatedMLP, Linear, RMSNorm
from dist_infer.model.native import Kernels, PackedMatrix

if TYPE_CHECKING:
    from dist_infer.model.decoder import Block

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = [("packed", _POINTER), ("bias", _POINTER), ("outputs", _INT), ("inputs", _INT), ("most", _INT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "groups")),
        *((name, _INT) for name in ("heads", "kv_heads", "head_dim", "window")),
        *((name, _FLOAT) for name in ("attention_eps", "attention_offset", "mlp_eps", "mlp_offset", "head_eps", "head_offset")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
    ]


class _Reads(ctypes.Structure):
    _fields_ = [*((name, _POINTER) for name in ("keys", "values", "cos", "sin")), ("rotated", _INT)]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("layers", "reads", "x", "delta", "normed", "qkv", "mixed", "gated")),
        *((name, _POINTER) for name in ("slots", "offsets", "contexts", "tables")),
        *((name, _INT) for name in ("tokens", "hidden", "block_size", "spans", "table_width")),
    ]


class _Made(NamedTuple):
    """A step as it is told, of so many tokens; and what it adds last to the residual stream, [tokens, hidden]."""

    cache: weakref.ref[KVCache]
    reads: ctypes.Array[_Reads]
    step: _Step
    delta: Tensor


class NativeBlocks:
    """The blocks of a decoder whose weights are packed for our kernels.

    Args:
        blocks: All of them, each of which `fits`.
        tp: What they sum through.
        kernels: What they compute with.
    """

    def __init__(self, blocks: Sequence[Block], tp: Communicator, kernels: Kernels) -> None:
        self._blocks, self._tp, self._kernels = blocks, tp, kernels
        self._linears = [linear for block in blocks for linear in _linears(block)]
        self._packed = [weakref.ref(_packed(linear)) for linear in self._linears]  # which may be let go of
        self._layers = (_Layer * len(blocks))(*map(_layer, blocks))
        qkv, output, _, down = _linears(blocks[0])
        self._hidden, self._widths = qkv.inputs, (qkv.inputs, qkv.inputs, qkv.outputs, output.inputs, down.inputs)
        self._space = torch.empty(0, sum(self._widths), dtype=qkv.weight.dtype)
        self._made: _Made | None = None

    def stand_for(self, blocks: Sequence[Block]) -> bool:
        """Whether these are still the blocks, and their packed weights where they were."""
        if self._blocks is not blocks:
            return False
        packed = [linear.packed for linear in self._linears]
        return None not in packed and packed == [was() for was in self._packed]

    def run(self, x: Tensor, angles: Sequence[tuple[Tensor, Tensor]], cache: KVCache, plan: AttentionPlan) -> Tensor:
        """Compute the first of the blocks, as many as there are `angles`.

        Args:
            x: The residual stream [tokens, hidden], of one token at least; overwritten.
            angles: cos and sin of each block.
            cache: Where keys and values go.
            plan: What attention reads.

        Returns:
            What the last of them has still to add to `x`; overwritten by the next call.
        """
        made = self._made
        if made is None or made.cache() is not cache or made.step.tokens != len(x):
            self._made = made = None  # its memory may be let go of
            self._made = made = self._make(cache, len(x))
        step, delta = made.step, made.delta
        for reads, (cos, sin) in zip(made.reads, angles, strict=False):
            reads.cos, reads.sin, reads.rotated = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        spans = plan.spans
        step.x, step.slots = x.data_ptr(), plan.slots.data_ptr()
        step.offsets, step.contexts, step.tables = spans.pointers
        step.spans, step.table_width = spans.count, spans.width
        tp, half, end = self._tp, 0, 2 * len(angles)
        if isinstance(tp, SharedMemory) and delta.nbytes <= SLOT:
            segment = tp.lend()
            while half < end:
                half = self._kernels.run_halves(step, segment, False, half, end)
                tp.wait_as_lent()
            return delta
        while half < end:
            half = self._kernels.run_halves(step, None, tp.size == 1, half, end)
            tp.all_reduce(delta)
        return delta

    def _make(self, cache: KVCache, tokens: int) -> _Made:
        """What steps of so many tokens have in common."""
        if tokens > len(self._space):
            self._space = torch.empty(0, dtype=self._space.dtype)  # not both at once
            # Kept, and in large pages: wide steps lose time in fresh memory and small ones.
            self._space = huge_pages.zeros((1 << (tokens - 1).bit_length(), sum(self._widths)), self._space.dtype)
        sizes = [tokens * width for width in self._widths]
        buffers = self._space.view(-1)[: sum(sizes)].split(sizes)
        pools = zip(cache.keys, cache.values, strict=True)
        reads = (_Reads * len(cache.keys))(*((keys.data_ptr(), values.data_ptr()) for keys, values in pools))
        step = _Step(layers=ctypes.addressof(self._layers), reads=ctypes.addressof(reads), block_size=cache.block_size)
        step.delta, step.normed, step.qkv, step.mixed, step.gated = (buffer.data_ptr() for buffer in buffers)
        step.tokens, step.hidden = tokens, self._hidden
        return _Made(weakref.ref(cache), reads, step, buffers[0].view(tokens, self._hidden))


def fits(block: Block) -> bool:
    """Whether a block is of the kind that compiled code computes: Llama's, with or without norms of heads and biases of q, k and v."""
    attention, mlp = block.attention, block.mlp
    return (
        isinstance(block.attention_norm, RMSNorm)
        and isinstance(block.mlp_norm, RMSNorm)
        and isinstance(mlp, GatedMLP)
        and mlp.gate_up.gates_itself
        and all(isinstance(linear.packed, PackedMatrix) for linear in _linears(block))
        and block.attention_post_norm is None
        and block.mlp_post_norm is None
        and attention.norm_across is None
        and attention.output.bias is None
        and mlp.down.bias is None
        and not block.parallel
        and block.scale == 1
    )


def _linears(block: Block) -> tuple[Linear, Linear, Linear, Linear]:
    attention, mlp = block.attention, block.mlp
    assert isinstance(mlp, GatedMLP)
    return attention.qkv, attention.output, mlp.gate_up, mlp.down


def _packed(linear: Linear) -> PackedMatrix:
    assert isinstance(linear.packed, PackedMatrix)
    return linear.packed


def _layer(block: Block) -> _Layer:
    attention, q_norm = block.attention, block.attention.q_norm
    norms = [norm for norm in (block.attention_norm, block.mlp_norm) if isinstance(norm, RMSNorm)]
    return _Layer(
        *map(_matrix, _linears(block)),
        *(None if norm is None else norm.weight.data_ptr() for norm in (*norms, q_norm, attention.k_norm)),
        attention.groups.data_ptr(),
        *(attention.heads, attention.kv_heads, attention.head_dim, attention.window or 0),
        *(number for norm in norms for number in (norm.eps, norm.offset)),
        *((q_norm.eps, q_norm.offset) if q_norm is not None else (0.0, 0.0)),
        *(attention.scale, attention.softcap or 0.0),
    )


def _matrix(linear: Linear) -> _Matrix:
    packed, bias = _packed(linear), linear.bias
    return _Matrix(packed.address, None if bias is None else bias.data_ptr(), linear.outputs, linear.inputs, packed.together)
