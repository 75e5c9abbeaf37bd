"""The other ranks of this host, watched as what they are: processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dist_infer.distributed.host import Host
from dist_infer.distributed.launch import LocalRanks, ending

GONE = ("", "Z", "X")
STOPPED = "T"  # by SIGSTOP or SIGTSTP; "t" is a debugger's doing, which is nobody's failure


class Neighbours:
    """Ranks of this host, which die, or stop and never go on.

    A stopped process is told by its state in /proc, not by heartbeats: a rank that is merely slow (a full machine, a long call that
    keeps Python's lock) is never taken for a stopped one, and the answer does not depend on the store, which the stopped
    rank may be serving.

    Attributes:
        descriptors: Pidfds, which become readable when a rank ends, with its rank.
        dead: Ranks that have ended.
    """

    def __init__(self, rank: int, hosts: Sequence[Host], local_ranks: LocalRanks | None) -> None:
        """Nothing is watched before `open`.

        Args:
            rank: This rank.
            hosts: Where each rank runs.
            local_ranks: Ranks this process started, whose exit codes it can tell.
        """
        self.descriptors: dict[int, int] = {}
        self.dead: set[int] = set()
        self._rank, self._hosts, self._local_ranks = rank, hosts, local_ranks
        here = hosts[rank]
        self._ranks = [other for other, host in enumerate(hosts) if other != rank and here.sees(host)]
        self._stopped: dict[int, float] = {}
        self._out_of_memory = _killed_for_memory()

    def open(self) -> None:
        """Take hold of the processes."""
        if hasattr(os, "pidfd_open"):
            for rank in self._ranks:
                try:
                    self.descriptors[os.pidfd_open(self._hosts[rank].pid)] = rank
                except ProcessLookupError:
                    self.descriptors[_readable()] = rank

    def close(self) -> None:
        """Let go of them."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = {}

    def stopped(self, now: float, limit_s: float) -> int | None:
        """A living rank that has been stopped for longer than `limit_s`, seen so by every call until `now`."""
        for rank in self._ranks:
            state = process_state(self._hosts[rank].pid)
            if state == STOPPED:
                since = self._stopped.setdefault(rank, now)
                if rank not in self.dead and now - since > limit_s:
                    return rank
            elif state not in GONE:
                self._stopped.pop(rank, None)
        return None

    def had_stopped(self, rank: int) -> bool:
        """Whether a rank was stopped when it was last seen, though another may have ended it since."""
        return rank in self._stopped

    def is_stopped(self, rank: int) -> bool:
        """Whether a rank is seen from here, and stopped."""
        return rank in self._ranks and process_state(self._hosts[rank].pid) == STOPPED

    def kill_if_stopped(self, rank: int) -> None:
        """End a stopped rank, which cannot leave by itself. By its pidfd: its pid may be another process's by now."""
        for descriptor, other in self.descriptors.items():
            if other == rank and self.is_stopped(rank):
                with suppress(OSError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def speaks(self, gone: set[int]) -> bool:
        """Whether this is the first rank of its host but for those in `gone`, so that one speaks for all."""
        return self._rank == min({self._rank, *self._ranks} - gone | {self._rank})

    def death(self, rank: int) -> str:
        """How a dead rank ended, in words."""
        code = self._local_ranks.poll().get(rank) if self._local_ranks else None
        how = "died without a word: killed, or out of memory" if code is None else ending(code)
        if _killed_for_memory() > self._out_of_memory:
            how += "; the kernel has killed for lack of memory on this host since the run began"
        return how


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does, `T` for a stopped one; empty when it is gone, or where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _killed_for_memory() -> int:
    """Processes the kernel has killed for lack of memory since this host started, memory limits of jobs included."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _readable() -> int:
    """A descriptor that is readable at once, in place of the pidfd of a process that is gone."""
    read, write = os.pipe()
    os.close(write)
    return read
