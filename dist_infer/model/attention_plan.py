"""What the attention of every layer shares in one step: which tokens read which blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dist_infer.model.cache import KVCache
from dist_infer.model.transfer import all_to_device, to_device

IntArray = np.ndarray


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
class BlockPairs:
    """Decodes span by block, for eager attention, which gathers queries to the blocks they read.

    `owner` and `blocks` are in pool order when the blocks in use lie close together and are not
    shared: then keys and values are read as a slice of the pool. Otherwise blocks are gathered.
    In such a slice there may be blocks of nobody's; what is computed for them is not read.
    """

    owner: Tensor  # [pairs] span of each pair
    blocks: Tensor | None  # [pairs] block of each pair; None when the pairs are the pool's slice
    first: int  # where that slice starts
    to_spans: Tensor  # [spans * width] pair of each span's i-th block; of its first, beyond its last
    to_pairs: Tensor  # [pairs] the inverse; any for a pair without a span
    used: Tensor  # [blocks of all spans] `to_spans` without what is beyond
    starts: Tensor  # [spans] where each span's part of `used` starts

    @classmethod
    def of(cls, tables: IntArray, counts: IntArray, device: torch.device) -> BlockPairs:
        """The pairs of spans whose block tables [spans, width] have `counts` [spans] entries in use."""
        width = tables.shape[1]
        in_use = np.arange(width) < counts[:, None]
        blocks, owner = tables[in_use].astype(np.int64), np.nonzero(in_use)[0]
        place = np.nonzero(in_use.reshape(-1))[0]  # of each pair in the padded [spans * width] order
        starts = np.cumsum(counts) - counts
        first, stop = int(blocks.min()), int(blocks.max()) + 1
        if stop - first <= 1.5 * len(blocks) and len(np.unique(blocks)) == len(blocks):
            owners, to_pairs = np.zeros(stop - first, dtype=np.int64), np.zeros(stop - first, dtype=np.int64)
            owners[blocks - first], to_pairs[blocks - first] = owner, place
            pairs, gathered = blocks - first, None
        else:
            owners, to_pairs, gathered = owner, place, to_device(blocks, device)
            pairs = np.arange(len(blocks))
        to_spans = np.repeat(pairs[starts], width)
        to_spans[place] = pairs
        tensors = all_to_device([owners, to_spans, to_pairs, pairs, starts], device)
        owner_tensor, to_spans_tensor, to_pairs_tensor, used, starts_tensor = tensors
        return cls(owner_tensor, gathered, first, to_spans_tensor, to_pairs_tensor, used, starts_tensor)

    def score_rows(self, heads: int, width: int) -> tuple[Tensor, Tensor]:
        """How rows of a block's scores are reordered, from [pairs, heads] to [spans, heads, width] and back."""
        every = torch.arange(heads, device=self.owner.device)[:, None]
        to_spans = self.to_spans.view(-1, 1, width) * heads + every
        span, place = self.to_pairs // width, self.to_pairs % width
        to_pairs = (span * heads * width + place)[:, None] + every.view(-1) * width
        return to_spans.view(-1), to_pairs.view(-1)


class SpanTable:
    """All spans of a step, as one call of attention reads them.

    Attributes:
        offsets: [spans + 1] int32, first row of each span in the flat batch, and the end.
        contexts: [spans] int32, tokens that the last of each span sees.
        tables: [spans, width] int32, their block tables; what is beyond a span's last block is not read.
        longest: Rows of the longest span.
        longest_context: The largest of `contexts`.
    """

    def __init__(self, spans: list[Span], block_size: int, device: torch.device) -> None:
        offsets = np.array([*(span.start for span in spans), spans[-1].start + spans[-1].length], dtype=np.int32)
        contexts = np.array([span.context for span in spans], dtype=np.int32)
        self.longest, self.longest_context = int(np.diff(offsets).max()), int(contexts.max())
        self.offsets, self.contexts, self.tables = all_to_device([offsets, contexts, _block_tables(spans, contexts, block_size)], device)
        self.count, self.width = self.tables.shape
        self.pointers = (self.offsets.data_ptr(), self.contexts.data_ptr(), self.tables.data_ptr())  # every layer asks


