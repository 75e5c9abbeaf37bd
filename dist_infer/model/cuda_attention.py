"""Paged attention on GPUs, in Triton: spans of any length in one call, or one-token spans whose context is cut among programs.

The tiles and the running softmax are FlashAttention's (Dao et al., 2022); cutting the context of a token, and combining the parts, is
Flash-Decoding's. A program computes all query heads that share a KV head, so each key is read once.
"""

# A launch takes other arguments than the kernel it names says, and what its functions return is not typed.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_infer.model.attention_plan import SpanTable

LEAST_ROWS = 16  # what a tensor core multiplies at a time
SPAN_ROWS = 64  # queries times heads of a program, for spans of any length
SPAN_TILE, PART_TILE = 64, 64  # keys at a time
PROGRAMS_PER_PROCESSOR = 4  # what one-token spans are cut into, about
MOST_PARTS = 32


@triton.jit
def _scores(q, keys, at, seen, scale: tl.constexpr, softcap: tl.constexpr, columns, head_dim: tl.constexpr):
    """Scores [rows, tile] in units of log 2, of the keys that start `at`; -inf where not `seen`."""
    k = tl.load(keys + at[None, :] + columns[:, None], mask=(at[None, :] >= 0) & (columns[:, None] < head_dim), other=0.0)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if softcap > 0:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return tl.where(seen, scores * 1.4426950408889634, float("-inf"))


