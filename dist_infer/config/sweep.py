"""A sweep: which checkpoints, and what is done with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_infer.config.field import option


@dataclass
class SweepOptions:
    """checkpoints x grid; each checkpoint is loaded once."""

    checkpoints: list[str] = option([], "checkpoint directories; patterns such as runs/*/step_* are allowed; a run means all its steps")
    steps: str | None = option(None, "steps to take: 100,200 or 1000-5000 or 1000-5000:1000")
    inputs: list[str] = option([], "JSONL files of prompts, generated from by every checkpoint")
    grid: dict[str, list[Any]] = option({}, "option to its values, such as {sampling.seed: [1, 2]}: sampling.* and eval.* keys")
    share: str | None = option(None, "I/N: only every Nth checkpoint, from the one at I on, for job arrays")
