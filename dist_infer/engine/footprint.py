"""What a rank holds in memory, part by part."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from dist_infer.config.engine import EngineOptions
from dist_infer.distributed.mesh import MeshShape
from dist_infer.distributed.shared_memory import segment_size
from dist_infer.engine.cluster import Cluster
from dist_infer.engine.memory import KVPlan
from dist_infer.model.config import ModelConfig
from dist_infer.model.decoder import LOGIT_ROWS
from dist_infer.model.weights import HeadCut, Weight, cut, describe, fsdp_rows

_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\.")
_EXPERTS = re.compile(r"\.experts\.")
_TABLES = re.compile(r"(?:^|\.)(?:embedding|positions|embed_tokens|embed_positions|wte|wpe)\.weight$")


@dataclass(frozen=True)
class TensorCut:
    """The weights of one tp rank, of those the one that holds most.

    Attributes:
        config: The model.
        tp: Ranks they are cut over.
        weights: Its local buffers, as `describe` gives them.
        heads: Query heads of the rank.
        kv_heads: KV heads it holds; more than its even share where tp exceeds or does not divide them.
    """

    config: ModelConfig
    tp: int
    weights: tuple[Weight, ...]
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: ModelConfig, tp: int) -> TensorCut:
        """The fullest rank: the first has most heads, ffn and vocabulary, but another may touch one KV head more.

        Raises:
            ValueError: The model cannot be cut so.
        """
        cuts = [HeadCut.of(config, tp, rank) for rank in range(tp)]
        touched = [head_cut.kv_heads[1] - head_cut.kv_heads[0] for head_cut in cuts]
        ranks = {0, touched.index(max(touched))}
        weights = max((tuple(describe(config, tp, rank)) for rank in ranks), key=lambda held: sum(weight.elements for weight in held))
        return cls(config, tp, weights, cuts[0].heads[1] - cuts[0].heads[0], max(touched))

    def held(self, fsdp: int) -> int:
        """Elements of fsdp coordinate 0, which has as many as any."""
        return sum(fsdp_rows(weight.shape[0], fsdp, 0)[1] * math.prod(weight.shape[1:]) for weight in self.weights)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Elements of each layer, experts and all; what fsdp gathers together."""
        sizes = [0] * self.config.layers
        for layer, weight in self._of_layers():
            sizes[layer] += weight.elements
        return tuple(sizes)

    @cached_property
    def dense(self) -> int:
        """Elements of all layers that every token is multiplied with: all but those of experts."""
        return sum(weight.elements for _, weight in self._of_layers() if not _EXPERTS.search(weight.parameter))

    @cached_property
    def experts(self) -> int:
        """Elements of all layers' experts, the shared ones aside."""
        return sum(self.layers) - self.dense

    @cached_property
    def root(self) -> int:
        """Elements outside of layers: embedding, last norm and head."""
        return sum(weight.elements for weight in self.weights) - sum(self.layers)

    @property
    def head(self) -> int:
        """Elements that a row of logits is multiplied with, tied or not."""
        first, stop = cut(self.config.vocab_size, self.tp, 0)
        return (stop - first) * self.config.hidden_size

    @property
    def ffn(self) -> int:
        """Width of what a token's mlp computes at most."""
        experts = self.config.experts
        dense = -(-self.config.ffn_size // self.tp)
        return dense if experts is None else max(dense, -(-(experts.chosen * experts.ffn_size + experts.shared_ffn_size) // self.tp))

    def _of_layers(self) -> Iterator[tuple[int, Weight]]:
        for weight in self.weights:
            found = _LAYER.search(weight.parameter)
            if found is not None:
                yield int(found[1]), weight


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank, part by part.

    Attributes:
        weights: Its part of the model.
        copies: What is kept twice: a tied embedding beside the packed head, on a CPU.
        gathered: Blocks that fsdp has gathered: the root through the whole step, a layer, and the next one on its way.
        activations: The largest step's: residual stream, branches, queries, keys, values, and the mlp's inside.
        logits: A slice of the wanted rows, as computed and in float32, before and after processing.
        buffers: Segments of shared memory for collectives; those of GPUs are part of what is reserved.
        kv: The KV cache; None where the memory does not hold one.
        missing: Bytes that the device lacks; 0 when all fits.
        why: What does not fit.
    """

    weights: int
    copies: int
    gathered: int
    activations: int
    logits: int
    buffers: int
    kv: KVPlan | None
    missing: int = 0
    why: str = ""

    @property
    def kv_bytes(self) -> int:
        """Of the KV cache."""
        return 0 if self.kv is None else self.kv.blocks * self.kv.block_bytes

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Every part by name."""
        names = ("weights", "copies", "gathered", "activations", "logits", "buffers")
        return {**{name: getattr(self, name) for name in names}, "KV cache": self.kv_bytes}

    def tokens(self, options: EngineOptions, fsdp: int) -> int:
        """Tokens the KV caches of a replica hold."""
        return 0 if self.kv is None else (self.kv.blocks - 1) * options.block_size * fsdp

    @classmethod
    def of(
        cls,
        held: TensorCut,
        shape: MeshShape,
        dtype: torch.dtype,
        options: EngineOptions,
        cluster: Cluster,
        memory: int,
        max_model_len: int,
        longest: int,
    ) -> Footprint:
        """What a rank of the mesh holds.

        Args:
            held: Its cut over tp.
            shape: The mesh.
            dtype: Type of weights and KV cache.
            options: The engine's limits.
            cluster: Where it runs.
            memory: Bytes the rank may take.
            max_model_len: Longest sequence the user wants.
            longest: Tokens of the longest sequence of the workload, which must fit.
        """
        config, size = held.config, dtype.itemsize
        packs = cluster.kind == "cpu" and options.pack_weights and shape.fsdp == 1
        weights = size * held.held(shape.fsdp)
        copies = size * held.head if packs and config.tied_head else 0
        gathered = size * (held.root + sum(sorted(held.layers)[-2:])) if shape.fsdp > 1 else 0
        inside = max((held.heads + 2 * held.kv_heads) * config.head_dim, (3 if config.gated_mlp else 2) * held.ffn)
        activations = size * options.max_batch_tokens * (4 * config.hidden_size + inside)
        logits = LOGIT_ROWS * (held.head // config.hidden_size) * (size + 2 * 4)
        groups = {shape.tp * shape.fsdp, shape.tp} - {1} if cluster.kind == "cpu" else ()
        buffers = sum(segment_size(ranks) for ranks in groups)
        static = weights + copies + buffers
        part = cls(weights, copies, gathered, activations, logits, buffers, None)
        beside = gathered + activations + logits
        if static + beside > memory:
            return _lacking(part, static + beside - memory, "weights and what a step computes do not fit")
        try:
            kv = KVPlan.make(config, shape.tp, shape.fsdp, dtype, options, max_model_len, memory - static)
        except ValueError as error:
            enough = 2 * config.layers * held.kv_heads * config.head_dim * size * (longest + 2 * options.block_size)
            lacking = max(1, static + beside + enough - memory)
            return _lacking(part, lacking, str(error))
        whole = cls(weights, copies, gathered, activations, logits, buffers, kv)
        if kv.max_model_len < longest:
            lacking = kv.block_bytes * -(-(longest - kv.max_model_len) // options.block_size)
            return _lacking(whole, lacking, f"the KV cache holds {kv.max_model_len:,} tokens, and a sequence has {longest:,}")
        if whole.total > memory:
            return _lacking(
                whole, whole.total - memory, "the KV cache leaves too little for what a step computes: lower engine.kv_cache_fraction"
            )
        return whole


def _lacking(part: Footprint, missing: int, why: str) -> Footprint:
    return Footprint(
        part.weights, part.copies, part.gathered, part.activations, part.logits, part.buffers, part.kv, missing=missing, why=why
    )
