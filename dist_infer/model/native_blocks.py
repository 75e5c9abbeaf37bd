"""A decoder's blocks in one call of compiled code, which spares a decode step the way through Python between operations.

What is computed is what the modules compute, by the same kernels in the same order: the modules hold the weights and say what
a block is. The structures are laid out as in `native.cpp`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator
from dist_infer.distributed.shared_memory import SLOT, SharedMemory
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
        *((name, _POINTER) for name in ("layers", "reads", "x", "delta", "normed", "qkv", "mixed", "gated", "scratch")),
        *((name, _POINTER) for name in ("slots", "offsets", "contexts", "tables")),
        *((name, _INT) for name in ("tokens", "hidden", "block_size", "spans", "table_width")),
    ]


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
        self._addresses = list(map(_address, self._linears))  # not the packed weights, which may be let go of
        self._layers = (_Layer * len(blocks))(*map(_layer, blocks))
        qkv, output, _, down = _linears(blocks[0])
        self._hidden, self._widths = qkv.inputs, (qkv.outputs, output.inputs, down.inputs)

    def stand_for(self, blocks: Sequence[Block]) -> bool:
        """Whether these are still the blocks, and their packed weights where they were."""
        return self._blocks is blocks and list(map(_address, self._linears)) == self._addresses

    def run(self, x: Tensor, angles: Sequence[tuple[Tensor, Tensor]], cache: KVCache, plan: AttentionPlan) -> Tensor:
        """Compute the first of the blocks, as many as there are `angles`.

        Args:
            x: The residual stream [tokens, hidden], of one token at least; overwritten.
            angles: cos and sin of each block.
            cache: Where keys and values go.
            plan: What attention reads.

        Returns:
            What the last of them has still to add to `x`.
        """
        delta, normed = torch.empty_like(x), torch.empty_like(x)
        qkv, mixed, gated = (x.new_empty(len(x), width) for width in self._widths)
        reads = (_Reads * len(angles))(
            *(
                (keys.data_ptr(), values.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[-1])
                for keys, values, (cos, sin) in zip(cache.keys, cache.values, angles, strict=False)
            )
        )
        buffers = (tensor.data_ptr() for tensor in (x, delta, normed, qkv, mixed, gated, self._kernels.scratch, plan.slots))
        sizes = (len(x), self._hidden, cache.block_size, plan.spans.count, plan.spans.width)
        step = _Step(ctypes.addressof(self._layers), ctypes.addressof(reads), *buffers, *plan.spans.pointers, *sizes)
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


def _address(linear: Linear) -> int | None:
    return linear.packed.address if isinstance(linear.packed, PackedMatrix) else None


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
    packed, bias = linear.packed, linear.bias
    assert isinstance(packed, PackedMatrix)
    return _Matrix(packed.address, None if bias is None else bias.data_ptr(), linear.outputs, linear.inputs, packed.together)
