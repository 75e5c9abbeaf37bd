"""A log file for each rank, so that rank 0's console stays quiet and readable.

What Python, torch's C++ and the C library write to standard error goes to the rank's file. What a person is to read is
printed to `console()`, which is the standard error the process was started with; Python's name for that is `sys.__stderr__`.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

STDOUT, STDERR = 1, 2
EXPECTED = ValueError | OSError | RuntimeError | KeyboardInterrupt  # those that the program has a line for


class RankLog:
    """While entered, what this process writes to standard error goes to `directory/rank_<n>.log`.

    Of ranks other than 0, which have no results to print, standard output goes there too. Tracebacks of a crash (a segmentation
    fault as well as an exception nobody expects) are in the file; of the exception the console gets one line. A later attempt appends.

    Args:
        directory: Made if it is not there.
        rank: This rank.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.path, self.rank = directory / f"rank_{rank}.log", rank
        self._saved: dict[int, int] = {}

    def __enter__(self) -> RankLog:
        """Begin.

        Raises:
            OSError: The file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OSError(f"{self.path.parent}: no log file of rank {self.rank} can be written there ({error.strerror})") from None
        assert not is_redirected(), "a process has one log"
        sys.stderr.flush()
        sys.stdout.flush()
        self._console = sys.__stderr__
        sys.__stderr__ = open(os.dup(STDERR), "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # type: ignore[misc]
        for number in (STDERR,) if self.rank == 0 else (STDERR, STDOUT):
            self._saved[number] = os.dup(number)
            os.dup2(file, number)
        os.close(file)
        faulthandler.enable(STDERR)
        self._hook, sys.excepthook = sys.excepthook, self._report
        began = datetime.now(UTC).isoformat(timespec="seconds")
        os.write(STDERR, f"--- {began} rank {self.rank} on host {platform.node()}, pid {os.getpid()}\n".encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """All is as before; but not for an exception that ends the process: its traceback is for the file."""
        if not isinstance(error, EXPECTED | None):
            return
        sys.stderr.flush()
        sys.stdout.flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        console, sys.__stderr__ = sys.__stderr__, self._console  # type: ignore[misc]
        if console is not None:
            console.close()
        faulthandler.disable()
        sys.excepthook = self._hook

    def _report(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, traceback)
        print(f"dist-infer: error: rank {self.rank}: {kind.__name__}: {error}; traceback in {self.path}", file=console(), flush=True)


def console() -> TextIO:
    """Where a person reads: the standard error this process was started with."""
    return (sys.__stderr__ if is_redirected() else None) or sys.stderr


def console_descriptor() -> int:
    """The same for processes that this one starts."""
    return console().fileno() if is_redirected() else STDERR


def is_redirected() -> bool:
    """Whether this process writes to a `RankLog`."""
    return sys.__stderr__ is not None and sys.__stderr__.fileno() != STDERR
