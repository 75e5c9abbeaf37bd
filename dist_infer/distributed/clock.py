"""Time as a process lives it."""

from __future__ import annotations

import time


class OwnClock:
    """Seconds in which this process ran: what others failed to do while it was stopped itself (Ctrl-Z, a suspended job) is no fault.

    It must be read often; more than `most_s` between two readings is time in which this process did not run.
    """

    def __init__(self, most_s: float) -> None:
        """Starts at 0."""
        self._most_s, self._last, self._total = most_s, time.monotonic(), 0.0

    def read(self, standing: bool = False) -> float:
        """Seconds since the start; the time since the last reading does not count if `standing`."""
        now = time.monotonic()
        if not standing:
            self._total += min(now - self._last, self._most_s)
        self._last = now
        return self._total
