"""The mixture of experts: a router sends every token to a few of many gated mlps, and perhaps to one that all tokens share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator, SingleRank
from dist_infer.model.config import ExpertsConfig, ModelConfig
from dist_infer.model.layer import Layer
from dist_infer.model.layers import ACTIVATIONS, MLP, GatedMLP, Linear, gated
from dist_infer.model.native import Kernels
from dist_infer.model.packed import PackedProduct, is_in, packed_product
from dist_infer.model.weights import ExpertCut, cut

ALIGNMENT = 16  # bytes between rows that the grouped product wants


class MoE(Layer):
    """The experts of one layer; this rank's cut of them.

    Routing is computed alike on all tp ranks. Each adds up what its experts, or its slice of every expert, and
    its slice of the shared one say; one sum over tp makes the whole.
    """

    def __init__(self, config: ModelConfig, tp: Communicator) -> None:
        super().__init__()
        assert config.experts is not None
        hidden, experts = config.hidden_size, config.experts
        self.tp = tp
        self.router = Router(hidden, experts)
        self.experts = Experts(config, ExpertCut.of(experts, tp.size, tp.rank))
        first, stop = cut(experts.shared_ffn_size, tp.size, tp.rank)
        mlp = GatedMLP if config.gated_mlp else MLP
        # It is summed over tp with the others.
        self.shared = mlp(hidden, stop - first, False, SingleRank(), config.activation) if experts.shared_ffn_size else None
        self.shared_gate = Linear(hidden, 1, bias=False) if experts.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden], the same on every tp rank."""
        if not len(x):
            return torch.empty_like(x)
        mixture = self.experts(x, *self.router(x))
        if self.shared is not None:
            shared = self.shared(x)
            mixture += shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid()
        return self.tp.all_reduce(mixture.to(x.dtype))


class Router(Layer):
    """Chooses the experts of each token and weighs them."""

    def __init__(self, hidden: int, experts: ExpertsConfig) -> None:
        super().__init__()
        self.experts = experts
        self.gate = Linear(hidden, experts.count, bias=False)
        self.score_bias = nn.Parameter(torch.empty(experts.count), requires_grad=False) if experts.score_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> the experts of each token and their float32 weights, both [tokens, chosen]."""
        logits, experts, bias = self.gate(x).float(), self.experts, self.score_bias
        if bias is not None and experts.bias_in_score:
            logits += bias
        scores = logits.sigmoid() if experts.scoring == "sigmoid" else logits.softmax(dim=-1)
        preference = scores if bias is None or experts.bias_in_score else scores + bias
        chosen = preference.topk(experts.chosen, dim=-1).indices
        weights = scores.gather(1, chosen)
        if experts.normalized:
            weights /= weights.sum(dim=-1, keepdim=True)
        return chosen, weights * experts.scale


class Experts(Layer):
    """This rank's experts: mlps like the model's dense ones, without biases.

    Expert after expert is stacked in `gate_up`, each one's gate above its up (the up alone where mlps have no gate), and in `down`.
    """

    kernels: Kernels | None = None

    def __init__(self, config: ModelConfig, held: ExpertCut) -> None:
        super().__init__()
        self.activation, self.gated = config.activation, config.gated_mlp
        self.first, ffn = held.experts[0], held.ffn[1] - held.ffn[0]
        self.count = held.experts[1] - held.experts[0]
        self.gate_up = ExpertLinear(self.count, config.hidden_size, 2 * ffn if self.gated else ffn)
        self.down = ExpertLinear(self.count, ffn, config.hidden_size)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What this rank's experts add to each token.

        Args:
            x: [tokens, hidden].
            chosen: [tokens, chosen] indices of each token's experts among all of the layer.
            weights: [tokens, chosen] float32 factors on what they say.

        Returns:
            [tokens, hidden], float32.
        """
        grouped = x.is_cuda and self.gate_up.can_group() and self.down.can_group()
        return (self.together if grouped else self.by_turns)(x, self.local(chosen), weights)

    def local(self, chosen: Tensor) -> Tensor:
        """[tokens * chosen] indices among this rank's experts; of other ranks' experts one more than the last."""
        local = chosen.flatten() - self.first
        return local.masked_fill_((local < 0) | (local >= self.count), self.count)

    def by_turns(self, x: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        """Expert after expert; those that nobody chose are not touched."""
        mixture = x.new_zeros(x.shape, dtype=torch.float32)
        counts = local.bincount(minlength=self.count + 1).tolist()
        places = local.argsort(stable=True)
        tokens, factors = places // weights.shape[1], weights.flatten()[places, None]
        groups = zip(tokens.split(counts), factors.split(counts), strict=True)
        for expert, (rows, factor) in enumerate(groups):
            if len(rows) and expert < self.count:
                inner = self._activate(self.gate_up.of(expert, x.index_select(0, rows)))
                # No token comes twice to an expert, so every sum has one order.
                mixture.index_add_(0, rows, self.down.of(expert, inner) * factor)
        return mixture

    def together(self, x: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        """All experts in one grouped product, without asking the device how many tokens each has."""
        ordered, places = local.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(self.count, device=x.device), right=True, out_int32=True)
        inner = self._activate(self.gate_up.grouped(x.index_select(0, places // weights.shape[1]), ends))
        # Rows of other ranks' experts lie behind the last end, where nothing is computed.
        outputs = self.down.grouped(inner, ends).masked_fill_((ordered == self.count)[:, None], 0)
        outputs = outputs.index_select(0, places.argsort()).view(*weights.shape, -1)
        return (outputs * weights[..., None]).sum(dim=1)

    def _activate(self, gate_up: Tensor) -> Tensor:
        return gated(gate_up, self.activation, self.kernels) if self.gated else ACTIVATIONS[self.activation](gate_up)


class ExpertLinear(Linear):
    """The same projection of each expert, stacked: `weight` [experts * outputs, inputs]."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, experts * outputs, bias=False)
        self.experts = experts
        self._packs: list[PackedProduct] = []

    def of(self, expert: int, x: Tensor) -> Tensor:
        """The projection of one expert, [rows, inputs] -> [rows, outputs]."""
        if self._packs:
            return self._packs[expert](x, None)
        return F.linear(x, self._matrices()[expert])

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]: expert e projects the rows from `ends[e - 1]` to `ends[e]`; later rows are not computed."""
        return F.grouped_mm(x, self._matrices().transpose(1, 2), offs=ends)

    def can_group(self) -> bool:
        """Whether `grouped` takes this weight."""
        widths = self.inputs, self.outputs // self.experts
        return self.weight.dtype == torch.bfloat16 and not any(width * self.weight.itemsize % ALIGNMENT for width in widths)

    def pack(self, keep_weight: bool) -> None:
        """As `Linear`, each expert's matrix by itself."""
        packs = [packed_product(matrix, self.kernels, not keep_weight) for matrix in self._matrices().detach()]
        self._packs = [pack for pack in packs if pack is not None]
        if self._packs and not keep_weight:
            self._let_go(is_in(self._packs[0], self.weight))  # all are alike

    def unpack(self) -> None:
        """As `Linear`."""
        self._packs = []
        super().unpack()

    def _matrices(self) -> Tensor:
        return self.weight.view(self.experts, -1, self.inputs)