@triton.jit
def _add_tile(scores, greatest, total, mixed, values, at, columns, head_dim: tl.constexpr):
    """One step of the running softmax: the new greatest scores, sums and weighted values."""
    higher = tl.maximum(greatest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(greatest - base)
    v = tl.load(values + at[:, None] + columns[None, :], mask=(at[:, None] >= 0) & (columns[None, :] < head_dim), other=0.0)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def _places(table, keys_at, stop, kv_head, kv_heads, block_size: tl.constexpr, head_dim: tl.constexpr):
    """Where keys (or values) lie in the pool, counted in elements; -1 beyond `stop`."""
    there = keys_at < stop
    block = tl.load(table + keys_at // block_size, mask=there, other=0).to(tl.int64)
    return tl.where(there, ((block * kv_heads + kv_head) * block_size + keys_at % block_size) * head_dim, -1)


# A step's numbers are no reason to compile a kernel anew, which stalls all ranks.
@triton.jit(do_not_specialize=["spans", "table_stride"])
def _attend_spans(
    q,
    out,
    keys,
    values,
    offsets,
    contexts,
    tables,
    groups,
    spans,
    kv_heads,
    q_stride,
    out_stride,
    table_stride,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    group: tl.constexpr,
    queries: tl.constexpr,
    tile: tl.constexpr,
):
    """`queries` tokens of one span, all heads of one KV head. Span s owns the programs from offsets[s] // queries + s on."""
    program, kv_head = tl.program_id(0), tl.program_id(1)
    low, high = 0, spans  # the last span that starts at this program or before
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets + middle) // queries + middle <= program:
            low = middle
        else:
            high = middle
    start, end = tl.load(offsets + low), tl.load(offsets + low + 1)
    length, context = end - start, tl.load(contexts + low)
    first = (program - start // queries - low) * queries
    if first < length:
        first_head, stop_head = tl.load(groups + kv_head), tl.load(groups + kv_head + 1)
        rows, columns = tl.arange(0, queries * group), tl.arange(0, padded_dim)
        query, head = first + rows // group, first_head + rows % group
        real = (query < length) & (head < stop_head)
        mask = real[:, None] & (columns[None, :] < head_dim)
        at = (start + query).to(tl.int64)
        asked = tl.load(q + at[:, None] * q_stride + head[:, None] * head_dim + columns[None, :], mask=mask, other=0.0)
        position = context - length + query
        stop = tl.minimum(context - length + first + queries, context)
        begin = 0
        if window > 0:
            begin = tl.maximum(context - length + first - window + 1, 0) // tile * tile
        greatest = tl.full((queries * group,), float("-inf"), tl.float32)
        total = tl.zeros((queries * group,), tl.float32)
        mixed = tl.zeros((queries * group, padded_dim), tl.float32)
        table = tables + low * table_stride
        for tile_start in range(begin, stop, tile):
            keys_at = tile_start + tl.arange(0, tile)
            places = _places(table, keys_at, stop, kv_head, kv_heads, block_size, head_dim)
            seen = keys_at[None, :] <= position[:, None]
            if window > 0:
                seen = seen & (keys_at[None, :] > position[:, None] - window)
            scores = _scores(asked, keys, places, seen & (keys_at[None, :] < stop), scale, softcap, columns, head_dim)
            greatest, total, mixed = _add_tile(scores, greatest, total, mixed, values, places, columns, head_dim)
        found = mixed / total[:, None]
        tl.store(out + at[:, None] * out_stride + head[:, None] * head_dim + columns[None, :], found.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_stride"])
def _attend_tokens(
    q,
    out,
    keys,
    values,
    contexts,
    tables,
    groups,
    part_out,
    part_sums,
    kv_heads,
    heads,
    q_stride,
    out_stride,
    table_stride,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    window: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    rows_padded: tl.constexpr,
    tile: tl.constexpr,
    parts: tl.constexpr,
):
    """One part of the context of a one-token span: the result, or where there are several parts what `_combine` needs."""
    span, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + span)
    first_head, stop_head = tl.load(groups + kv_head), tl.load(groups + kv_head + 1)
    rows, columns = tl.arange(0, rows_padded), tl.arange(0, padded_dim)
    head = first_head + rows
    mask = (head < stop_head)[:, None] & (columns[None, :] < head_dim)
    low = 0
    if window > 0:
        low = tl.maximum(context - window, 0)
    tiles = tl.cdiv(context - low // tile * tile, tile)
    tiles_of_part = tl.cdiv(tiles, parts)
    begin = low // tile * tile + part * tiles_of_part * tile
    stop = tl.minimum(begin + tiles_of_part * tile, context)
    greatest = tl.full((rows_padded,), float("-inf"), tl.float32)
    total = tl.zeros((rows_padded,), tl.float32)
    mixed = tl.zeros((rows_padded, padded_dim), tl.float32)
    if begin < stop:
        asked = tl.load(q + span * q_stride + head[:, None] * head_dim + columns[None, :], mask=mask, other=0.0)
        table = tables + span * table_stride
        for tile_start in range(begin, stop, tile):
            keys_at = tile_start + tl.arange(0, tile)
            places = _places(table, keys_at, stop, kv_head, kv_heads, block_size, head_dim)
            seen = (keys_at >= low) & (keys_at < stop)
            scores = _scores(asked, keys, places, seen[None, :], scale, softcap, columns, head_dim)
            greatest, total, mixed = _add_tile(scores, greatest, total, mixed, values, places, columns, head_dim)
    if parts == 1:
        found = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + span * out_stride + head[:, None] * head_dim + columns[None, :], found, mask=mask)
    else:
        of_head = (span * heads + head) * parts + part
        tl.store(part_out + of_head[:, None] * head_dim + columns[None, :], mixed, mask=mask)
        tl.store(part_sums + of_head * 2, greatest, mask=head < stop_head)
        tl.store(part_sums + of_head * 2 + 1, total, mask=head < stop_head)


@triton.jit
def _combine(
    out,
    part_out,
    part_sums,
    heads,
    out_stride,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,
):
    """Join the parts of one head of a one-token span."""
    span, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, columns = tl.arange(0, padded_parts), tl.arange(0, padded_dim)
    at = (span * heads + head) * parts + part
    greatest = tl.load(part_sums + at * 2, mask=part < parts, other=float("-inf"))
    total = tl.load(part_sums + at * 2 + 1, mask=part < parts, other=0.0)
    weights = tl.exp2(greatest - tl.max(greatest, 0))
    mask = (part < parts)[:, None] & (columns[None, :] < head_dim)
    mixed = tl.load(part_out + at[:, None] * head_dim + columns[None, :], mask=mask, other=0.0)
    found = tl.sum(mixed * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out + span * out_stride + head * head_dim + columns, found.to(out.dtype.element_ty), mask=columns < head_dim)


def attend(
    q: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: SpanTable,
    groups: Tensor,
    largest_group: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    processors: int,
    stages: int,
) -> None:
    """Attention of all spans; `Kernels.paged_attention` says what the tensors are.

    Args:
        q, out, keys, values, spans, groups, window, scale, softcap: As there.
        largest_group: Most query heads on a KV head.
        processors: Of the GPU: how many programs run at a time.
        stages: Tiles that are on their way to a program at a time.
    """
    tokens, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    padded_dim, group = max(triton.next_power_of_2(head_dim), LEAST_ROWS), triton.next_power_of_2(largest_group)
    strides = (q.stride(0), out.stride(0), spans.tables.stride(0))
    layer = {"scale": scale, "softcap": softcap or 0.0, "window": window or 0, "block_size": block_size}
    layer |= {"head_dim": head_dim, "padded_dim": padded_dim}
    narrower = max(padded_dim * q.element_size() // 256, 1)  # the longer a key, the fewer fit beside one another
    if spans.longest > 1:
        queries = max(SPAN_ROWS // group, 1)
        programs = tokens // queries + spans.count
        tile = max(SPAN_TILE // narrower, LEAST_ROWS)
        where = (spans.offsets, spans.contexts, spans.tables, groups, spans.count, kv_heads)
        cut = {"group": group, "queries": queries, "tile": tile}
        _attend_spans[programs, kv_heads](q, out, keys, values, *where, *strides, **layer, **cut, num_stages=stages)
        return
    parts = _parts(spans, kv_heads, window, processors)
    part_out = q.new_empty(0) if parts == 1 else q.new_empty(tokens, heads, parts, head_dim, dtype=torch.float32)
    part_sums = q.new_empty(0) if parts == 1 else q.new_empty(tokens, heads, parts, 2, dtype=torch.float32)
    where = (spans.contexts, spans.tables, groups, part_out, part_sums, kv_heads, heads)
    cut = {"rows_padded": max(group, LEAST_ROWS), "tile": max(PART_TILE // narrower, LEAST_ROWS), "parts": parts}
    _attend_tokens[tokens, kv_heads, parts](q, out, keys, values, *where, *strides, **layer, **cut, num_stages=stages)
    if parts > 1:
        padded = {"padded_dim": padded_dim, "parts": parts, "padded_parts": triton.next_power_of_2(parts)}
        _combine[tokens, heads](out, part_out, part_sums, heads, out.stride(0), head_dim=head_dim, **padded)


def _parts(spans: SpanTable, kv_heads: int, window: int | None, processors: int) -> int:
    """Into how many parts each context is cut, a power of two, so that few variants are compiled."""
    longest = spans.longest_context if window is None else min(spans.longest_context, window)
    wanted = min(processors * PROGRAMS_PER_PROCESSOR // (spans.count * kv_heads), longest // PART_TILE, MOST_PARTS)
    return 1 << max(wanted.bit_length() - 1, 0)
