"""A side of a comparison: a process of its own, which is stopped while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

CLOSE_S = 10.0  # how long a side may take to end by itself
ANSWER_S = 900.0  # and to answer


class SideFailed(RuntimeError):
    """The process of a side ended."""


class Side:
    """A process that answers commands (see `serving`), started when it is first asked something.

    Between its turns all processes of its session are stopped, so that nothing spins or wakes while another side is measured.

    Attributes:
        first_token_s: From the start of the process to its first answer; 0 before.

    Args:
        command: What to run.
        environment: Variables it is given beside this process's own.
        log: Where its other output goes.
        first: What it is asked as soon as it runs; None for nothing.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, first: dict[str, Any] | None) -> None:
        self.command, self.environment, self.log, self.first = command, environment, log, first
        self.first_token_s = 0.0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, ask it `first`, and stop it.

        Raises:
            SideFailed: It ended.
        """
        began = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        if self.first is not None:
            self.ask(**self.first)
            self.first_token_s = time.perf_counter() - began

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            SideFailed: The process ended, or is silent.
        """
        if self._process is None:
            self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], ANSWER_S)[0]:
            raise SideFailed(f"no answer within {ANSWER_S:g} s")
        answer = process.stdout.readline()
        if not answer:
            process.wait()
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            raise SideFailed(lines[-1] if lines else f"status {process.returncode}")
        self._signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        """End the process, and whatever it has started."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_S)
        self._signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        self._process = None

    def _signal(self, number: int) -> None:
        """Send a signal to every process of the session."""
        assert self._process is not None
        for pid in _session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    found.append(int(entry.name))
    return found
