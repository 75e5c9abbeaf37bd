"""Attention over the paged KV cache.

The cache of a layer is a pool of blocks, [blocks, kv_heads, block_size, head_dim]. A span that is
one token long (decode) is computed with all others of its kind at once, and the *queries* are
gathered to the blocks they read, so that keys and values are multiplied where they lie; longer
spans (prefill) gather their context once and share it between all their queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.config import ModelConfig
from dist_infer.model.layers import Linear, RMSNorm, RowParallelLinear
from dist_infer.model.rotary import rotate
from dist_infer.model.weights import HeadCut

IntArray = np.ndarray


class KVCache:
    """The KV blocks of one rank: its KV heads (tp) of its sequences (fsdp). Block 0 belongs to nobody."""

    def __init__(
        self, layers: int, blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, blocks, kv_heads, block_size, head_dim)
        self.block_size = block_size
        self._pools = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.keys = [pool[0] for pool in self._pools]
        self.values = [pool[1] for pool in self._pools]

    def rows(self, slots: Tensor) -> Tensor:
        """[tokens * 2 * kv_heads] where `write` puts the heads of tokens whose `slots` [tokens] are given; the same in every layer."""
        _, blocks, kv_heads, block_size, _ = self._pools[0].shape
        heads = torch.arange(kv_heads, device=slots.device) * block_size
        heads = torch.cat((heads, heads + blocks * kv_heads * block_size))
        first = slots // block_size * (kv_heads * block_size) + slots % block_size
        return (first[:, None] + heads).view(-1)

    def write(self, layer: int, rows: Tensor, heads: Tensor) -> None:
        """Put `heads` [tokens, 2 * kv_heads, head_dim], keys and then values, into `rows` of `layer`."""
        head_dim = heads.shape[-1]
        self._pools[layer].view(-1, head_dim).index_copy_(0, rows, heads.reshape(-1, head_dim))

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks, in every layer."""
        for pool in self._pools:
            pool[:, targets] = pool[:, sources]


@dataclass(frozen=True)
class Span:
    """A sequence's part of the batch, as attention sees it.

    Attributes:
        start: First row in the flat batch.
        length: Rows.
        context: Tokens of the sequence once this span is in the cache.
        blocks: Its block table, at least ceil(context / block_size) entries.
    """

    start: int
    length: int
    context: int
    blocks: IntArray


@dataclass
class Decodes:
    """All one-token spans of a step, and which blocks they read.

    `pairs` are (block, span) in pool order when the blocks in use lie close together and are not
    shared: then keys and values are read as a slice of the pool. Otherwise blocks are gathered.
    In such a slice there may be blocks of nobody's; what is computed for them is not read.
    """

    rows: Tensor  # [spans] rows of the flat batch
    owner: Tensor  # [pairs] span of each pair
    blocks: Tensor | None  # [pairs] block of each pair; None when the pairs are the pool's slice
    first: int  # where that slice starts
    to_spans: Tensor  # [spans * width] pair of each span's i-th block; of its first, beyond its last
    to_pairs: Tensor  # [pairs] the inverse; any for a pair without a span
    used: Tensor  # [blocks of all spans] `to_spans` without what is beyond
    starts: Tensor  # [spans] where each span's part of `used` starts
    width: int  # blocks of the longest span
    contexts: Tensor  # [spans]


