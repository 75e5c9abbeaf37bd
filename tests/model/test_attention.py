"""Attention over the paged cache, against the formula applied to one span at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_infer.model.attention import attend_decodes
from dist_infer.model.attention_plan import Decodes, Span
from dist_infer.model.cache import KVCache
from dist_infer.model.rotary import rotate

CPU = torch.device("cpu")
BLOCK, KV_HEADS, GROUP, HEAD_DIM, POOL = 4, 2, 3, 8, 40

# Block tables and contexts. Blocks that belong together lie apart, tables are ragged, and two spans may share a prefix.
IN_ORDER = [([1, 2, 3], 12), ([4], 1), ([5, 6], 6)]
MIXED_WITH_HOLES = [([9, 3, 11], 9), ([4], 4), ([7, 10], 5), ([5, 12, 2, 13], 15)]
SHARED = [([6, 7, 1], 10), ([6, 7, 2], 12), ([6], 3)]
FAR_APART = [([1, 39], 8), ([20], 2)]


def filled_cache() -> KVCache:
    cache = KVCache(2, POOL, KV_HEADS, BLOCK, HEAD_DIM, torch.float32, CPU)
    generator = torch.Generator().manual_seed(1)
    for pool in (*cache.keys, *cache.values):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    return cache


def one_by_one(
    q: Tensor, keys: Tensor, values: Tensor, tables: list[tuple[list[int], int]], window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """[spans, kv_heads, group, head_dim], by the definition."""
    outputs = []
    for query, (blocks, context) in zip(q, tables, strict=True):
        first = 0 if window is None else max(0, context - window)
        k, v = (pool[blocks].transpose(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)[:, first:context] for pool in (keys, values))
        scores = scale * query @ k.transpose(1, 2)
        outputs.append(torch.softmax(scores if softcap is None else softcap * torch.tanh(scores / softcap), dim=-1) @ v)
    return torch.stack(outputs)


@pytest.mark.parametrize("softcap", [None, 0.4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "tables", [IN_ORDER, MIXED_WITH_HOLES, SHARED, FAR_APART], ids=["in order", "mixed with holes", "shared", "far apart"]
)
def test_decodes(tables: list[tuple[list[int], int]], window: int | None, softcap: float | None) -> None:
    cache = filled_cache()
    # Block tables are longer than what is in use.
    spans = [Span(row, 1, context, np.array([*blocks, 0, 0], dtype=np.int32)) for row, (blocks, context) in enumerate(tables)]
    decodes = Decodes(spans, BLOCK, CPU)
    q = torch.randn(len(tables), KV_HEADS, GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    for layer in range(2):
        found = attend_decodes(q, cache.keys[layer], cache.values[layer], decodes, window, 0.3, softcap)
        torch.testing.assert_close(found, one_by_one(q, cache.keys[layer], cache.values[layer], tables, window, 0.3, softcap))


def test_a_span_does_not_read_its_neighbours() -> None:
    cache = filled_cache()
    tables = [([2, 5, 8], 11), ([3], 3)]
    decodes = Decodes([Span(row, 1, context, np.array(blocks)) for row, (blocks, context) in enumerate(tables)], BLOCK, CPU)
    q = torch.randn(2, KV_HEADS, GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    cache.keys[0][2], cache.values[0][[4, 6]] = float("nan"), float("nan")  # a block of the first span, and blocks of nobody's
    found = attend_decodes(q, cache.keys[0], cache.values[0], decodes, None, 1.0)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_cache_write() -> None:
    cache = filled_cache()
    keys, values = [pool.clone() for pool in cache.keys], [pool.clone() for pool in cache.values]
    slots = [7, 30, 4, 159]
    heads = torch.arange(len(slots) * 2 * KV_HEADS * HEAD_DIM).float().view(len(slots), 2 * KV_HEADS, HEAD_DIM)
    cache.write(1, cache.rows(torch.tensor(slots)), heads)
    for token, slot in enumerate(slots):
        for head in range(KV_HEADS):
            keys[1][slot // BLOCK, head, slot % BLOCK] = heads[token, head]
            values[1][slot // BLOCK, head, slot % BLOCK] = heads[token, KV_HEADS + head]
    for layer in range(2):
        assert cache.keys[layer].equal(keys[layer]) and cache.values[layer].equal(values[layer])


def test_copy_blocks() -> None:
    cache = filled_cache()
    cache.copy_blocks(torch.tensor([3, 4]), torch.tensor([10, 11]))
    for pool in (*cache.keys, *cache.values):
        assert pool[10].equal(pool[3]) and pool[11].equal(pool[4]) and not pool[12].equal(pool[4])


@pytest.mark.parametrize("width", [HEAD_DIM, HEAD_DIM // 2])
def test_rotation_is_in_place_and_of_the_first_dims(width: int) -> None:
    x = torch.randn(5, 3, HEAD_DIM, generator=torch.Generator().manual_seed(4))
    angles = torch.rand(5, width // 2, generator=torch.Generator().manual_seed(5))
    # Pairs (i, i + width / 2) are complex numbers that turn.
    turned = torch.complex(x[..., : width // 2], x[..., width // 2 : width]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., width:]), dim=-1)
    signed = torch.cat((-angles, angles), dim=-1)[:, None]
    rotate(x, signed.cos(), signed.sin())
    torch.testing.assert_close(x, expected)
