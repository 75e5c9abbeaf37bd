"""Self-attention of a layer over the paged KV cache.

A span that is one token long (decode) is computed with all others of its kind at once: by a
compiled kernel, or eagerly, where the *queries* are gathered to the blocks they read, so that keys
and values are multiplied where they lie. Longer spans (prefill) gather their context once and share
it between all their queries.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.attention_plan import AttentionPlan, Decodes
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.layers import Linear, RMSNorm, RowParallelLinear
from dist_infer.model.native import Kernels
from dist_infer.model.rotary import rotate
from dist_infer.model.weights import HeadCut


def attend_decodes(q: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, window: int | None, scale: float) -> Tensor:
    """Attention of one-token spans.

    Args:
        q: [spans, kv_heads, group, head_dim].
        keys: [blocks, kv_heads, block_size, head_dim], the layer's pool; `values` likewise.
        decodes: The spans.
        window: The layer's sliding window.
        scale: Factor on the scores.

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
    scores = scores.view(-1, block_size).index_select(0, to_spans).view(spans, kv_heads * group, -1)
    probabilities = torch.softmax(scores + decodes.mask(window), dim=-1).to(q.dtype)  # the mask makes the scores float32
    probabilities = probabilities.view(-1, block_size).index_select(0, to_pairs).view(count * kv_heads, group, block_size)
    outputs = torch.bmm(probabilities, values.reshape(count * kv_heads, block_size, head_dim))
    # A bag is a sum of rows, in float32 inside.
    outputs = F.embedding_bag(pairs.used, outputs.view(count, -1), pairs.starts, mode="sum")
    return outputs.view(spans, kv_heads, group, head_dim)


def attend_prefill(q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, index: int, window: int | None, scale: float) -> Tensor:
    """Attention of one longer span: q [length, kv_heads, group, head_dim] -> the same shape."""
    span, blocks = plan.prefills[index]
    length, kv_heads, group, head_dim = q.shape
    context_keys, context_values = (
        pool.index_select(0, blocks).transpose(0, 1).reshape(kv_heads, -1, head_dim)[None, :, : span.context] for pool in (keys, values)
    )
    queries = q.permute(1, 2, 0, 3).reshape(1, kv_heads * group, length, head_dim)
    mask = plan.prefill_mask(index, window)
    output = F.scaled_dot_product_attention(
        queries, context_keys, context_values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
    )
    return output.view(kv_heads, group, length, head_dim).permute(2, 0, 1, 3)


class Attention(nn.Module):
    """Self-attention of one layer: this rank's query heads over the KV heads they touch."""

    kernels: Kernels | None = None

    def __init__(self, config: ModelConfig, layer: int, tp: Communicator, device: torch.device) -> None:
        super().__init__()
        cut = HeadCut.of(config, tp.size, tp.rank)
        self.layer = layer
        self.heads, self.kv_heads = cut.heads[1] - cut.heads[0], cut.kv_heads[1] - cut.kv_heads[0]
        self.head_dim, self.window = config.head_dim, config.window(layer)
        self.scale = config.head_dim**-0.5
        self.qkv = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, config.qkv_bias)
        self.q_norm = RMSNorm(self.head_dim, config.head_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.head_norm_eps) if config.qk_norm else None
        self.output = RowParallelLinear(self.heads * self.head_dim, config.hidden_size, config.output_bias, tp)
        counts = _group_sizes(config, cut)
        self.group = max(counts)
        self.groups = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        self.places = _places(counts, device) if min(counts) < self.group else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; the spans' keys and values enter the cache."""
        tokens = len(x)
        if not tokens:
            return self.output(x.new_zeros(0, self.heads * self.head_dim))
        qkv = self.qkv(x).view(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        self._enter(qkv, cos, sin, cache, plan)
        q, keys, values = qkv[:, : self.heads], cache.keys[self.layer], cache.values[self.layer]
        mixed = q.new_empty(tokens, self.heads, self.head_dim)
        if plan.decodes is not None:
            self._decode(q, keys, values, plan.decodes, mixed)
        for index, (span, _) in enumerate(plan.prefills):
            rows = slice(span.start, span.start + span.length)
            mixed[rows] = self._flat(attend_prefill(self._grouped(q[rows]), keys, values, plan, index, self.window, self.scale))
        return self.output(mixed.view(tokens, -1))

    def _enter(self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan) -> None:
        """Normalize and rotate queries and keys, and put keys and values into the cache."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if self.kernels is not None:
            q_weight, k_weight = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
            keys, values, eps = cache.keys[self.layer], cache.values[self.layer], q_norm.eps if q_norm is not None else 0.0
            self.kernels.rotate_and_cache(qkv, self.heads, cos, sin, q_weight, k_weight, eps, plan.slots, keys, values)
            return
        q, kv = qkv.split((self.heads, 2 * self.kv_heads), dim=1)
        if q_norm is not None and k_norm is not None:
            k = kv[:, : self.kv_heads]
            q.copy_(q_norm(q))
            k.copy_(k_norm(k))
        rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        cache.write(self.layer, plan.cache_rows(cache), kv)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, mixed: Tensor) -> None:
        """Write the one-token spans' rows of `mixed`."""
        if self.kernels is not None:
            rows, tables, contexts = decodes.rows, decodes.tables, decodes.contexts
            self.kernels.paged_attention(q, mixed, keys, values, rows, tables, contexts, self.groups, self.window, self.scale)
            return
        if len(decodes.rows) < len(q):
            q = q.index_select(0, decodes.rows)
        mixed.index_copy_(0, decodes.rows, self._flat(attend_decodes(self._grouped(q), keys, values, decodes, self.window, self.scale)))

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


def _group_sizes(config: ModelConfig, cut: HeadCut) -> list[int]:
    """How many of this rank's query heads share each of its KV heads."""
    group = config.heads // config.kv_heads
    owners = [head // group for head in range(*cut.heads)]
    return [owners.count(kv_head) for kv_head in range(*cut.kv_heads)]


def _places(counts: list[int], device: torch.device) -> Tensor:
    """[heads] where each query head goes in [kv_heads * largest group]."""
    largest = max(counts)
    return torch.tensor([kv_head * largest + place for kv_head, count in enumerate(counts) for place in range(count)], device=device)
