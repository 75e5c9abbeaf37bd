"""Attention of transformers' modules over our paged KV cache: the plain formulas, with what families add to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_infer.model.attention_plan import AttentionPlan
from dist_infer.model.cache import KVCache


class PagedAttention:
    """What every attention layer of a module computes with; given the cache and the plan of each step."""

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._plan: AttentionPlan | None = None

    def enter(self, cache: KVCache, plan: AttentionPlan) -> None:
        """Begin a step."""
        self._cache, self._plan = cache, plan

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The spans' keys and values enter the cache, and their queries see what their sequences hold there.

        Args:
            layer: Index of the layer.
            query: [1, heads, tokens, head_dim], all spans in one row.
            key: [1, kv_heads, tokens, head_dim].
            value: [1, kv_heads, tokens, head_dim of values].
            scaling: Factor on the scores; None for the usual one.
            sliding_window: Tokens that a token sees, itself included.
            softcap: Bound on the scores.
            s_aux: [heads] scores of a key that is always there and has no value.
            others: What does not matter here; that nothing else does is seen by `comparison`.

        Returns:
            [1, tokens, heads, head_dim of values].
        """
        cache, plan = self._cache, self._plan
        assert cache is not None and plan is not None
        q, width, out_width = query[0].transpose(0, 1), key.shape[3], value.shape[3]
        tokens, heads, _ = q.shape
        size = cache.keys[layer].shape[-1]
        entering = torch.cat([F.pad(x[0], (0, size - x.shape[3])) for x in (key, value)]).transpose(0, 1)
        cache.write(layer, plan.cache_rows(cache), entering.to(cache.keys[layer].dtype))
        scale = width**-0.5 if scaling is None else scaling
        mixed = q.new_empty(tokens, heads, out_width)

        def context(blocks: Tensor) -> tuple[Tensor, Tensor]:
            """Keys and values in the blocks [spans, width], each [spans, kv_heads, tokens, head_dim]."""
            pools = ((cache.keys[layer], width), (cache.values[layer], out_width))
            found = [pool[blocks].transpose(1, 2).flatten(2, 3)[..., :columns] for pool, columns in pools]
            return found[0], found[1]

        if plan.decodes is not None:
            rows, mask = plan.decodes.rows, plan.decodes.mask(sliding_window)[:, None]
            keys, values = context(plan.decodes.tables.long())
            mixed[rows] = _mix(q[rows][:, :, None], keys, values, mask, scale, softcap, s_aux)[:, :, 0]
        for index, (span, blocks) in enumerate(plan.prefills):
            keys, values = (x[:, :, : span.context] for x in context(blocks[None]))
            seen = plan.prefill_mask(index, sliding_window)
            if seen is None:
                seen = torch.ones(span.length, span.context, dtype=torch.bool, device=q.device).tril()
            mask = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, float("-inf"))
            rows = slice(span.start, span.start + span.length)
            mixed[rows] = _mix(q[rows].transpose(0, 1)[None], keys, values, mask, scale, softcap, s_aux)[0].transpose(0, 1)
        return mixed[None]


def _mix(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """q [spans, heads, length, head_dim] over keys and values [spans, kv_heads, context, ...]; `mask` is added to the scores."""
    spans, heads, length, _ = q.shape
    group = heads // keys.shape[1]
    if softcap is None and sinks is None:
        mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=group > 1)
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))
    scores = q @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, heads, 1, 1).expand(spans, heads, length, 1)), dim=-1)
    probabilities = torch.softmax(scores, dim=-1)[..., : keys.shape[2]]
    return probabilities.to(q.dtype) @ values