class AttentionPlan:
    """What the attention of every layer shares in one step."""

    def __init__(self, decodes: Decodes | None, prefills: list[tuple[Span, Tensor]], block_size: int, device: torch.device) -> None:
        self.decodes, self.prefills = decodes, prefills
        self.block_size, self.device = block_size, device
        self._decode_masks: dict[int | None, Tensor] = {}
        self._decode_rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._prefill_masks: dict[tuple[int, int | None], Tensor] = {}

    @classmethod
    def build(cls, spans: list[Span], block_size: int, device: torch.device) -> AttentionPlan:
        """Sort the spans of a step into decodes and prefills."""
        single = [span for span in spans if span.length == 1]
        prefills = []
        for span in spans:
            if span.length > 1:
                count = -(-span.context // block_size)
                prefills.append((span, torch.from_numpy(span.blocks[:count].astype(np.int64)).to(device)))
        return cls(_plan_decodes(single, block_size, device) if single else None, prefills, block_size, device)

    def decode_mask(self, window: int | None) -> Tensor:
        """[spans, 1, width * block_size] added to the scores: -inf on slots a span may not see."""
        assert self.decodes is not None
        if window not in self._decode_masks:
            slots = torch.arange(self.decodes.width * self.block_size, device=self.device)
            contexts = self.decodes.contexts[:, None]
            hidden = slots >= contexts
            if window is not None:
                hidden |= slots < contexts - window
            mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -math.inf)
            self._decode_masks[window] = mask[:, None]
        return self._decode_masks[window]

    def decode_rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """How rows of a block's scores are reordered, from [pairs, heads] to [spans, heads, width] and back."""
        decodes = self.decodes
        assert decodes is not None
        if heads not in self._decode_rows:
            every, width = torch.arange(heads, device=self.device)[:, None], decodes.width
            to_spans = decodes.to_spans.view(-1, 1, width) * heads + every
            span, place = decodes.to_pairs // width, decodes.to_pairs % width
            to_pairs = (span * heads * width + place)[:, None] + every.view(-1) * width
            self._decode_rows[heads] = to_spans.view(-1), to_pairs.view(-1)
        return self._decode_rows[heads]

    def prefill_mask(self, index: int, window: int | None) -> Tensor | None:
        """[length, context] of bool, True where a query sees a key; None when plain causal attention will do."""
        span, _ = self.prefills[index]
        if span.length == span.context and (window is None or window >= span.context):
            return None
        if (index, window) not in self._prefill_masks:
            keys = torch.arange(span.context, device=self.device)
            queries = torch.arange(span.context - span.length, span.context, device=self.device)[:, None]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            self._prefill_masks[index, window] = seen
        return self._prefill_masks[index, window]


