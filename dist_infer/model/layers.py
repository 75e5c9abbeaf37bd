"""The decoder's layers, cut over the tp axis. All tensors are plain local ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.config import ModelConfig
from dist_infer.model.layer import Layer
from dist_infer.model.native import Kernels
from dist_infer.model.packed import PackedProduct, is_in, packed_gated_product, packed_product

# By their names in ModelConfig.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Linear(Layer):
    """A projection of this rank's slice: `weight` [outputs, inputs], optional `bias` [outputs].

    Attributes:
        packed: The product with the packed weight, once there is one.
    """

    kernels: Kernels | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.packed: PackedProduct | None = None
        self._room: Tensor | None = None  # of the plain weight, where the packed one lies

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weight, plus `bias`."""
        if self.packed is not None:
            return self.packed(x, bias)
        return F.linear(x, self.weight, bias)

    def pack(self, keep_weight: bool) -> None:
        """Reorder the weight once into the layout the CPU multiplies fastest, where there is one, and let go of the plain one.

        Args:
            keep_weight: Something else reads the plain weight (a tied embedding does).
        """
        self._use(packed_product(self.weight.detach(), self.kernels, not keep_weight), keep_weight)

    def _use(self, product: PackedProduct | None, keep_weight: bool) -> None:
        self.packed = product
        if product is not None and not keep_weight:
            self._let_go(is_in(product, self.weight))

    def _let_go(self, in_place: bool) -> None:
        """There is no plain weight any more; `in_place`: its memory is in use."""
        self._room = self.weight.detach() if in_place else None
        self.weight = nn.Parameter(torch.empty(0, self.inputs, dtype=self.weight.dtype), requires_grad=False)

    def unpack(self) -> None:
        """Let go of the packed weight, and make room for a plain one to be filled."""
        self.packed = None
        if not len(self.weight):
            room = torch.empty(self.outputs, self.inputs, dtype=self.weight.dtype) if self._room is None else self._room
            self.weight, self._room = nn.Parameter(room, requires_grad=False), None


class GatedLinear(Linear):
    """A projection to a gate and to what it gates, stacked: `weight` [2 * outputs, inputs]; the product of activated gate and the other.

    Attributes:
        gates_itself: Whether the packed product does.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str) -> None:
        super().__init__(inputs, 2 * outputs, bias)
        self.activation = activation
        self.gates_itself = False

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        gate_up = self.product(x, self.bias)
        return gate_up if self.gates_itself else gated(gate_up, self.activation, self.kernels)

    def pack(self, keep_weight: bool) -> None:
        """As `Linear`; with the gate in the same pass where there is such a product."""
        product = packed_gated_product(self.weight.detach(), self.kernels, not keep_weight) if self.activation == "silu" else None
        self.gates_itself = product is not None
        if product is None:
            super().pack(keep_weight)
        else:
            self._use(product, keep_weight)

    def unpack(self) -> None:
        """As `Linear`."""
        self.gates_itself = False
        super().unpack()


def gated(gate_up: Tensor, activation: str, kernels: Kernels | None) -> Tensor:
    """activation(gate) * up, [tokens, 2 * size] -> [tokens, size]; may overwrite `gate_up`."""
    if kernels is not None and activation == "silu":
        return kernels.silu_and_multiply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


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


class VocabularyParallelEmbedding(Layer):
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
        hidden.masked_fill_(foreign[:, None], 0)
        self.tp.all_reduce(hidden)
        return hidden


class PositionEmbedding(Layer):
    """Embeddings of positions, whole on every tp rank: `weight` [positions, hidden]."""

    def __init__(self, positions: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(positions, hidden), requires_grad=False)

    def forward(self, positions: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden]."""
        return F.embedding(positions, self.weight)


class RMSNorm(Layer):
    """Root-mean-square normalization over the last dim; what is stored of the weight is it less `offset`."""

    kernels: Kernels | None = None

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if self.offset:  # a weight near 1 has more digits in float32 than as it is stored
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + self.offset, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta` to the residual stream `x` [tokens, size] in place, and normalize the sum."""
        if self.kernels is not None:
            return self.kernels.add_rms_norm(x, delta, self.weight, self.eps, self.offset)
        return self(x if delta is None else x.add_(delta))


class LayerNorm(Layer):
    """Normalization over the last dim to mean `bias` and deviation `weight`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def after(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """As `RMSNorm.after`."""
        return self(x if delta is None else x.add_(delta))


class Unnormalized(Layer):
    """Where other models have a norm."""

    def after(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """Add `delta` to the residual stream `x` in place; the sum itself."""
        return x if delta is None else x.add_(delta)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The model's norm, over the hidden size."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)); gate and up are one matrix, stacked."""

    def __init__(self, hidden: int, ffn: int, bias: bool, tp: Communicator, activation: str = "silu") -> None:
        super().__init__()
        self.gate_up = GatedLinear(hidden, ffn, bias, activation)
        self.down = RowParallelLinear(ffn, hidden, bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(self.gate_up(x))


class MLP(Layer):
    """down(activation(up(x)))."""

    def __init__(self, hidden: int, ffn: int, bias: bool, tp: Communicator, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(hidden, ffn, bias)
        self.down = RowParallelLinear(ffn, hidden, bias, tp)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
