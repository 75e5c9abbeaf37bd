"""Who is missing, when a collective does not end."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

CALL = "roll call"


class RollCall:
    """Every rank's word on whether it waits in a collective, asked for once one of them has waited too long.

    A backend that times out says that it waited, not for whom.

    Attributes:
        waited: This rank was in a collective until it gave up, or until the connection broke.
    """

    def __init__(self, rank: int, size: int) -> None:
        """Nobody has called yet."""
        self.waited = False
        self._rank, self._size, self._answered = rank, size, False

    def hold(self, store: dist.Store, wait: Callable[[], object]) -> tuple[int, str] | None:
        """A rank that is in no collective, and what is known of it; None if all are in one.

        Args:
            store: Where ranks answer.
            wait: Gives them time to.
        """
        store.set(CALL, "1")
        wait()
        silent: tuple[int, str] | None = None
        for rank in range(self._size):
            if rank == self._rank:
                continue
            if not store.check([_key(rank)]):
                silent = silent or (rank, "it does not answer")
            elif place := store.get(_key(rank)).decode():
                return rank, f"it was {place}"
        return silent

    def answer(self, store: dist.Store, waits: bool) -> None:
        """Say where the main thread is if the ranks are called for the first time and it does not wait in a collective."""
        if not self._answered and store.check([CALL]):
            self._answered = True
            store.set(_key(self._rank), "" if waits or self.waited else _place())


def _key(rank: int) -> str:
    return f"{CALL}/{rank}"


def _place() -> str:
    """Where the main thread is, in words."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    return f"in {stack[-1].name} ({Path(stack[-1].filename).name}:{stack[-1].lineno})"
