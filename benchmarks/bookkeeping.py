"""What the leader does beside the model: requests through scheduler, engine and journal, around a runner that computes nothing.

Requests are made one after another and results are let go as they come, so memory should not grow with their number.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dist_infer.config.engine import EngineOptions
from dist_infer.config.sampling import SamplingParams
from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.blocks import BlockAllocator
from dist_infer.engine.engine import Delta, Engine
from dist_infer.engine.request import Request, Result
from dist_infer.engine.runner import Answer
from dist_infer.engine.scheduler import RopeRules, Scheduler
from dist_infer.engine.step import Step
from dist_infer.evaluation.journal import Journal
from dist_infer.sampling.summary import SummaryLayout

VOCABULARY = 32_000
CHOICES = 4  # of a question


class IdleRunner:
    """Answers every step at once: each scored token has probability 1."""

    def __init__(self) -> None:
        control = SimpleNamespace(size=1, gather=lambda answer: [answer])
        self.mesh: Any = SimpleNamespace(control=control, shape=MeshShape(1, 1, 1))

    def execute(self, step: Step) -> Answer | None:
        """As `Runner.execute`, for steps that score."""
        rows, layout = sum(span.rows for span in step.spans), SummaryLayout(targets=True)
        return Answer(torch.ones(rows, layout.width), layout) if rows else None


@dataclass
class Measured:
    """What a run took.

    Attributes:
        results: Requests in the journal at the end.
        seconds: Of processor time, the making of requests included.
        grown: What `memory` said at the end, less what it said once a fifth of the requests had been finished.
    """

    results: int
    seconds: float
    grown: int


def questions(count: int, context: int, continuation: int) -> Iterator[Request]:
    """`count` requests, each one choice of a question."""
    params = SamplingParams().resolved()
    for index in range(count):
        question, choice = divmod(index, CHOICES)
        tokens = [(question + 7919 * place) % VOCABULARY for place in range(context)]
        tokens += [(choice + place) % VOCABULARY for place in range(continuation)]
        request = Request(str(index), tokens, params, 0, context, index)
        request.key = request.key_for("checkpoint", "task 1.0")
        yield request


def run(directory: Path, count: int, context: int, continuation: int, memory: Callable[[], int]) -> Measured:
    """Take `count` requests to the journal at `directory`."""
    journal, options = Journal(directory), EngineOptions()
    scheduler = Scheduler(options, [BlockAllocator(2048, options.block_size, options.prefix_cache)], RopeRules(lambda length: 0))
    runner: Any = IdleRunner()
    engine = Engine(runner, scheduler, VOCABULARY, 4096, (), None, heartbeat_s=60)
    writer = journal.writer("leader")
    finished, before = 0, 0

    def sink(_: list[Delta], results: list[Result]) -> None:
        nonlocal finished, before
        writer.append(results)
        if finished < count // 5 <= finished + len(results):
            before = memory()
        finished += len(results)

    began = time.process_time()
    engine.run((request for request in questions(count, context, continuation) if request.key not in journal), sink)
    seconds, grown = time.process_time() - began, memory() - before
    writer.close()
    journal.refresh()
    return Measured(sum(request.key in journal for request in questions(count, context, continuation)), seconds, grown)


def resident() -> int:
    """Bytes of memory this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print microseconds of processor time a request, and what requests leave in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--context", type=int, default=12, help="tokens that a question's choices share")
    parser.add_argument("--continuation", type=int, default=4, help="tokens of a choice")
    args = parser.parse_args()
    began = time.process_time()
    for request in questions(args.requests, args.context, args.continuation):
        assert request.key
    making = time.process_time() - began
    with tempfile.TemporaryDirectory() as directory:
        measured = run(Path(directory) / "journal", args.requests, args.context, args.continuation, resident)
    assert measured.results == args.requests
    each = 1e6 * (measured.seconds - making) / args.requests
    print(f"{args.requests:,} requests: {each:.1f} us each, {1e6 * making / args.requests:.1f} us to make one with its key")
    print(f"memory grew by {measured.grown / 1e6:.1f} MB after the first fifth")


if __name__ == "__main__":
    main()
