"""The compiled kernels compute what the eager operations beside them do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_infer.model.attention import Attention
from dist_infer.model.attention_plan import AttentionPlan, Span
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.layers import RMSNorm
from dist_infer.model.native import Kernels, kernels

CPU = torch.device("cpu")
# bfloat16 eager operations round between steps where a kernel does not: two units in the last place.
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}

needs_compiler = pytest.mark.skipif(kernels(torch.float32) is None, reason="no C++ compiler")
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def native(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype)
    assert found is not None
    return found


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_compiler
@dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 50), (70, 1024), (0, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("first", [True, False])
def test_add_rms_norm(dtype: torch.dtype, rows: int, size: int, first: bool, offset: float) -> None:
    norm = RMSNorm(size, 1e-5, offset).to(dtype)
    norm.weight.copy_(normal(size, dtype=dtype, seed=1))
    x, delta = normal(rows, size, dtype=dtype, seed=2), None if first else normal(rows, size, dtype=dtype, seed=3)
    ours, theirs = x.clone(), x.clone()
    expected = norm.after(theirs, delta)
    norm.kernels = native(dtype)
    torch.testing.assert_close(norm.after(ours, delta), expected, **TOLERANCE[dtype])
    assert ours.equal(theirs), "the residual stream is another one"


@needs_compiler
@dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 77), (40, 2816)])
def test_silu_and_multiply(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = normal(rows, 2 * size, dtype=dtype, seed=4) * 6
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.5])
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(native(dtype).silu_and_multiply(gate_up), (F.silu(gate) * up).to(dtype), **TOLERANCE[dtype])


# Heads and KV heads over tp, the head's size, the rotated part of it.
SHAPES = [(8, 2, 1, 64, 64), (6, 6, 1, 128, 128), (9, 3, 2, 20, 20), (4, 1, 1, 80, 32), (12, 1, 1, 256, 256), (6, 2, 1, 32, 0)]
TRAITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"qk_norm": "head"},
    "unit norms": {"qk_norm": "head", "norm": "rms_unit"},
    "capped": {"attention_softcap": 5.0, "attention_scale": 0.2},
}


def attention(heads: int, kv_heads: int, tp: int, head_dim: int, window: int | None, traits: str, dtype: torch.dtype) -> Attention:
    """The attention of rank 0 of `tp`, with random weights."""
    sizes = {"hidden_size": 32, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    config = ModelConfig(
        "llama",
        vocab_size=10,
        ffn_size=10,
        layers=1,
        norm_eps=1e-5,
        max_position=4096,
        sliding_windows=(window,) if window else (),
        **sizes,
        **TRAITS[traits],
    )
    group = type("Ranks", (), {"size": tp, "rank": 0, "all_reduce": lambda self, tensor: tensor})()
    module = Attention(config, 0, group, CPU).to(dtype)
    for seed, parameter in enumerate(module.parameters()):
        parameter.copy_(normal(*parameter.shape, dtype=torch.float32, seed=seed) * 0.3)
    return module


def spans(block_size: int) -> tuple[list[Span], Tensor]:
    """Decodes of unlike lengths with a prefill among them, blocks in no order, and the slots of their tokens."""
    lengths = [(1, 1), (1, 37), (4, 21), (1, 16), (1, 150), (1, 64)]
    counts = [-(-context // block_size) for _, context in lengths]
    blocks = np.random.default_rng(5).permutation(np.arange(1, sum(counts) + 1)).astype(np.int32)
    found, slots, start = [], [], 0
    for (length, context), count in zip(lengths, counts, strict=True):
        table, blocks = blocks[:count], blocks[count:]
        at = np.arange(context - length, context)
        found.append(Span(start, length, context, table))
        slots.append(table[at // block_size].astype(np.int64) * block_size + at % block_size)
        start += length
    return found, torch.from_numpy(np.concatenate(slots))


@needs_compiler
@dtypes
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("traits", list(TRAITS))
@pytest.mark.parametrize(("shape", "block_size"), list(zip(SHAPES, (16, 3, 1, 256, 24, 8), strict=True)))
def test_attention(dtype: torch.dtype, window: int | None, traits: str, shape: tuple[int, int, int, int, int], block_size: int) -> None:
    heads, kv_heads, tp, head_dim, rotated = shape
    module = attention(heads, kv_heads, tp, head_dim, window, traits, dtype)
    batch, slots = spans(block_size)
    pool = max(int(span.blocks.max()) for span in batch) + 1
    x = normal(len(slots), 32, dtype=dtype, seed=6)
    angles = normal(len(slots), rotated // 2, dtype=torch.float32, seed=7).repeat(1, 2)[:, None]
    sign = torch.cat((-torch.ones(rotated // 2), torch.ones(rotated // 2)))
    cos, sin = angles.cos().to(dtype), (angles.sin() * sign).to(dtype)

    def run(used: Kernels | None, as_type: torch.dtype) -> tuple[Tensor, KVCache]:
        module.to(as_type).kernels = used
        cache = KVCache(1, pool, module.kv_heads, block_size, head_dim, as_type, CPU)
        for seed, entries in enumerate((*cache.keys, *cache.values)):
            entries.copy_(normal(*entries.shape, dtype=dtype, seed=seed))
        return module(x.to(as_type), cos.to(as_type), sin.to(as_type), cache, AttentionPlan(batch, slots, block_size)), cache

    (ours, our_cache), (eager, eager_cache), (exact, exact_cache) = run(native(dtype), dtype), run(None, dtype), run(None, torch.float64)
    for found, other, true in (
        (ours, eager, exact),
        (our_cache.keys[0], eager_cache.keys[0], exact_cache.keys[0]),
        (our_cache.values[0], eager_cache.values[0], exact_cache.values[0]),
    ):
        # As near the truth as the eager operations are; where the largest of few roundings falls is luck.
        assert (found - true).abs().max() <= 2 * (other - true).abs().max() + 1e-6 * true.abs().max()


@needs_compiler
def test_a_span_reads_its_own_tokens_only() -> None:
    block_size, found = 4, native(torch.float32)
    cache = KVCache(1, 12, 1, block_size, 16, torch.float32, CPU)
    for pool in (cache.keys[0], cache.values[0]):
        pool.fill_(float("nan"))
        pool[[3, 5]] = 1.0
        pool[5, :, 2:] = float("nan")  # beyond the sequence's end
    q, out = torch.ones(1, 2, 16), torch.empty(1, 2, 16)
    plan = AttentionPlan([Span(0, 1, 6, np.array([3, 5], dtype=np.int32))], torch.tensor([21]), block_size)
    groups = torch.tensor([0, 2], dtype=torch.int32)
    found.paged_attention(q, out, cache.keys[0], cache.values[0], plan.spans, groups, None, 1.0)
    torch.testing.assert_close(out, torch.ones(1, 2, 16))
    cache.keys[0][5, :, 1] = float("nan")  # its last token
    found.paged_attention(q, out, cache.keys[0], cache.values[0], plan.spans, groups, None, 1.0)
    assert out.isnan().all(), "a NaN in the cache was lost"


@needs_compiler
@dtypes
@pytest.mark.parametrize("blocks", [[5, 1, 7], [5, 6, 7], [7, 6, 5]])
def test_small_blocks_lie_anywhere(dtype: torch.dtype, blocks: list[int]) -> None:
    block_size, head_dim, context = 3, 32, 9
    cache = KVCache(1, 9, 1, block_size, head_dim, dtype, CPU)
    for seed, pool in enumerate((cache.keys[0], cache.values[0])):
        pool.copy_(normal(*pool.shape, dtype=dtype, seed=seed))
    q = normal(1, 2, head_dim, dtype=dtype, seed=2)
    out = torch.empty_like(q)
    plan = AttentionPlan([Span(0, 1, context, np.array(blocks, dtype=np.int32))], torch.tensor([blocks[-1] * block_size + 2]), block_size)
    groups = torch.tensor([0, 2], dtype=torch.int32)
    native(dtype).paged_attention(q, out, cache.keys[0], cache.values[0], plan.spans, groups, None, head_dim**-0.5)
    keys, values = (pool[0][blocks, 0].reshape(context, head_dim).double() for pool in (cache.keys, cache.values))
    expected = (q[0].double() @ keys.T * head_dim**-0.5).softmax(-1) @ values
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", "true"])
def test_without_a_compiler_there_are_no_kernels(compiler: str, tmp_path: object) -> None:
    program = "import torch; from dist_infer.model.native import kernels; print(kernels(torch.float32))"
    environment = {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "None\n"