def _block_tables(spans: list[Span], contexts: np.ndarray, block_size: int) -> np.ndarray:
    """[spans, blocks of the longest] int32."""
    counts = -(-contexts // block_size)
    tables = np.zeros((len(spans), int(counts.max())), dtype=np.int32)
    for row, (span, count) in enumerate(zip(spans, counts.tolist(), strict=True)):
        tables[row, :count] = span.blocks[:count]
    return tables


class Decodes:
    """The one-token spans of a step, as eager attention reads them.

    Attributes:
        rows: [spans] int64, their rows of the flat batch.
        contexts: [spans] int64, tokens each sees.
    """

    def __init__(self, spans: list[Span], block_size: int, device: torch.device) -> None:
        contexts = np.array([span.context for span in spans])
        self._counts, self._block_size, self._device = -(-contexts // block_size), block_size, device
        self._tables = _block_tables(spans, contexts, block_size)
        self.rows, self.contexts = all_to_device([np.array([span.start for span in spans]), contexts], device)
        self._masks: dict[int | None, Tensor] = {}
        self._score_rows: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def width(self) -> int:
        """Blocks of the longest span."""
        return self._tables.shape[1]

    @cached_property
    def tables(self) -> Tensor:
        """[spans, width] their block tables; what is beyond a span's last block is not read."""
        return to_device(self._tables, self._device)

    @cached_property
    def pairs(self) -> BlockPairs:
        """Span by block."""
        return BlockPairs.of(self._tables, self._counts, self._device)

    def score_rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """`BlockPairs.score_rows`, remembered: every layer asks."""
        if heads not in self._score_rows:
            self._score_rows[heads] = self.pairs.score_rows(heads, self.width)
        return self._score_rows[heads]

    def mask(self, window: int | None) -> Tensor:
        """[spans, 1, width * block_size] added to the scores: -inf on slots a span may not see."""
        if window not in self._masks:
            slots = torch.arange(self.width * self._block_size, device=self._device)
            contexts = self.contexts[:, None]
            hidden = slots >= contexts
            if window is not None:
                hidden |= slots < contexts - window
            mask = torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, -math.inf)
            self._masks[window] = mask[:, None]
        return self._masks[window]


class AttentionPlan:
    """What every layer's attention reads in one step.

    Attributes:
        slots: [tokens] int64 where keys and values go: block * block_size + offset.
    """

    def __init__(self, spans: list[Span], slots: Tensor, block_size: int) -> None:
        self.slots, self._device = slots, slots.device
        self._spans, self._block_size = spans, block_size
        self._prefill_masks: dict[tuple[int, int | None], Tensor] = {}
        self._cache_rows: Tensor | None = None

    @cached_property
    def spans(self) -> SpanTable:
        """All spans, of which there is one at least."""
        return SpanTable(self._spans, self._block_size, self._device)

    @cached_property
    def decodes(self) -> Decodes | None:
        """The one-token spans; None when there are none."""
        single = [span for span in self._spans if span.length == 1]
        return Decodes(single, self._block_size, self._device) if single else None

    @cached_property
    def prefills(self) -> list[tuple[Span, Tensor]]:
        """Spans of more than one token, each with its blocks as a tensor."""
        longer = [span for span in self._spans if span.length > 1]
        tables = [span.blocks[: -(-span.context // self._block_size)].astype(np.int64) for span in longer]
        return [(span, to_device(table, self._device)) for span, table in zip(longer, tables, strict=True)]

    def cache_rows(self, cache: KVCache) -> Tensor:
        """`cache.rows` of this step's slots, remembered: every layer asks."""
        if self._cache_rows is None:
            self._cache_rows = cache.rows(self.slots)
        return self._cache_rows

    def prefill_mask(self, index: int, window: int | None) -> Tensor | None:
        """[length, context] of bool, True where a query sees a key; None when plain causal attention will do."""
        span, _ = self.prefills[index]
        if span.length == span.context and (window is None or window >= span.context):
            return None
        if (index, window) not in self._prefill_masks:
            keys = torch.arange(span.context, device=self._device)
            queries = torch.arange(span.context - span.length, span.context, device=self._device)[:, None]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            self._prefill_masks[index, window] = seen
        return self._prefill_masks[index, window]
