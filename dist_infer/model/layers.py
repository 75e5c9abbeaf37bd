"""The decoder's layers, cut over the tp axis. All tensors are plain local ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.native import Kernels


class Linear(nn.Module):
    """A projection of this rank's slice: `weight` [outputs, inputs], optional `bias` [outputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weight, plus `bias`."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return F.linear(x, self.weight, bias)

    def pack(self, keep_weight: bool) -> None:
        """Reorder the weight once into the layout the CPU's matrix units want, and let go of the plain one.

        Args:
            keep_weight: Something else reads the plain weight (a tied embedding does).
        """
        if not can_pack(self.weight):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        if not keep_weight:
            self.weight = nn.Parameter(torch.empty(0, self.inputs, dtype=self.weight.dtype), requires_grad=False)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a faster layout for this weight: 16-bit types that this CPU multiplies, where the operators exist."""
    mkldnn = torch.ops.mkldnn
    if weight.device.type != "cpu" or not hasattr(mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported()


class RowParallelLinear(Linear):
    """A projection whose inputs are cut over tp: partial products are summed, then the whole bias is added once."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tp: Communicator) -> None:
        super().__init__(inputs, outputs, bias)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, inputs of this rank] -> [tokens, outputs], the same on every tp rank."""
        y = self.product(x, None)
        if len(y):
            self.tp.all_reduce(y)
        return y if self.bias is None else y + self.bias


class VocabularyParallelEmbedding(nn.Module):
    """Token embeddings whose rows are cut over tp: `weight` [vocabulary of this rank, hidden]."""

    def __init__(self, vocabulary: tuple[int, int], hidden: int, tp: Communicator) -> None:
        super().__init__()
        self.first, stop = vocabulary
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(stop - self.first, hidden), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        if self.tp.size == 1 or not len(tokens):
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        foreign = (local < 0) | (local >= len(self.weight))
        hidden = F.embedding(local.masked_fill(foreign, 0), self.weight)
        hidden[foreign] = 0
        self.tp.all_reduce(hidden)
        return hidden


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dim."""

    kernels: Kernels | None = None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta` to the residual stream `x` [tokens, size] in place, and normalize the sum."""
        if self.kernels is not None:
            return self.kernels.add_rms_norm(x, delta, self.weight, self.eps)
        return self(x if delta is None else x.add_(delta))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, stacked."""

    kernels: Kernels | None = None

    def __init__(self, hidden: int, ffn: int, bias: bool, tp: Communicator) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * ffn, bias)
        self.down = RowParallelLinear(ffn, hidden, bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        gate_up = self.gate_up(x)
        if self.kernels is not None:
            return self.down(self.kernels.silu_and_multiply(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))
