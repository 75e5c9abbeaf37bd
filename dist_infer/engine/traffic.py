"""What ranks say to each other in a step, and how long it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.cluster import Cluster
from dist_infer.engine.footprint import TensorCut
from dist_infer.engine.runner import FIRST_PART
from dist_infer.engine.step import SpanOfStep, Step
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.summary import SummaryLayout

REMOTE_CONTROL_S = 500e-6  # of a message of the leader's over TCP, by gloo


@dataclass(frozen=True)
class Collective:
    """Calls of one kind that a rank makes in a step.

    Attributes:
        kind: "all_reduce", "all_gather", "broadcast" or "gather".
        axis: "tp", "fsdp", or "control" for all ranks of a replica.
        count: Calls.
        bytes: What the rank brings to each; of an all_gather, what all have after it.
        what: What is said.
    """

    kind: str
    axis: str
    count: int
    bytes: int
    what: str


def collectives(
    held: TensorCut,
    shape: MeshShape,
    dtype: torch.dtype,
    lengths: Sequence[int],
    params: SlotParams,
    targets: bool = False,
    overlap: bool = False,
) -> list[Collective]:
    """The collectives of a step in which every fsdp coordinate runs spans of these `lengths`, each wanting one row of logits.

    Args:
        held: The rank's cut of the model.
        shape: The mesh.
        dtype: Type of what is computed.
        lengths: Tokens of each span of a coordinate.
        params: What rows are sampled with.
        targets: Whether rows are scored instead.
        overlap: Whether steps are planned while the one before is computed: then plan and launch are two messages, unless the ranks
            find out by themselves which tokens are decided.
    """
    config, tokens, made = held.config, sum(lengths), []
    layout = SummaryLayout.for_rows([params], targets)
    settles = layout.settled and not params.needs_tokens
    if shape.tp * shape.fsdp > 1:
        words = _words(tuple(lengths), shape.fsdp, targets)
        made.append(Collective("broadcast", "control", 2 if overlap and not settles else 1, 4 * FIRST_PART, "the step"))
        if words > FIRST_PART:
            made.append(Collective("broadcast", "control", 1, 4 * (words - FIRST_PART), "the rest of it"))
    if shape.tp > 1:
        size = tokens * config.hidden_size * dtype.itemsize
        made.append(Collective("all_reduce", "tp", 1, size, "embeddings"))
        last = len(lengths) * config.hidden_size * dtype.itemsize
        alike = config.layers if last == size else config.layers - 1  # of the last layer only the wanted rows are finished
        made.append(Collective("all_reduce", "tp", 2 * alike, size, "attention and mlp of each layer"))
        if last != size:
            made.append(Collective("all_reduce", "tp", 2, last, "those of the last layer, wanted rows alone"))
        if config.qk_norm == "full":
            made.append(Collective("all_reduce", "tp", config.layers, 2 * tokens * 4, "squares of queries and keys"))
        if overlap and settles and not targets:
            made.append(Collective("all_reduce", "tp", 1, 8 * shape.tp * len(lengths), "the tokens decided"))
    if shape.fsdp > 1:
        blocks = Counter(held.layers)
        blocks[held.root] += 1
        made += [Collective("all_gather", "fsdp", count, size * dtype.itemsize, "weights") for size, count in blocks.items()]
    if shape.tp * shape.fsdp > 1:
        made.append(Collective("gather", "control", 1, 4 * layout.width * len(lengths), "summaries of the rows"))
    return made


def seconds(collective: Collective, shape: MeshShape, cluster: Cluster, ranks_per_node: int) -> float:
    """How long the calls take.

    An all-reduce of n ranks moves 2 (n - 1) / n of its bytes through each rank's link and an all-gather (n - 1) / n (Thakur, Rabenseifner
    and Gropp, 2005); over nodes each is made inside them first, and every rank of a node carries its part across. The latency is
    that of the whole call, as measured.
    """
    if collective.axis == "control":
        remote = shape.fsdp * shape.tp > ranks_per_node
        return collective.count * (REMOTE_CONTROL_S if remote else cluster.control)
    group, stride = (shape.tp, 1) if collective.axis == "tp" else (shape.fsdp, shape.tp)
    inside = max(1, min(group, ranks_per_node // stride))
    nodes = -(-group // inside)
    link, times = (cluster.intra, 2) if collective.kind == "all_reduce" else (cluster.gather, 1)
    near = far = 0.0
    if inside > 1:
        near = link.latency + times * (inside - 1) / inside * collective.bytes / link.bandwidth
    if nodes > 1:
        far = cluster.inter.latency + times * (nodes - 1) / nodes * collective.bytes / inside / cluster.inter.bandwidth
    return collective.count * (near + far)


@cache
def _words(lengths: tuple[int, ...], fsdp: int, targets: bool) -> int:
    """int32 words of the step: its spans, without what admissions add now and then."""
    spans = [SpanOfStep(slot, 0, [0] * length, 1, [0] if targets else []) for slot, length in enumerate(lengths * fsdp)]
    return len(Step(spans=spans).encode())
