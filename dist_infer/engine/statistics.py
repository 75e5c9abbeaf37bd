"""What an engine has done: steps, tokens and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_infer.engine.scheduler import Entry


@dataclass
class Statistics:
    """Sums over the steps of an engine.

    Attributes:
        prompt_tokens: Of all prompts submitted.
        cached_tokens: Of those, found in the prefix cache.
        output_tokens: Produced.
        prefill_tokens, prefill_seconds: Computed in spans longer than one, and the steps that had such spans.
        decode_tokens, decode_seconds: Computed in all other steps.
        steps: All.
        resolved: Rows decided from their full logits.
        leader_seconds: The leader's own work between steps (schedules, decisions, text); not its part of the model, nor what it waits for.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    resolved: int = 0
    leader_seconds: float = 0.0

    def count(self, entries: Sequence[Entry], seconds: float) -> None:
        """Add a step."""
        self.steps += 1
        prompts = sum(entry.length for entry in entries if entry.length > 1)
        if prompts:
            self.prefill_tokens += prompts
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += len(entries)
            self.decode_seconds += seconds
