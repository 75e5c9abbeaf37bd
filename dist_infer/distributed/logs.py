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


def log_to(directory: Path, rank: int) -> Path:
    """Send what this process writes to standard error from now on to `directory/rank_<n>.log`; returns the file.

    Of ranks other than 0, which have no results to print, standard output goes there too. Tracebacks of a crash (a segmentation
    fault as well as a Python exception nobody caught) are in the file; of the exception the console gets one line. A later attempt appends.

    Args:
        directory: Made if it is not there.
        rank: This rank.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank_{rank}.log"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(f"{directory}: no log file of rank {rank} can be written there ({error.strerror})") from None
    sys.stderr.flush()
    sys.stdout.flush()
    if not is_redirected():
        # As long as the process.
        sys.__stderr__ = open(os.dup(STDERR), "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # type: ignore[misc]  # noqa: SIM115
    os.dup2(file, STDERR)
    if rank != 0:
        os.dup2(file, STDOUT)
    os.close(file)
    faulthandler.enable(STDERR)

    def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, traceback)
        print(f"dist-infer: error: rank {rank}: {kind.__name__}: {error}; traceback in {path}", file=console(), flush=True)

    sys.excepthook = report
    began = datetime.now(UTC).isoformat(timespec="seconds")
    os.write(STDERR, f"--- {began} rank {rank} on host {platform.node()}, pid {os.getpid()}\n".encode())
    return path


def console() -> TextIO:
    """Where a person reads: the standard error this process was started with."""
    return (sys.__stderr__ if is_redirected() else None) or sys.stderr


def console_descriptor() -> int:
    """The same for processes that this one starts."""
    return console().fileno() if is_redirected() else STDERR


def is_redirected() -> bool:
    """Whether `log_to` was called in this process."""
    return sys.__stderr__ is not None and sys.__stderr__.fileno() != STDERR
