"""How a module is cut over tp: transformers' tensor parallel plan, on plain local tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.fallback.module import matrix_shape, parent
from dist_infer.model.weights import cut

Ranges = tuple[tuple[int, int], ...]

# Styles that leave a parameter whole on every rank. The output of one that is gathered goes to one that splits it again.
_WHOLE = (
    "replicated_with_grad_allreduce",
    "keep_full_weight",
    "mla_kv_a_proj",
    "replicate",
    "moe_identity_expert",
    "colwise_gather_output",
    "rowwise_split_input",
)
# Except in an mlp whose gate and up are one matrix: its halves can be cut alike.
_HALVES = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"}
_ATTENTION = re.compile(r"attn|attention")


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """Its tensor parallel plan: the style of each module or parameter that is cut, layers by `*`."""
    plan: dict[str, str] = dict(model.tp_plan or {})
    for name, style in list(plan.items()):
        place, _, leaf = name.rpartition(".")
        if style == "colwise_gather_output" and leaf == "gate_up_proj" and plan.get(f"{place}.down_proj") == "rowwise_split_input":
            plan |= {f"{place}.{part}": better for part, better in _HALVES.items()}
    return {name: style for name, style in plan.items() if style not in _WHOLE}


def cuts_heads(model: PreTrainedModel) -> bool:
    """Whether the plan gives each rank heads of its own; else every rank computes the attention of all."""
    return any(_ATTENTION.search(name) and style == "colwise" for name, style in plan_of(model).items())


@dataclass
class Cuts:
    """What a tp rank holds of each parameter that is cut, and which modules' outputs are summed over the ranks.

    Attributes:
        rows: By parameter, its rows (see `matrix_shape`), as ranges in the order in which the rank holds them.
        columns: By parameter, its columns.
        partial: Projections whose inputs are cut.
        summed: Other modules whose outputs are sums over the ranks.
    """

    rows: dict[str, Ranges] = field(default_factory=dict)
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)
    partial: list[str] = field(default_factory=list)
    summed: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, tp: int, rank: int) -> Cuts:
        """The cuts of rank `rank` of `tp`.

        Raises:
            ValueError: The model has no plan, or one that we cannot follow.
        """
        cuts = cls()
        if tp == 1:
            return cuts
        family = model.config.model_type
        plan = plan_of(model)
        refusal = f"parallel.tp={tp}: {family} runs as transformers' own module, and "
        if not any(style == "rowwise" for style in plan.values()):
            raise ValueError(f"{refusal}transformers has no tensor parallel plan for it; use parallel.tp=1, with fsdp or replicas")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding):
            raise ValueError(f"{refusal}its head is not a plain projection; use parallel.tp=1, with fsdp or replicas")
        names = {module: name for name, module in model.named_modules()}
        for module in (head, embedding):
            for leaf, parameter in module.named_parameters(recurse=False):
                cuts.rows[f"{names[module]}.{leaf}"] = (cut(len(parameter), tp, rank),)
        parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
        for module, name in names.items():
            style = plan.get(_wildcards(name))
            if style is None or module in (head, embedding):
                continue
            if style == "moe_tp_experts":
                cuts.summed.append(name)
            elif type(module) is nn.Linear and style in ("colwise", "packed_colwise", "rowwise"):
                cuts._cut(f"{name}.weight", style, parameters[f"{name}.weight"], tp, rank)
                if style == "rowwise":
                    cuts.partial.append(name)
                elif module.bias is not None:
                    cuts._cut(f"{name}.bias", style, parameters[f"{name}.bias"], tp, rank)
            else:
                kind = type(module).__name__
                raise ValueError(f"{refusal}its plan wants {name} ({kind}) {style!r}, which is not supported; use parallel.tp=1")
        for name, shape in parameters.items():
            style = plan.get(_wildcards(name))
            if style in ("colwise", "packed_colwise", "rowwise"):
                cuts._cut(name, style, shape, tp, rank)
            elif style is not None:
                raise ValueError(f"{refusal}its plan wants {name} {style!r}, which is not supported; use parallel.tp=1")
        return cuts

    def _cut(self, name: str, style: str, shape: torch.Size, tp: int, rank: int) -> None:
        """Cut one parameter: the outputs of each matrix of a pack, of each half of a packed one, or the inputs."""
        if style == "rowwise":
            self.columns[name] = cut(shape[-1], tp, rank)
            return
        outputs = shape[-2] if len(shape) > 1 else shape[0]
        parts = outputs // 2 if style == "packed_colwise" else outputs
        first, stop = cut(parts, tp, rank)
        rows = matrix_shape(shape)[0]
        self.rows[name] = tuple((start + first, start + stop) for start in range(0, rows, parts))

    def local_rows(self, name: str, shape: tuple[int, ...]) -> Ranges:
        """Rows that the rank holds of the parameter of matrix shape `shape`."""
        return self.rows.get(name, ((0, shape[0]),))

    def local_columns(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Columns that the rank holds of it."""
        return self.columns.get(name, (0, shape[1]))

    def apply(self, model: PreTrainedModel, tp: Communicator) -> None:
        """Make `model`, on the meta device, this rank's part."""
        if tp.size == 1:
            return
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
        tied = head.weight is embedding.weight
        for name in {**self.rows, **self.columns}:
            module, leaf = parent(model, name)
            shape = list(getattr(module, leaf).shape)
            if name in self.rows:
                dim = max(len(shape) - 2, 0)
                shape[dim] = sum(stop - start for start, stop in self.rows[name]) // math.prod(shape[:dim])
            if name in self.columns:
                shape[-1] = self.columns[name][1] - self.columns[name][0]
            setattr(module, leaf, nn.Parameter(getattr(module, leaf).new_empty(shape), requires_grad=False))
            if type(module) is nn.Linear and leaf == "weight":
                module.out_features, module.in_features = shape
        if tied:
            head.weight = embedding.weight
        for name in self.partial:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            _sum_products(module, tp)
        for name in self.summed:
            model.get_submodule(name).register_forward_hook(lambda _, inputs, output: tp.all_reduce(output.contiguous()))
        _look_up_own_rows(embedding, cut(model.config.get_text_config().vocab_size, tp.size, tp.rank), tp)


def _wildcards(name: str) -> str:
    """A module's name as plans have it: layers by `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _sum_products(module: nn.Linear, tp: Communicator) -> None:
    """Sum the partial products of a projection whose inputs are cut, then add its whole bias once."""

    def forward(input: Tensor) -> Tensor:
        y = tp.all_reduce(F.linear(input, module.weight))
        return y if module.bias is None else y + module.bias

    module.forward = forward


def _look_up_own_rows(embedding: nn.Embedding, vocabulary: tuple[int, int], tp: Communicator) -> None:
    """Let an embedding of the tokens in `vocabulary` give every token's, summed over the ranks."""
    first, stop = vocabulary
    embedding.padding_idx = None  # it matters to gradients alone
    look_up = embedding.forward

    def forward(input: Tensor) -> Tensor:
        foreign = (input < first) | (input >= stop)
        found = look_up((input - first).masked_fill(foreign, 0))
        return tp.all_reduce(found.masked_fill(foreign[..., None], 0))

    embedding.forward = forward
