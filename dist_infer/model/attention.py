"""Self-attention of a layer over the paged KV cache.

A compiled kernel takes all spans at once. Without one, the spans that are one token long (decode) are
computed together: the *queries* are gathered to the blocks they read, so that keys and values are multiplied
where they lie. Longer spans (prefill) gather their context once and share it between all their queries.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.attention_plan import AttentionPlan, Decodes
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.layer import Layer
from dist_infer.model.layers import Linear, RMSNorm, RowParallelLinear
from dist_infer.model.native import Kernels
from dist_infer.model.rotary import rotate
from dist_infer.model.weights import HeadCut

# Queries whose softcapped scores exist at a time.
SOFTCAP_ROWS = 128


def attend_decodes(
    q: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, window: int | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of one-token spans.

    Args:
        q: [spans, kv_heads, group, head_dim].
        keys: [blocks, kv_heads, block_size, head_dim], the layer's pool; `values` likewise.
        decodes: The spans.
        window: The layer's sliding window.
        scale: Factor on the scores.
        softcap: What keeps them below itself, if anything does.

    Returns:
        [spans, kv_heads, group, head_dim].
    """
    pairs = decodes.pairs
    spans, kv_heads, group, head_dim = q.shape
    count, block_size = len(pairs.owner), keys.shape[2]
    if pairs.blocks is None:
        keys, values = keys[pairs.first : pairs.first + count], values[pairs.first : pairs.first + count]
    else:
        keys, values = keys.index_select(0, pairs.blocks), values.index_select(0, pairs.blocks)
    to_spans, to_pairs = decodes.score_rows(kv_heads * group)
    queries = (q * scale).index_select(0, pairs.owner).view(count * kv_heads, group, head_dim)
    scores = torch.bmm(queries, keys.reshape(count * kv_heads, block_size, head_dim).transpose(1, 2))
    scores = _capped(scores.view(-1, block_size).index_select(0, to_spans).view(spans, kv_heads * group, -1), softcap)
    probabilities = torch.softmax(scores + decodes.mask(window), dim=-1).to(q.dtype)  # the mask makes the scores float32
    probabilities = probabilities.view(-1, block_size).index_select(0, to_pairs).view(count * kv_heads, group, block_size)
    outputs = torch.bmm(probabilities, values.reshape(count * kv_heads, block_size, head_dim))
    # A bag is a sum of rows, in float32 inside.
    outputs = F.embedding_bag(pairs.used, outputs.view(count, -1), pairs.starts, mode="sum")
    return outputs.view(spans, kv_heads, group, head_dim)


