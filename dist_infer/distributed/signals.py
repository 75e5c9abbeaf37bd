"""SIGTERM and SIGUSR1: what schedulers send before they take a node away."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(RuntimeError):
    """The run was asked to stop and did, between two steps; what was finished is kept."""


class StopSignal:
    """While entered, SIGTERM and SIGUSR1 are noticed, not died of.

    The leaders look at `name` between steps; other ranks ignore it and end when their leader does.

    Attributes:
        name: The first signal that came, such as SIGUSR1; None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> StopSignal:
        """Begin to notice. Only a main thread can; elsewhere nothing changes."""
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """The signals mean again what they meant before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
