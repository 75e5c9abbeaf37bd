"""Who writes where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_infer.distributed.logs import RankLog, console, console_descriptor, is_redirected

PROGRAM = """
import os, subprocess, sys, warnings
from pathlib import Path
from dist_infer.distributed.logs import RankLog, console, console_descriptor
RankLog(Path(sys.argv[1]), int(sys.argv[2])).__enter__()
print("a result")
print("read me", file=console())
warnings.warn("python warns")
os.write(2, b"C warns\\n")
subprocess.run([sys.executable, "-c", "import os; os.write(2, b'the child speaks\\\\n')"], stderr=console_descriptor())
sys.stdout.flush()
if sys.argv[3] == "raise":
    raise KeyError("lost")
os.abort()
"""


def run(directory: Path, rank: int, end: str) -> subprocess.CompletedProcess[str]:
    """A rank that says this and that, and comes to a bad end."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM, str(directory), str(rank), end]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)


@pytest.mark.parametrize("rank", [0, 3])
def test_noise_goes_to_the_file_and_words_to_the_console(rank: int, tmp_path: Path) -> None:
    done = run(tmp_path / "logs", rank, "raise")
    log = tmp_path / "logs" / f"rank_{rank}.log"
    said = done.stderr.splitlines()
    assert said[:2] == ["read me", "the child speaks"]
    assert said[2:] == [f"dist-infer: error: rank {rank}: KeyError: 'lost'; traceback in {log}"]
    text = log.read_text()
    assert text.startswith("--- ") and f"rank {rank} on host" in text.splitlines()[0]
    assert all(words in text for words in ("python warns", "C warns", "Traceback (most recent call last)", "KeyError: 'lost'"))
    assert (done.stdout == "a result\n") == (rank == 0) and ("a result" in text) == (rank != 0)


def test_a_crash_leaves_its_stack_and_a_later_attempt_appends(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path, 1, "abort")
    text = (tmp_path / "rank_1.log").read_text()
    assert text.count("Fatal Python error: Aborted") == 2 and text.count("--- ") == 2


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OSError, match=r"logs: no log file of rank 0 can be written there \(File exists\)"):
        RankLog(tmp_path / "logs", 0).__enter__()


def test_nothing_changes_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_redirected() and console_descriptor() == 2
    print("seen", file=console())
    assert capsys.readouterr().err == "seen\n"


def test_all_is_as_before_afterwards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a mistake"), RankLog(tmp_path, 1) as log:
        os.write(1, b"noise\n")
        os.write(2, b"more\n")
        print("seen", file=console())
        raise ValueError("a mistake")
    assert not is_redirected()
    os.write(2, b"again\n")
    assert capfd.readouterr() == ("", "seen\nagain\n")
    assert "noise" in log.path.read_text() and "more" in log.path.read_text()