def attend_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
    index: int,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one longer span: q [length, kv_heads, group, head_dim] -> the same shape."""
    span, blocks = plan.prefills[index]
    length, kv_heads, group, head_dim = q.shape
    context_keys, context_values = (
        pool.index_select(0, blocks).transpose(0, 1).reshape(kv_heads, -1, head_dim)[None, :, : span.context] for pool in (keys, values)
    )
    queries = q.permute(1, 2, 0, 3).reshape(1, kv_heads * group, length, head_dim)
    mask = plan.prefill_mask(index, window)
    if softcap is not None:
        return _attend_capped(q, context_keys[0], context_values[0], mask, scale, softcap)
    output = F.scaled_dot_product_attention(
        queries, context_keys, context_values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
    )
    return output.view(kv_heads, group, length, head_dim).permute(2, 0, 1, 3)


def _attend_capped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """`attend_prefill` over the context [kv_heads, context, head_dim], some queries at a time, for want of a fused operation that caps."""
    length, kv_heads, group, head_dim = q.shape
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    outputs = []
    for start in range(0, length, SOFTCAP_ROWS):
        queries, seen = q[start : start + SOFTCAP_ROWS], mask[start : start + SOFTCAP_ROWS]
        scores = (queries * scale).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim) @ keys.transpose(1, 2)
        scores = _capped(scores.float(), softcap).masked_fill_(~seen.repeat(group, 1), -math.inf)
        output = torch.softmax(scores, dim=-1).to(q.dtype) @ values
        outputs.append(output.view(kv_heads, group, -1, head_dim).permute(2, 0, 1, 3))
    return torch.cat(outputs)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


class Attention(Layer):
    """Self-attention of one layer: this rank's query heads over the KV heads they touch."""

    kernels: Kernels | None = None

    def __init__(self, config: ModelConfig, layer: int, tp: Communicator, device: torch.device) -> None:
        super().__init__()
        cut = HeadCut.of(config, tp.size, tp.rank)
        self.layer = layer
        self.heads, self.kv_heads = cut.heads[1] - cut.heads[0], cut.kv_heads[1] - cut.kv_heads[0]
        self.head_dim, self.window = config.head_dim, config.window(layer)
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap = config.attention_softcap
        self.qkv = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, config.qkv_bias)
        self.q_norm = self.k_norm = self.norm_across = None
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(self.head_dim, config.head_norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(self.head_dim, config.head_norm_eps, config.norm_offset)
        elif config.qk_norm == "full":
            self.norm_across = NormAcrossHeads(config, cut, tp)
        self.output = RowParallelLinear(self.heads * self.head_dim, config.hidden_size, config.output_bias, tp)
        counts = _group_sizes(config, cut)
        self.group = max(counts)
        self.groups = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        self.places = _places(counts, device) if min(counts) < self.group else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan, rows: Tensor | None = None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden], of `rows` if given; the spans' keys and values enter the cache."""
        tokens = len(x)
        if not tokens:
            return self.output(x.new_zeros(0, self.heads * self.head_dim))
        qkv = self.qkv(x).view(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        self._enter(qkv, cos, sin, cache, plan)
        q, keys, values = qkv[:, : self.heads], cache.keys[self.layer], cache.values[self.layer]
        mixed = q.new_empty(tokens, self.heads, self.head_dim)
        if self.kernels is not None:
            self.kernels.paged_attention(q, mixed, keys, values, plan.spans, self.groups, self.window, self.scale, self.softcap)
        else:
            self._attend_eagerly(q, keys, values, plan, mixed)
        mixed = mixed.view(tokens, -1)
        return self.output(mixed if rows is None else mixed.index_select(0, rows))

    def _attend_eagerly(self, q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, mixed: Tensor) -> None:
        """Write `mixed` [tokens, heads, head_dim]."""
        decodes = plan.decodes
        if decodes is not None:
            single = q if len(decodes.rows) == len(q) else q.index_select(0, decodes.rows)
            found = attend_decodes(self._grouped(single), keys, values, decodes, self.window, self.scale, self.softcap)
            mixed.index_copy_(0, decodes.rows, self._flat(found))
        for index, (span, _) in enumerate(plan.prefills):
            rows = slice(span.start, span.start + span.length)
            grouped = self._grouped(q[rows])
            mixed[rows] = self._flat(attend_prefill(grouped, keys, values, plan, index, self.window, self.scale, self.softcap))

    def _enter(self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan) -> None:
        """Normalize and rotate queries and keys, and put keys and values into the cache."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if self.norm_across is not None:
            self.norm_across(qkv)
        if self.kernels is not None:
            q_weight, k_weight = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
            eps, offset = (q_norm.eps, q_norm.offset) if q_norm is not None else (0.0, 0.0)
            keys, values = cache.keys[self.layer], cache.values[self.layer]
            self.kernels.rotate_and_cache(qkv, self.heads, cos, sin, q_weight, k_weight, eps, offset, plan.slots, keys, values)
            return
        q, kv = qkv.split((self.heads, 2 * self.kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            k = kv[:, : self.kv_heads]
            q.copy_(q_norm(q))
            k.copy_(k_norm(k))
        rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        cache.write(self.layer, plan.cache_rows(cache), kv)

    def _grouped(self, q: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, kv_heads, group, head_dim]; short groups are padded with zeros."""
        if self.places is not None:
            padded = q.new_zeros(len(q), self.kv_heads * self.group, self.head_dim)
            q = padded.index_copy_(1, self.places, q)
        return q.reshape(len(q), self.kv_heads, self.group, self.head_dim)

    def _flat(self, mixed: Tensor) -> Tensor:
        """The inverse of `_grouped`."""
        mixed = mixed.reshape(len(mixed), self.kv_heads * self.group, self.head_dim)
        return mixed if self.places is None else mixed.index_select(1, self.places)


class NormAcrossHeads(Layer):
    """RMS normalization of a token's queries, and of its keys, each over all heads of the layer: squares are summed over tp."""

    def __init__(self, config: ModelConfig, cut: HeadCut, tp: Communicator) -> None:
        super().__init__()
        self.heads, self.kv_heads = cut.heads[1] - cut.heads[0], cut.kv_heads[1] - cut.kv_heads[0]
        self.q_weight = nn.Parameter(torch.empty(self.heads * config.head_dim), requires_grad=False)
        self.k_weight = nn.Parameter(torch.empty(self.kv_heads * config.head_dim), requires_grad=False)
        self.sizes = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.eps, self.offset, self.tp = config.head_norm_eps, config.norm_offset, tp
        # A KV head that two ranks hold is counted by the first.
        self.counted_before = HeadCut.of(config, tp.size, tp.rank - 1).kv_heads[1] - cut.kv_heads[0] if tp.rank else 0

    def forward(self, qkv: Tensor) -> None:
        """qkv [tokens, heads + 2 * kv_heads, head_dim] of this rank, in place."""
        q, k, _ = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        squares = torch.stack([part.float().square().sum((1, 2)) for part in (q, k[:, self.counted_before :])])
        self.tp.all_reduce(squares)
        for part, weight, sums, size in zip((q, k), (self.q_weight, self.k_weight), squares, self.sizes, strict=True):
            factor = torch.rsqrt(sums / size + self.eps)[:, None, None]
            part.copy_(part.float() * factor * (weight.float() + self.offset).view(part.shape[1:]))


def _group_sizes(config: ModelConfig, cut: HeadCut) -> list[int]:
    """How many of this rank's query heads share each of its KV heads."""
    group = config.heads // config.kv_heads
    owners = [head // group for head in range(*cut.heads)]
    return [owners.count(kv_head) for kv_head in range(*cut.kv_heads)]


def _places(counts: list[int], device: torch.device) -> Tensor:
    """[heads] where each query head goes in [kv_heads * largest group]."""
    largest = max(counts)
    return torch.tensor([kv_head * largest + place for kv_head, count in enumerate(counts) for place in range(count)], device=device)
