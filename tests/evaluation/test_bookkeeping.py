"""Many requests through scheduler, engine and journal, around a model that computes nothing."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

from benchmarks.bookkeeping import run
from dist_infer.evaluation.journal import Journal

REQUESTS = 5000


def in_use() -> int:
    """Bytes of memory that Python's objects take."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_finished_requests_leave_nothing_in_memory(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    tracemalloc.start()
    measured = run(directory, REQUESTS, 40, 4, in_use)
    tracemalloc.stop()
    assert measured.results == REQUESTS
    assert measured.grown < 100 * REQUESTS
    (part,) = directory.iterdir()
    assert len(part.read_bytes().splitlines()) == REQUESTS
    Journal(directory).merge(tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == part.read_bytes()
    again = run(directory, REQUESTS, 40, 4, lambda: 0)
    assert again.results == REQUESTS and [path.stat().st_size for path in directory.iterdir() if path != part] == [0]
