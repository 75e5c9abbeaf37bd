"""How weights are read."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class LoaderOptions:
    """Reading and checking of weights."""

    threads: int = option(4, "reading threads a rank", low=1, high=64)
    read: str = option(
        "each",
        "each: every rank reads what it holds; once: of ranks that hold the same, one reads and passes it on",
        choices=("each", "once"),
    )
    verify: str = option(
        "default",
        "full: first read every byte, compare the checksums the trainer kept, and put a hash of all weights into the results",
        choices=("default", "full"),
    )
    check_finite: bool = option(True, "refuse weights that hold NaN or Inf")
