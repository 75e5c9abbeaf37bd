"""What one forward pass reads: a flat ragged batch of spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_infer.model.attention_plan import AttentionPlan, Span
from dist_infer.model.rotary import Rotary
from dist_infer.model.transfer import all_to_device, to_device


@dataclass(frozen=True)
class TokenSpan:
    """Tokens of one sequence that enter the model together.

    Attributes:
        tokens: Token ids.
        start: Position of the first.
        blocks: The sequence's block table, long enough for the last.
        rows: Of how many of the last tokens the logits are wanted.
        anchor: Length that decides the rotary regime at least (see `rotary`); 0 for the span's own.
    """

    tokens: Sequence[int]
    start: int
    blocks: np.ndarray
    rows: int = 1
    anchor: int = 0


@dataclass
class Batch:
    """The spans of one step on one rank, flattened: `tokens` of them in all.

    Attributes:
        tokens: [tokens] token ids.
        positions: [tokens] position of each in its sequence.
        rope_lengths: [tokens] length that decides the rotary regime; None when no token has left the first.
        logit_rows: [rows] indices of the tokens whose logits are wanted.
        attention: What every layer's attention shares.
    """

    tokens: Tensor
    positions: Tensor
    rope_lengths: Tensor | None
    logit_rows: Tensor
    attention: AttentionPlan

    @classmethod
    def of(cls, spans: Sequence[TokenSpan], block_size: int, rotary: Rotary, device: torch.device) -> Batch:
        """Flatten `spans`, in order; none makes the batch of a rank that only keeps step with others."""
        if not spans:
            none = torch.empty(0, dtype=torch.long, device=device)
            return cls(none, none, None, none, AttentionPlan([], none, block_size))
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        attention: list[Span] = []
        for span in spans:
            count, first = len(span.tokens), len(tokens)
            end = span.start + count
            tokens += span.tokens
            positions += range(span.start, end)
            if count == 1:  # of many: an array for each would take longer than the rest
                slots.append(int(span.blocks[span.start // block_size]) * block_size + span.start % block_size)
            else:
                at = np.arange(span.start, end)
                slots += (span.blocks[at // block_size].astype(np.int64) * block_size + at % block_size).tolist()
            logit_rows += range(first + count - span.rows, first + count)
            attention.append(Span(first, count, end, span.blocks))
        position_array = np.array(positions)
        arrays = [np.array(tokens), position_array, np.array(logit_rows, dtype=np.int64), np.array(slots)]
        token_ids, at_positions, at_rows, at_slots = all_to_device(arrays, device)
        rope_lengths = _rope_lengths(spans, position_array, rotary, device)
        return cls(token_ids, at_positions, rope_lengths, at_rows, AttentionPlan(attention, at_slots, block_size))


def _rope_lengths(spans: Sequence[TokenSpan], positions: np.ndarray, rotary: Rotary, device: torch.device) -> Tensor | None:
    """[tokens] length that decides each token's rotary regime; None when none has left the first."""
    if not rotary.depends_on_length:
        return None
    anchors = np.repeat([span.anchor for span in spans], [len(span.tokens) for span in spans])
    lengths = np.maximum(anchors, positions + 1)
    return to_device(lengths, device) if lengths.max() > rotary.threshold else None
