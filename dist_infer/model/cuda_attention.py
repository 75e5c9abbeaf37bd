"""Attention of all spans of a step in one call, on GPUs: torch's FlashAttention over the paged cache. Not yet run on a GPU.

What it asks for (torch 2.13, FlashAttention 2): an Ampere GPU or newer, bfloat16 or float16, heads of at most 256 in eights, blocks of a
multiple of 256 tokens, as many query heads on every KV head. It reads the cache as [blocks, block_size, kv_heads, head_dim] with any
strides, so the pool is given to it as a view. Where the last queries see the last keys, as here, its causal mask is ours.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

BLOCK_MULTIPLE, LARGEST_HEAD, HEAD_MULTIPLE = 256, 256, 8
TOLERANCE = 0.02  # between the kernel and the reference, for values about 1 in bfloat16


def attend_varlen(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    contexts: Tensor,
    tables: Tensor,
    longest: int,
    longest_context: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of spans of any length.

    Args:
        q: [tokens, heads, head_dim], span after span.
        keys: [blocks, kv_heads, block_size, head_dim], the layer's pool; `values` likewise.
        offsets: [spans + 1] int32, where each span starts in `q`, and the end.
        contexts: [spans] int32, tokens of each sequence once its span is in the cache.
        tables: [spans, width] int32, their block tables; what is beyond a context is not read.
        longest: Tokens of the longest span, or more.
        longest_context: Largest of `contexts`, or more.
        window: The layer's sliding window: how many keys a query sees, its own among them.
        scale: Factor on the scores.

    Returns:
        [tokens, heads, head_dim].
    """
    out = varlen_attn(
        q,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        offsets,
        offsets,  # of keys; must have this shape, and is not read where there are block tables
        longest,
        longest_context,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != keys.shape[1],
        seqused_k=contexts,
        block_table=tables,
    )
    assert isinstance(out, Tensor), "nothing else was asked for"
    return out


def attend_eagerly(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    contexts: Tensor,
    tables: Tensor,
    longest: int,
    longest_context: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """What `attend_varlen` computes, span by span in float32: slow, and plain to see."""
    group = q.shape[1] // keys.shape[1]
    outputs = []
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), contexts.tolist(), tables.long(), strict=True)
    for start, stop, context, table in spans:
        own_keys, own_values = (
            pool[table].transpose(0, 1).flatten(1, 2)[:, :context].float().repeat_interleave(group, 0) for pool in (keys, values)
        )
        at_key = torch.arange(context, device=q.device)
        at_query = torch.arange(context - (stop - start), context, device=q.device)[:, None]
        hidden = at_key > at_query
        if window is not None:
            hidden |= at_key <= at_query - window
        scores = (q[start:stop].float().transpose(0, 1) @ own_keys.transpose(1, 2)) * scale
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        outputs.append((weights @ own_values).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def fits(dtype: torch.dtype, head_dim: int, block_size: int, groups: list[int], softcap: float | None) -> bool:
    """Whether the kernel is made for a layer whose KV heads have `groups` query heads each."""
    heads = head_dim <= LARGEST_HEAD and head_dim % HEAD_MULTIPLE == 0 and len(set(groups)) == 1
    return heads and dtype in (torch.bfloat16, torch.float16) and block_size % BLOCK_MULTIPLE == 0 and softcap is None


@functools.cache
def works(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int) -> bool:
    """Whether this build of torch gives the right answer on this GPU, by a small example of two spans that share nothing."""
    if device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, heads, head_dim, generator=generator).to(device, dtype)
    keys, values = (torch.randn(4, kv_heads, block_size, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    offsets, contexts, tables = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([0, 1, 4], [7, block_size + 5], [[2, 0], [3, 1]])
    )
    arguments = (q, keys, values, offsets, contexts, tables, 3, block_size + 5, None, head_dim**-0.5)
    try:
        found = attend_varlen(*arguments)
    except RuntimeError:
        return False
    return bool((found.float() - attend_eagerly(*arguments).float()).abs().max() < TOLERANCE)
