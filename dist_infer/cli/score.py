"""`dist-infer score`: how likely continuations are after their contexts."""

from __future__ import annotations

from collections.abc import Sequence

from dist_infer.cli.arguments import parse
from dist_infer.cli.jobs import FileJob
from dist_infer.cli.ranks import run_on_ranks


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(arguments)
    if options.input is None:
        raise ValueError("nothing to do: give input=FILE.jsonl, with context and continuation on each line")
    if options.prompts:
        raise ValueError("prompts belongs to generate; score reads input=FILE.jsonl")
    job = FileJob(options, lambda intake: intake.score_line)
    return run_on_ranks(options, job.run, job.check, stoppable=True)
