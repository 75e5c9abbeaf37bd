"""The GPU's attention call, its kernel replaced by what torch documents of it; on a GPU, the kernel itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_infer.model import cuda_attention
from dist_infer.model.cuda_attention import attend_eagerly, attend_varlen, fits, works

SPANS = [(1, 1), (1, 300), (5, 5), (17, 290), (1, 256), (3, 513)]  # tokens, context
LONGEST, LONGEST_CONTEXT = 17, 513
HEAD_DIM, BLOCK = 16, 256
Example = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """`varlen_attn` as its documentation has it, token by token; it insists on what the kernel checks."""
    for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1
    assert cu_seq_q.shape == cu_seq_k.shape == (len(seqused_k) + 1,) and len(block_table) == len(seqused_k)
    pages, page_size, kv_heads, _ = key.shape
    assert key.shape == value.shape and page_size % 256 == 0 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa or query.shape[1] == kv_heads
    assert int(cu_seq_q.diff().max()) <= max_q and int(seqused_k.max()) <= max_k
    left, right = window_size
    out = torch.empty_like(query)
    for span in range(len(seqused_k)):
        first, last, used = int(cu_seq_q[span]), int(cu_seq_q[span + 1]), int(seqused_k[span])
        for token in range(first, last):
            position = used - (last - token)
            low = 0 if left < 0 else max(0, position - left)
            high = used if right < 0 else min(used, position + right + 1)
            slots = torch.arange(low, high)
            page, at = block_table[span, slots // page_size].long(), slots % page_size
            assert int(page.max()) < pages
            for head in range(query.shape[1]):
                kv_head = head // (query.shape[1] // kv_heads)
                weights = torch.softmax(key[page, at, kv_head].float() @ query[token, head].float() * scale, 0)
                out[token, head] = weights @ value[page, at, kv_head].float()
    return out


def example(heads: int, kv_heads: int, dtype: torch.dtype, device: str = "cpu") -> Example:
    """Queries, pool, offsets, contexts and block tables of `SPANS`; what no span may read is NaN."""
    generator = torch.Generator().manual_seed(heads)
    lengths, contexts = torch.tensor(SPANS, dtype=torch.int32).T
    counts = [-(-context // BLOCK) for context in contexts.tolist()]
    order = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    tables = torch.zeros(len(SPANS), max(counts) + 1, dtype=torch.int32)
    keys, values = (torch.full((sum(counts) + 1, kv_heads, BLOCK, HEAD_DIM), torch.nan) for _ in range(2))
    for row, (count, context) in enumerate(zip(counts, contexts.tolist(), strict=True)):
        for place in range(count):
            block = next(order)
            tables[row, place] = block
            filled = min(BLOCK, context - place * BLOCK)
            for pool in (keys, values):
                pool[block, :, :filled] = torch.randn(kv_heads, filled, HEAD_DIM, generator=generator)
    q = torch.randn(int(lengths.sum()), heads, HEAD_DIM, generator=generator)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)))
    q, keys, values = (tensor.to(device, dtype) for tensor in (q, keys, values))
    return q, keys, values, offsets.to(device), contexts.contiguous().to(device), tables.to(device)


@pytest.mark.parametrize("window", [None, 1, 40, 10_000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (2, 2)])
def test_the_call_asks_for_our_attention(monkeypatch: pytest.MonkeyPatch, window: int | None, heads: int, kv_heads: int) -> None:
    monkeypatch.setattr(cuda_attention, "varlen_attn", documented)
    arguments = (*example(heads, kv_heads, torch.float32), LONGEST, LONGEST_CONTEXT, window, 0.3)
    found, expected = attend_varlen(*arguments), attend_eagerly(*arguments)
    assert found.isfinite().all() and torch.allclose(found, expected, atol=1e-5)


def test_which_layers_fit() -> None:
    assert fits(torch.bfloat16, 128, 256, [4, 4], None)
    assert not fits(torch.float32, 128, 256, [4, 4], None)
    assert not fits(torch.bfloat16, 100, 256, [4, 4], None)
    assert not fits(torch.bfloat16, 264, 256, [4, 4], None)
    assert not fits(torch.bfloat16, 128, 16, [4, 4], None)
    assert not fits(torch.bfloat16, 128, 256, [4, 2], None)
    assert not fits(torch.bfloat16, 128, 256, [4, 4], 50.0)


def test_it_works_on_gpus_only() -> None:
    assert not works(torch.device("cpu"), torch.bfloat16, 4, 2, 64, 256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_on_a_gpu(window: int | None) -> None:
    assert works(torch.device("cuda"), torch.bfloat16, 6, 2, HEAD_DIM, BLOCK)
    q, keys, values, offsets, contexts, tables = example(6, 2, torch.bfloat16, "cuda")
    arguments = (q, keys.nan_to_num(), values.nan_to_num(), offsets, contexts, tables, LONGEST, LONGEST_CONTEXT, window, 0.3)
    assert (attend_varlen(*arguments).float() - attend_eagerly(*arguments).float()).abs().max() < 0.02
