"""A rank that rank 0 started itself."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dist_infer.cli.ranks import run_on_ranks
from dist_infer.config.options import Options


def run(arguments: Sequence[str]) -> int:
    """Serve with the options rank 0 passes as JSON."""
    return run_on_ranks(Options.from_json(json.loads(arguments[0])), lambda session: None, stoppable=True)
