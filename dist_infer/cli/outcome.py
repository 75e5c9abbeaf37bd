"""How a run ended, in a file that scripts read: launchers hide exit statuses and last lines."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_infer.distributed.launch import attempt
from dist_infer.distributed.signals import Stopped
from dist_infer.evaluation.whole_file import write_whole

COMPLETE, FAILURE, MISTAKE, STOPPED = 0, 1, 2, 75
OUTCOMES = {COMPLETE: "complete", FAILURE: "failed", MISTAKE: "mistake", STOPPED: "stopped"}


def exit_status(error: BaseException | None) -> int:
    """The exit status of a run that ended with `error`: 2 a user's mistake, 75 stopped and to be run again, 1 any other failure."""
    if error is None:
        return COMPLETE
    if isinstance(error, Stopped):
        return STOPPED
    return MISTAKE if isinstance(error, ValueError | OSError) else FAILURE


class Outcome:
    """The status file of one run.

    Rank 0 writes it when the run begins (outcome `running`) and when it ends. When rank 0 cannot, because it died, the first other
    rank to leave does.

    Args:
        path: The file; None for none.
        rank: This rank.
    """

    def __init__(self, path: str | None, rank: int) -> None:
        self.path, self.rank = Path(path) if path is not None else None, rank
        self.attempt = attempt()

    def begin(self) -> None:
        """Say that the run is under way.

        Raises:
            OSError: The file cannot be written.
        """
        if self.path is None:
            return
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"status={self.path}: there is no directory {self.path.absolute().parent}")
        if self.rank == 0:
            self._write("running", None)

    def end(self, error: BaseException | None) -> None:
        """Say how the run ended; a later attempt's word is never overwritten."""
        status = exit_status(error)
        if self.path is None or (self.rank != 0 and status in (COMPLETE, STOPPED)):
            return
        with suppress(OSError, ValueError):
            there = json.loads(self.path.read_text(encoding="utf-8"))
            if there["attempt"] > self.attempt or (self.rank != 0 and there["outcome"] != "running"):
                return
        with suppress(OSError):
            text = None if error is None else " ".join(str(error).split()) or type(error).__name__
            self._write(OUTCOMES[status], text, getattr(error, "rank", self.rank))

    def _write(self, outcome: str, error: str | None, rank: int = 0) -> None:
        assert self.path is not None
        words: dict[str, Any] = {
            "outcome": outcome,
            "requeue": outcome == "stopped",
            "error": error,
            "rank": rank,
            "host": platform.node(),
            "attempt": self.attempt,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_whole(self.path, [json.dumps(words, indent=2) + "\n"])
