"""Signs of life in the store, for ranks whose processes cannot be seen from here."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from dist_infer.distributed.host import Host

BEATS = 5  # heartbeats in the time after which silence is death


class Heartbeats:
    """This rank's heartbeats, and those it listens for: rank 0 to all other hosts' ranks, these to rank 0."""

    def __init__(self, rank: int, hosts: Sequence[Host], limit_s: float) -> None:
        """A rank that is silent for longer than `limit_s` is dead; where all see each other's processes, nobody beats."""
        here = hosts[rank]
        others = range(len(hosts)) if rank == 0 else (0,)
        self._rank, self._limit_s = rank, limit_s
        self._ranks = [other for other in others if other != rank and not here.sees(hosts[other])]
        self._needed = any(not host.sees(hosts[0]) for host in hosts)
        self._beat, self._next = 0, 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}

    def silent(self, store: dist.Store, now: float) -> int | None:
        """Beat if it is time to; a rank that was silent for too long, if there is one.

        Args:
            store: Where beats are kept.
            now: Seconds on a clock that stands still while this process does.
        """
        if not self._needed or now < self._next:
            return None
        self._next = now + self._limit_s / BEATS
        self._beat += 1
        store.set(_key(self._rank), str(self._beat))
        for rank, beat in zip(self._ranks, self._read(store), strict=True):
            last, since = self._heard.setdefault(rank, (beat, now))
            if beat != last:
                self._heard[rank] = (beat, now)
            elif now - since > self._limit_s and not store.check([left_key(rank)]):
                return rank
        return None

    def _read(self, store: dist.Store) -> list[bytes]:
        """Everyone's last beat; empty for ranks that have not begun, for whom reading would wait."""
        keys = [_key(rank) for rank in self._ranks]
        if not keys or store.check(keys):
            return store.multi_get(keys) if keys else []
        return [store.get(key) if store.check([key]) else b"" for key in keys]


def left_key(rank: int) -> str:
    """Key in the store that is there once `rank` has left in order."""
    return f"left/{rank}"


def _key(rank: int) -> str:
    return f"beat/{rank}"
