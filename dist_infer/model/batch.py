"""What one forward pass reads: a flat ragged batch of spans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_infer.model.attention import AttentionPlan


@dataclass
class Batch:
    """The spans of one step on one rank, flattened: `tokens` of them in all.

    Attributes:
        tokens: [tokens] token ids.
        positions: [tokens] position of each in its sequence.
        rope_lengths: [tokens] length that decides the rotary regime; None when no token has left the first.
        cache_slots: [tokens] where keys and values go: block * block_size + offset.
        logit_rows: [rows] indices of the tokens whose logits are wanted.
        attention: What every layer's attention shares.
    """

    tokens: Tensor
    positions: Tensor
    rope_lengths: Tensor | None
    cache_slots: Tensor
    logit_rows: Tensor
    attention: AttentionPlan

    @classmethod
    def empty(cls, device: torch.device) -> Batch:
        """A batch without spans: what a rank with nothing to do steps with."""
        none = torch.empty(0, dtype=torch.long, device=device)
        return cls(none, none, None, none, none, AttentionPlan.build([], 1, device))
