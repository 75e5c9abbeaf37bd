"""The work a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class WorkloadOptions:
    """The work of a plan: sequences alike, all there from the beginning."""

    prompt_tokens: int = option(1024, "tokens of a prompt", low=1)
    output_tokens: int = option(256, "tokens produced after it; 0 when prompts are only scored", low=0)
    sequences: int = option(64, "sequences, over all replicas", low=1)
