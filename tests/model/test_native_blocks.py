"""Blocks in one call of compiled code compute, to the bit, what their modules compute one after another."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.collectives import CollectiveTimeout, Communicator, SingleRank
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.shared_memory import SLOT, SharedMemory
from dist_infer.distributed.world import World
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.config import ModelConfig
from dist_infer.model.decoder import Decoder
from dist_infer.model.layers import Linear
from dist_infer.model.native import kernels
from dist_infer.model.native_blocks import NativeBlocks, fits
from tests.ranks import Ranks

compiled = kernels(torch.bfloat16)
pytestmark = pytest.mark.skipif(compiled is None or not compiled.can_multiply, reason="no compiled products on this processor")

CPU = torch.device("cpu")
LLAMA = ModelConfig("llama", 50, 64, 112, layers=3, heads=8, kv_heads=4, head_dim=32, norm_eps=1e-5, max_position=256)
DECODE = [(1, 1), (1, 37), (1, 16), (1, 70)]  # tokens and context of each span
MIXED = [(1, 37), (20, 20), (1, 1), (9, 40)]


def decoder(config: ModelConfig, tp: Communicator, packed: bool = True) -> Decoder:
    """A model of random weights, as a rank holds it."""
    with torch.device("meta"):
        made = Decoder(config, tp, CPU).to(torch.bfloat16)
    made = made.to_empty(device=CPU)
    made.use(compiled)
    for seed, parameter in enumerate(made.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    for module in made.modules():
        if packed and isinstance(module, Linear):
            module.pack(keep_weight=False)
    return made


def step(model: Decoder, lengths: list[tuple[int, int]], rows: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The wanted logits of a step, `rows` of each span, and the cache it leaves."""
    tables, first = [], 1
    for _, context in lengths:
        tables.append(np.arange(first, first := first + -(-context // 16), dtype=np.int32)[::-1])
    cache = model.new_cache(first)
    for seed, pool in enumerate((*cache.keys, *cache.values)):
        pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(seed)))
    spans = [
        TokenSpan([(7 * place + i) % 50 for i in range(length)], context - length, table, min(rows, length))
        for place, ((length, context), table) in enumerate(zip(lengths, tables, strict=True))
    ]
    logits: list[Tensor] = []
    model(Batch.of(spans, 16, model.rotary, CPU), cache, lambda part, _: logits.append(part.clone()))
    return torch.cat(logits), [*cache.keys, *cache.values]


def runs_in_one_call(model: Decoder, lengths: list[tuple[int, int]], rows: int = 1) -> bool:
    """Whether a step is made by compiled code; asserts that it gives the bits that modules give."""
    with patch.object(NativeBlocks, "run", autospec=True, side_effect=NativeBlocks.run) as run:
        logits, cache = step(model, lengths, rows)
    with patch("dist_infer.model.decoder.fits", lambda block: False):
        model._native = None
        expected, expected_cache = step(model, lengths, rows)
    assert logits.isfinite().all()
    assert logits.equal(expected)
    assert all(pool.equal(other) for pool, other in zip(cache, expected_cache, strict=True))
    return run.called


FITTING: dict[str, dict[str, Any]] = {
    "llama": {},
    "norms of heads, biases": {"qk_norm": "head", "qk_norm_eps": 1e-3, "qkv_bias": True},
    "windows and unlike rotations": {
        "sliding_windows": (None, 9, None),
        "local_rope": {"rope_type": "default", "rope_theta": 100.0},
        "unrotated_layers": (2,),
    },
    "unit norms, softcap": {"norm": "rms_unit", "attention_softcap": 3.0, "attention_scale": 0.3, "qk_norm": "head"},
    "one layer": {"layers": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("traits", list(FITTING))
@pytest.mark.parametrize(("lengths", "rows"), [(DECODE, 1), (MIXED, 1), (MIXED, 99)], ids=["decode", "mixed", "all rows"])
def test_one_call(traits: str, lengths: list[tuple[int, int]], rows: int) -> None:
    model = decoder(replace(LLAMA, **FITTING[traits]), SingleRank())
    assert runs_in_one_call(model, lengths, rows) == (traits != "one layer" or lengths is DECODE or rows > 1)


OTHERS: dict[str, dict[str, Any]] = {
    "output bias": {"output_bias": True},
    "mlp bias": {"mlp_bias": True},
    "layer norm": {"norm": "layer"},
    "post norms": {"norm_placement": "both"},
    "only post norms": {"norm_placement": "post"},
    "gelu": {"activation": "gelu"},
    "no gate": {"gated_mlp": False},
    "parallel": {"parallel_residual": True},
    "scaled": {"residual_scale": 0.5},
    "norm across heads": {"qk_norm": "full"},
}


@pytest.mark.parametrize("traits", list(OTHERS))
def test_blocks_of_other_kinds_do_not_fit(traits: str) -> None:
    block = decoder(replace(LLAMA, **OTHERS[traits]), SingleRank()).blocks[0]
    assert not fits(block)
    assert fits(decoder(LLAMA, SingleRank()).blocks[0])


@torch.no_grad()
def test_what_steps_keep_belongs_to_none_of_them() -> None:
    """Steps of equal and unlike widths, each with a cache of its own, which all live on."""
    model, plain = decoder(LLAMA, SingleRank()), decoder(LLAMA, SingleRank())
    plain._native_blocks = lambda: None  # type: ignore[method-assign]
    alive = []
    for lengths in (DECODE, DECODE[::-1], MIXED, DECODE, MIXED):
        (logits, cache), (expected, expected_cache) = step(model, lengths), step(plain, lengths)
        assert logits.equal(expected)
        assert all(pool.equal(other) for pool, other in zip(cache, expected_cache, strict=True))
        alive.append(cache)


@torch.no_grad()
def test_weights_that_are_packed_anew_are_used() -> None:
    model = decoder(LLAMA, SingleRank())
    before, _ = step(model, DECODE)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    packed = [weakref.ref(linear.packed) for linear in linears]
    for linear in linears:
        linear.unpack()
        linear.weight.fill_(0.01)
    assert not any(weight() for weight in packed), "packed weights outlive their linear"
    assert not runs_in_one_call(model, DECODE)
    for linear in linears:
        linear.pack(keep_weight=False)
    assert runs_in_one_call(model, DECODE)
    assert not step(model, DECODE)[0].equal(before)


def check_sums(collectives: str, hidden: int) -> None:
    with World.join(ParallelOptions(), "cpu") as world, torch.no_grad():
        mesh = Mesh(world, MeshShape(1, 1, world.size), ParallelOptions(collectives=collectives))
        model = decoder(replace(LLAMA, hidden_size=hidden), mesh.tp)
        for lengths in (DECODE, MIXED, DECODE):
            assert runs_in_one_call(model, lengths)
        mesh.close()


@pytest.mark.parametrize(("size", "collectives"), [(2, "shared_memory"), (4, "shared_memory"), (2, "process_group")])
def test_sums_over_ranks(ranks: Ranks, size: int, collectives: str) -> None:
    """Four ranks on fewer cores do not wait inside compiled code."""
    ranks(size).run(check_sums, collectives, LLAMA.hidden_size)


def test_sums_larger_than_a_slot(ranks: Ranks) -> None:
    tokens = sum(length for length, _ in MIXED)
    ranks(2).run(check_sums, "shared_memory", SLOT // tokens)


def check_late_rank() -> str:
    with World.join(ParallelOptions(), "cpu") as world, torch.no_grad():
        mesh = Mesh(world, MeshShape(1, 1, 2), ParallelOptions(timeout_s=0.3, collectives="shared_memory"))
        model, message = decoder(LLAMA, mesh.tp), ""
        assert isinstance(mesh.tp, SharedMemory)
        step(model, DECODE)
        if world.rank == 0:
            embedded = torch.zeros(len(DECODE), LLAMA.hidden_size, dtype=torch.bfloat16)
            with patch.object(model, "_embed", lambda batch: embedded), pytest.raises(CollectiveTimeout) as caught:
                step(model, DECODE)
            message = str(caught.value)
            assert mesh.tp.waiting
        world.exchange("done", None)
        mesh.close()
        return message


def test_late_rank_is_named(ranks: Ranks) -> None:
    assert "rank 1 did not come" in ranks(2).run(check_late_rank)[0]
