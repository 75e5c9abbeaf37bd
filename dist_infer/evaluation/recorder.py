"""What a leader finishes goes into its own part of the journal."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from dist_infer.distributed.launch import attempt
from dist_infer.engine.request import Result
from dist_infer.evaluation.journal import JournalWriter


class Recorder:
    """Records results; the part file is made with the first of them.

    Args:
        directory: Of the journal; None to record nothing.
    """

    def __init__(self, directory: str | None) -> None:
        self._directory = Path(directory) if directory is not None else None
        self._writer: JournalWriter | None = None

    def __call__(self, results: list[Result]) -> None:
        """Write `results` down.

        Raises:
            OSError: They cannot be written.
        """
        if self._directory is None:
            return
        if self._writer is None:
            self._writer = JournalWriter(self._directory, _name())
        self._writer.append(results)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        """Bring all to the disk."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


def _name() -> str:
    """Of a part: who writes it."""
    job = os.environ.get("SLURM_JOB_ID")
    return (f"job{job}.{attempt() - 1}-" if job else "") + f"{platform.node()}-{os.getpid()}"
