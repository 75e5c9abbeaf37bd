"""How weights are read."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class LoaderOptions:
    """Reading and checking of weights."""

    threads: int = option(4, "reading threads a rank", low=1, high=64)
    check_finite: bool = option(True, "refuse weights that hold NaN or Inf")
