"""Decode steps replayed from CUDA graphs, so that a step costs one launch instead of some hundreds."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.attention import Attention
from dist_infer.model.attention_plan import AttentionPlan, Span
from dist_infer.model.batch import Batch
from dist_infer.model.cache import KVCache
from dist_infer.model.decoder import Decoder
from dist_infer.model.fallback.decoder import FallbackDecoder

WARM_UPS = 2  # runs before a graph is recorded, in which libraries set themselves up
Reduce = Callable[[Tensor, int], None]


class Recording(Protocol):
    """What was recorded of a computation: a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Compute it again."""
        ...

    def reset(self) -> None:
        """Forget it."""
        ...


Recorder = Callable[[Callable[[], None]], Recording]


class Forward(Protocol):
    """A decoder's `forward`."""

    def __call__(self, batch: Batch, cache: KVCache, reduce: Reduce) -> None:
        """One step."""
        ...


class DecodeGraphs:
    """Runs steps: those of one-token spans, whose logits are all wanted, from a graph; any other as the decoder does.

    There is a graph for 1, 2, 4, 8... rows, recorded when first needed. Rows too many write to block 0, which is nobody's. Weights and
    cache must stay where they are in memory; on GPUs they do, as a swap overwrites them in place.

    Args:
        forward: The decoder's. Its attention takes all spans in one call, and its collectives are capturable.
        cache: The KV blocks it writes to.
        rows: Most one-token spans in a step.
        width: Blocks of the longest sequence.
        device: Where it computes.
        recorder: Records a computation, which it runs.
    """

    def __init__(self, forward: Forward, cache: KVCache, rows: int, width: int, device: torch.device, recorder: Recorder) -> None:
        self._forward, self._cache, self._width, self._device = forward, cache, width, device
        self._record = recorder
        self._buckets = [*(1 << power for power in range((rows - 1).bit_length())), rows]
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, batch: Batch, cache: KVCache, reduce: Reduce) -> None:
        """As `Decoder.forward`. What `reduce` is given is overwritten by the next step."""
        rows = len(batch.tokens)
        if cache is not self._cache or not rows or rows > self._buckets[-1] or not _is_decode(batch):
            self._forward(batch, cache, reduce)
            return
        bucket = self._buckets[bisect.bisect_left(self._buckets, rows)]
        if bucket not in self._graphs:
            self._graphs[bucket] = _Graph(self._forward, cache, bucket, self._width, self._device, self._record)
        self._graphs[bucket].run(batch, reduce)

    def close(self) -> None:
        """Forget all graphs: when NCCL ends it waits for those that hold its sums."""
        for graph in self._graphs.values():
            graph.recording.reset()
        self._graphs.clear()


class _Graph:
    """A decode step of up to `rows` rows: its inputs, the recording, and the logits it leaves."""

    def __init__(self, forward: Forward, cache: KVCache, rows: int, width: int, device: torch.device, record: Recorder) -> None:
        self._tokens, self._positions, self._slots = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        none = np.zeros(width, dtype=np.int32)
        longest = [Span(row, 1, width * cache.block_size, none) for row in range(rows)]  # so that tables are as wide as any may be
        self._spans = AttentionPlan(longest, self._slots, cache.block_size).spans
        self._spans.contexts.fill_(1)
        logit_rows = torch.arange(rows, device=device)
        self._logits: list[tuple[Tensor, int]] = []
        self._filled = 0

        def step() -> None:
            self._logits.clear()
            plan = AttentionPlan([], self._slots, cache.block_size)  # a new one, as plans remember what is computed from them
            plan.spans = self._spans
            batch = Batch(self._tokens, self._positions, None, logit_rows, plan)
            forward(batch, cache, lambda logits, first: self._logits.append((logits, first)))

        self.recording = record(step)

    def run(self, batch: Batch, reduce: Reduce) -> None:
        """Fill the inputs in, replay, and give the rows' logits on."""
        rows, spans = len(batch.tokens), batch.attention.spans
        self._tokens[:rows].copy_(batch.tokens)
        self._positions[:rows].copy_(batch.positions)
        self._slots[:rows].copy_(batch.attention.slots)
        self._spans.contexts[:rows].copy_(spans.contexts)
        self._spans.tables[:rows, : spans.tables.shape[1]].copy_(spans.tables)
        if rows < self._filled:  # what an earlier step left behind: null rows must not write to anyone's blocks
            for tensor in (self._tokens, self._positions, self._slots, self._spans.tables):
                tensor[rows : self._filled].zero_()
            self._spans.contexts[rows : self._filled].fill_(1)
        self._filled = rows
        self.recording.replay()
        for logits, first in self._logits:
            if first < rows:
                reduce(logits[: rows - first], first)


def decode_graphs(decoder: Decoder | FallbackDecoder, tp: Communicator, cache: KVCache, rows: int, longest: int) -> DecodeGraphs | None:
    """Graphs of a decoder's steps, or None where it cannot be recorded: experts and eager attention ask the GPU how to go on.

    Args:
        decoder: The model, with its kernels and at fsdp=1.
        tp: What its layers sum through.
        cache: The KV blocks.
        rows: Most sequences at once.
        longest: Tokens of the longest sequence.
    """
    device = cache.keys[0].device
    if device.type != "cuda" or not tp.capturable or not isinstance(decoder, Decoder) or decoder.config.experts is not None:
        return None
    if any(module.kernels is None for module in decoder.modules() if isinstance(module, Attention)):
        return None
    return DecodeGraphs(decoder, cache, rows, -(-longest // cache.block_size), device, cuda_recorder(device, tp))


def cuda_recorder(device: torch.device, ranks: Communicator) -> Recorder:
    """Records CUDA graphs that share memory for what is between their inputs and logits, as one runs at a time.

    Args:
        device: Where they run.
        ranks: What their sums are made between.
    """
    pool = None

    def record(work: Callable[[], None]) -> Recording:
        nonlocal pool
        apart = torch.cuda.Stream(device)
        apart.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(apart):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream(device).wait_stream(apart)
        ready = torch.cuda.Event()
        ready.record()
        ranks.wait_for(ready)  # what begins a recording waits for the GPU, too, but for ever
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may ask the driver things meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        pool = graph.pool()
        return graph

    return record


def _is_decode(batch: Batch) -> bool:
    """Whether every token is a span whose logits are wanted, rotated in the first regime."""
    rows = len(batch.tokens)
    return len(batch.logit_rows) == rows == len(batch.attention.spans.contexts) and batch.rope_lengths is None