def _plan_decodes(spans: list[Span], block_size: int, device: torch.device) -> Decodes:
    contexts = np.array([span.context for span in spans])
    counts = -(-contexts // block_size)
    width = int(counts.max())
    tables = np.zeros((len(spans), width), dtype=np.int64)
    for row, (span, count) in enumerate(zip(spans, counts, strict=True)):
        tables[row, :count] = span.blocks[:count]
    used = np.arange(width) < counts[:, None]
    blocks, owner = tables[used], np.nonzero(used)[0]
    place = np.nonzero(used.reshape(-1))[0]  # of each pair in the padded [spans * width] order
    starts = np.cumsum(counts) - counts
    first, stop = int(blocks.min()), int(blocks.max()) + 1
    if stop - first <= 1.5 * len(blocks) and len(np.unique(blocks)) == len(blocks):
        owners, to_pairs = np.zeros(stop - first, dtype=np.int64), np.zeros(stop - first, dtype=np.int64)
        owners[blocks - first], to_pairs[blocks - first] = owner, place
        pairs, gathered = blocks - first, None
    else:
        owners, to_pairs, gathered = owner, place, torch.from_numpy(blocks).to(device)
        pairs = np.arange(len(blocks))
    to_spans = np.repeat(pairs[starts], width)
    to_spans[place] = pairs
    return Decodes(
        rows=torch.tensor([span.start for span in spans], device=device),
        owner=torch.from_numpy(owners).to(device),
        blocks=gathered,
        first=first,
        to_spans=torch.from_numpy(to_spans).to(device),
        to_pairs=torch.from_numpy(to_pairs).to(device),
        used=torch.from_numpy(pairs).to(device),
        starts=torch.from_numpy(starts).to(device),
        width=width,
        contexts=torch.from_numpy(contexts).to(device),
    )


def attend_decodes(q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, window: int | None, scale: float) -> Tensor:
    """Attention of one-token spans.

    Args:
        q: [spans, kv_heads, group, head_dim].
        keys: [blocks, kv_heads, block_size, head_dim], the layer's pool; `values` likewise.
        plan: The step's plan.
        window: The layer's sliding window.
        scale: Factor on the scores.

    Returns:
        [spans, kv_heads, group, head_dim].
    """
    decodes, block_size = plan.decodes, plan.block_size
    assert decodes is not None
    spans, kv_heads, group, head_dim = q.shape
    pairs = len(decodes.owner)
    if decodes.blocks is None:
        keys, values = keys[decodes.first : decodes.first + pairs], values[decodes.first : decodes.first + pairs]
    else:
        keys, values = keys.index_select(0, decodes.blocks), values.index_select(0, decodes.blocks)
    to_spans, to_pairs = plan.decode_rows(kv_heads * group)
    queries = (q * scale).index_select(0, decodes.owner).view(pairs * kv_heads, group, head_dim)
    scores = torch.bmm(queries, keys.reshape(pairs * kv_heads, block_size, head_dim).transpose(1, 2))
    scores = scores.view(-1, block_size).index_select(0, to_spans).view(spans, kv_heads * group, -1)
    probabilities = torch.softmax(scores + plan.decode_mask(window), dim=-1).to(q.dtype)  # the mask makes the scores float32
    probabilities = probabilities.view(-1, block_size).index_select(0, to_pairs).view(pairs * kv_heads, group, block_size)
    outputs = torch.bmm(probabilities, values.reshape(pairs * kv_heads, block_size, head_dim))
    # A bag is a sum of rows, in float32 inside.
    outputs = F.embedding_bag(decodes.used, outputs.view(pairs, -1), decodes.starts, mode="sum")
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
        self.group, self.places = _group_places(config, cut, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan, rows: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; the span's keys and values enter `rows` of the cache."""
        tokens = len(x)
        if not tokens:
            return self.output(x.new_zeros(0, self.heads * self.head_dim))
        qkv = self.qkv(x).view(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        q, kv = qkv.split((self.heads, 2 * self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            k = kv[:, : self.kv_heads]
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        cache.write(self.layer, rows, kv)
        mixed = self._mix(self._grouped(q), cache.keys[self.layer], cache.values[self.layer], plan)
        mixed = mixed.reshape(tokens, self.kv_heads * self.group, self.head_dim)
        if self.places is not None:
            mixed = mixed.index_select(1, self.places)
        return self.output(mixed.reshape(tokens, -1))

    def _mix(self, q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
        """q [tokens, kv_heads, group, head_dim] -> the same shape."""
        decodes = plan.decodes
        if decodes is not None and not plan.prefills:
            return attend_decodes(q, keys, values, plan, self.window, self.scale)
        mixed = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes is not None:
            mixed[decodes.rows] = attend_decodes(q[decodes.rows], keys, values, plan, self.window, self.scale)
        for index, (span, _) in enumerate(plan.prefills):
            rows = slice(span.start, span.start + span.length)
            mixed[rows] = attend_prefill(q[rows], keys, values, plan, index, self.window, self.scale)
        return mixed

    def _grouped(self, q: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> [tokens, kv_heads, group, head_dim]; short groups are padded with zeros."""
        if self.places is not None:
            padded = q.new_zeros(len(q), self.kv_heads * self.group, self.head_dim)
            q = padded.index_copy_(1, self.places, q)
        return q.reshape(len(q), self.kv_heads, self.group, self.head_dim)


def _group_places(config: ModelConfig, cut: HeadCut, device: torch.device) -> tuple[int, Tensor | None]:
    """Largest number of this rank's query heads on one KV head, and where each head goes in [kv_heads * group] (None: in order)."""
    group = config.heads // config.kv_heads
    local = [head // group - cut.kv_heads[0] for head in range(*cut.heads)]
    counts = [local.count(kv_head) for kv_head in range(cut.kv_heads[1] - cut.kv_heads[0])]
    largest = max(counts)
    if min(counts) == largest:
        return largest, None
    seen = [0] * len(counts)
    places = []
    for kv_head in local:
        places.append(kv_head * largest + seen[kv_head])
        seen[kv_head] += 1
    return largest, torch.tensor(places, device=device)
