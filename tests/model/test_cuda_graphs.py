"""Which steps are replayed, with which inputs, and what becomes of the logits; a decoder that says what it was given stands in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_infer.distributed.collectives import SingleRank
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.cuda_graphs import DecodeGraphs, Recording, cuda_recorder
from dist_infer.model.rotary import Rotary

BLOCK, WIDTH, BLOCKS, SLICE = 4, 3, 40, 5
CPU = torch.device("cpu")


class Echo:
    """A decoder whose cache and logits tell what it was given; it works on the tensors it saw first, as a replayed graph does.

    Attributes:
        eager: Rows of the steps it ran as they came.
    """

    def __init__(self) -> None:
        self.eager: list[int] = []

    def __call__(self, batch: Batch, cache: KVCache, reduce: Callable[[Tensor, int], None]) -> None:
        """Put tokens into the cache at their slots, and say them with the rest."""
        self.eager.append(len(batch.tokens))
        plan, spans = batch.attention, batch.attention.spans
        cache.keys[0][plan.slots // BLOCK, 0, plan.slots % BLOCK, 0] = batch.tokens.float()
        read = torch.arange(spans.tables.shape[1]) * BLOCK < spans.contexts[:, None]
        given = (batch.tokens, batch.positions, plan.slots, spans.contexts, spans.offsets[1:], (spans.tables * read).sum(1))
        logits = torch.stack([tensor.float() for tensor in given], 1)[batch.logit_rows]
        for first in range(0, len(logits), SLICE):
            reduce(logits[first : first + SLICE], first)

    def record(self, work: Callable[[], None]) -> Again:
        """What does the work again."""
        work()
        self.eager.pop()
        return Again(work, self.eager)


class Again:
    """A recording that runs the work itself."""

    def __init__(self, work: Callable[[], None], eager: list[int]) -> None:
        self.work, self.eager, self.there = work, eager, True

    def replay(self) -> None:
        """Once more, which is no eager run."""
        self.work()
        self.eager.pop()

    def reset(self) -> None:
        """Is gone."""
        self.there = False


CONFIG = ModelConfig(
    "llama", vocab_size=99, hidden_size=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_size=8, norm_eps=1e-5, max_position=64
)


def batch_of(lengths: list[int], seed: int, rows: int = 1, anchor: int = 0) -> Batch:
    """Spans of `lengths` with blocks of their own, each ending anywhere."""
    generator = np.random.default_rng(seed)
    blocks = np.split(generator.permutation(BLOCKS - 1).astype(np.int32)[: WIDTH * len(lengths)] + 1, len(lengths))
    spans = []
    for length, table in zip(lengths, blocks, strict=True):
        start = int(generator.integers(BLOCK * WIDTH - length + 1))
        spans.append(TokenSpan(generator.integers(1, 99, length).tolist(), start, table, rows, anchor))
    return Batch.of(spans, BLOCK, Rotary(CONFIG, CPU), CPU)


def new_cache() -> KVCache:
    return KVCache(1, BLOCKS, 1, BLOCK, 1, torch.float32, CPU)


def logits_of(run: Callable[..., None], batch: Batch, cache: KVCache) -> Tensor:
    parts: list[Tensor] = []

    def keep(logits: Tensor, first: int) -> None:
        assert first == sum(map(len, parts))
        parts.append(logits.clone())

    run(batch, cache, keep)
    return torch.cat(parts)


def test_a_replayed_step_is_the_step() -> None:
    echo, cache = Echo(), new_cache()
    graphs = DecodeGraphs(echo, cache, 12, WIDTH, CPU, echo.record)
    for seed, rows in enumerate((1, 3, 12, 8, 2, 5, 4, 11, 6, 1)):
        batch, expected_cache = batch_of([1] * rows, seed), new_cache()
        expected = logits_of(Echo(), batch, expected_cache)
        for pool in (cache.keys[0], cache.values[0]):
            pool.zero_()
        assert torch.equal(logits_of(graphs, batch, cache), expected)
        # Null rows write to block 0 only.
        assert torch.equal(cache.keys[0][1:], expected_cache.keys[0][1:])
    assert not echo.eager


def other_steps() -> list[tuple[str, Batch]]:
    regime = batch_of([1, 1], 2)
    regime.rope_lengths = torch.full((2,), 99)
    unwanted = batch_of([1, 1], 1, rows=0)
    empty = Batch.of([], BLOCK, Rotary(CONFIG, CPU), CPU)
    return [
        ("no rows", empty),
        ("too many", batch_of([1] * 13, 4)),
        ("unwanted", unwanted),
        ("regime", regime),
        ("long", batch_of([3, 1], 3)),
    ]


def test_other_steps_are_left_to_the_decoder() -> None:
    cache, ran = new_cache(), []
    graphs = DecodeGraphs(lambda batch, cache, reduce: ran.append(len(batch.tokens)), cache, 12, WIDTH, CPU, lambda work: pytest.fail)
    for name, batch in other_steps():
        ran.clear()
        graphs(batch, cache, lambda logits, first: None)
        assert ran == [len(batch.tokens)], name
    ran.clear()
    graphs(batch_of([1, 1], 0), new_cache(), lambda logits, first: None)
    assert ran == [2], "another cache"


def test_a_graph_is_recorded_once_a_bucket() -> None:
    echo, cache = Echo(), new_cache()
    recorded: list[Again] = []

    def record(work: Callable[[], None]) -> Recording:
        recorded.append(echo.record(work))
        return recorded[-1]

    graphs = DecodeGraphs(echo, cache, 12, WIDTH, CPU, record)
    for rows in (1, 2, 3, 4, 3, 9, 12, 1):
        logits_of(graphs, batch_of([1] * rows, rows), cache)
    assert len(recorded) == 4
    graphs.close()
    assert not any(recording.there for recording in recorded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_reads_its_inputs_anew() -> None:
    device = torch.device("cuda")
    record = cuda_recorder(device, SingleRank())
    given, found = torch.ones(4, device=device), torch.empty(4, device=device)

    def double() -> None:
        found.copy_(given * 2)

    recording = record(double)
    given.fill_(5)
    recording.replay()
    assert found.tolist() == [10.0] * 4
