"""How long a step takes, part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.cluster import Cluster
from dist_infer.engine.footprint import TensorCut
from dist_infer.engine.traffic import Collective, seconds

# Of the leader's Python in a step, and for each of its sequences: schedule, decision, stop rule (the engine's own `leader_seconds`).
LEADER_S, SEQUENCE_S = 150e-6, 12e-6


@dataclass(frozen=True)
class Spans:
    """Some spans of a step that are alike.

    Attributes:
        count: How many.
        length: Tokens of each.
        context: Tokens of its sequence once it is in the cache.
    """

    count: int
    length: int
    context: int

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.count * self.length

    def read(self, window: int | None) -> int:
        """Tokens whose keys and values are read."""
        return self.count * (self.context if window is None else min(self.context, window + self.length - 1))

    def scores(self, window: int | None) -> int:
        """Pairs of a query and a key it sees."""
        first, last = self.context - self.length + 1, self.context
        if window is None or window >= last:
            return self.count * (first + last) * self.length // 2
        growing = max(0, window - first)
        return self.count * ((first + window - 1) * growing // 2 + window * (self.length - growing))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on its slowest rank.

    Attributes:
        products: Projections, experts and head.
        attention: Reading the KV cache, or scores of long spans.
        reductions: All-reduces over tp.
        gathers: What of fsdp's gathers is not hidden behind computing.
        host: Least time of layers, the leader's Python, the step sent and its answer gathered.
        arithmetic: Whether the projections wait for arithmetic, not for memory.
    """

    products: float
    attention: float
    reductions: float
    gathers: float
    host: float
    arithmetic: bool

    @property
    def total(self) -> float:
        """All of it."""
        return self.products + self.attention + self.reductions + self.gathers + self.host

    @classmethod
    def of(
        cls,
        held: TensorCut,
        shape: MeshShape,
        dtype: torch.dtype,
        cluster: Cluster,
        ranks_per_node: int,
        spans: Sequence[Spans],
        traffic: Sequence[Collective],
        overlap: bool = False,
    ) -> StepTime:
        """The time of a step in which every fsdp coordinate runs `spans`.

        Args:
            held: The rank's cut of the model.
            shape: The mesh.
            dtype: Type of weights and KV cache.
            cluster: Where it runs.
            ranks_per_node: Ranks of a machine.
            spans: What a coordinate computes; each span wants one row of logits.
            traffic: The step's collectives.
            overlap: Whether the leader plans while the ranks compute.
        """
        share = cluster.devices / ranks_per_node  # of a machine's devices that a rank has
        tokens, rows = sum(part.tokens for part in spans), sum(part.count for part in spans)
        rates = cluster.products if shape.fsdp == 1 else cluster.gathered_products
        products = rates.seconds(held.dense * dtype.itemsize, 2 * tokens * held.dense)
        products += rates.seconds(held.head * dtype.itemsize, 2 * rows * held.head)
        experts = held.config.experts
        if experts is not None:
            chosen = experts.chosen / experts.count
            touched = 1 - (1 - chosen) ** tokens  # as when tokens choose independently and evenly
            products += rates.seconds(touched * held.experts * dtype.itemsize, 2 * tokens * chosen * held.experts)
        products += _activations(held, tokens) * dtype.itemsize / rates.bandwidth
        attention = 0.0
        for window, layers in Counter(held.config.window(layer) for layer in range(held.config.layers)).items():
            size = sum(part.read(window) for part in spans) * 2 * held.kv_heads * held.config.head_dim * dtype.itemsize
            operations = sum(part.scores(window) for part in spans) * 4 * held.heads * held.config.head_dim
            attention += layers * cluster.attention.seconds(size, operations)
        products, attention = products / share, attention / share
        times = {"tp": 0.0, "fsdp": 0.0, "control": 0.0}
        for collective in traffic:
            times[collective.axis] += seconds(collective, shape, cluster, ranks_per_node)
        gathers = max(0.0, times["fsdp"] - products - attention) if cluster.overlaps else times["fsdp"]
        leader = LEADER_S + rows * shape.fsdp * SEQUENCE_S
        if overlap:
            leader = max(0.0, leader - products - attention - times["tp"] - gathers)
        host = held.config.layers * cluster.layer_s + cluster.step_s + leader + times["control"]
        arithmetic = 2 * tokens / rates.flops > dtype.itemsize / rates.bandwidth
        return cls(products, attention, times["tp"], gathers, host, arithmetic)


def _activations(held: TensorCut, tokens: int) -> int:
    """Elements that norms, rotation, activation and residuals read and write beside the products, in all layers."""
    config = held.config
    qkv = (held.heads + 2 * held.kv_heads) * config.head_dim
    return tokens * config.layers * (8 * config.hidden_size + 2 * qkv + (3 if config.gated_mlp else 2) * held.ffn)
