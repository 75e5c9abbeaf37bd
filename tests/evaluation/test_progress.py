"""What a person sees of a sweep, and what is written down of it."""

from __future__ import annotations

import json
import os
import pty
import select
import termios
from pathlib import Path

import pytest

from dist_infer.engine.request import Result, Usage
from dist_infer.evaluation.progress import Progress, in_time, resident_bytes


class Clock:
    """Time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def results(count: int, error: str | None = None) -> list[Result]:
    """Results of ten tokens each."""
    usage = Usage(5, 10) if error is None else None
    return [Result(str(index), index, usage=usage, error=error) for index in range(count)]


def test_lines_in_a_log_file_are_few_and_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(900, tmp_path, replicas=2, clock=clock)
    progress.add(100)
    progress.checkpoint("step_200")
    progress.found(200)
    for _ in range(400):
        clock.now += 0.5
        progress.take(results(2))
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 20
    assert lines[-1].startswith("dist-infer: step_200 | ")
    assert " | 200 from the journal | 40 tokens/s | " in lines[-1] and lines[-1].endswith("2 replicas")
    progress.close()
    last = capsys.readouterr().err
    assert last == "dist-infer: step_200 | 1,000/1,000 requests (100%) | 200 from the journal | 40 tokens/s | took 3 min | 2 replicas\n"
    figures = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(figures) == 200 / 5 + 1
    assert [line["requests"] for line in figures] == sorted(line["requests"] for line in figures)
    last_figures = figures[-1]
    assert (last_figures["requests"], last_figures["total"], last_figures["found"], last_figures["tokens"]) == (1000, 1000, 200, 8000)
    assert last_figures["checkpoint"] == "step_200" and last_figures["rss"] > 1e6


def test_time_left_is_of_what_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(1000, clock=clock)
    assert "left" not in str(progress)
    progress.found(500)
    clock.now += 100
    progress.take(results(99) + results(1, error="too long"))
    assert "600/1,000 requests (60%)" in str(progress) and "400 s left" not in str(progress)
    assert "| 1 failed |" in str(progress) and "| 7 min left |" in str(progress)
    progress.close()


def test_a_later_run_appends(tmp_path: Path) -> None:
    for _ in range(2):
        with Progress(1, tmp_path) as progress:
            progress.take(results(1))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_ends_the_figures_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Progress(1, tmp_path) as progress:
        progress.take(results(1))


def test_on_a_terminal_one_line_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        clock = Clock()
        progress = Progress(10, clock=clock)
        for _ in range(10):
            clock.now += 1
            progress.take(results(1))
        progress.close()
        terminal.flush()
        seen = ""
        while "\n" not in seen and select.select([ours], [], [], 30)[0]:  # the kernel passes it on in its own time
            seen += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert seen.count("\n") == 1 and seen.count("requests") > 5
    assert seen.rstrip().rpartition("\r")[2].startswith("dist-infer: 10/10 requests (100%) | 10 tokens/s | took 10 s")


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (89, "89 s"), (180, "3 min"), (7500, "2 h 05 min")])
def test_times_are_readable(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


def test_memory_is_known() -> None:
    assert resident_bytes() > 1e6
