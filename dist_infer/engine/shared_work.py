"""One list of requests for several replicas, through the key-value store: whoever is free takes the next piece.

The conductor publishes the pieces of a call; every leader, the conductor's own engine included,
takes pieces by an atomic counter and delivers results as they come; the conductor collects them.
A leader that is asked to stop says so there, and all stop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from dist_infer.engine.pieces import pieces
from dist_infer.engine.request import Request, Result

POLL_S = 0.02
LISTEN_S = 0.2  # how often a leader looks whether another was asked to stop
STOP = "work/stop"


class SharedWork:
    """The calls of one run.

    Args:
        store: The store that all ranks share.
        leaders: Replicas that share the work.
        check: Raises when a rank has failed; asked while waiting.
    """

    def __init__(self, store: dist.Store, leaders: int, check: Callable[[], None]) -> None:
        self.store, self.leaders, self.check = store, leaders, check
        self.call = 0
        self._collected = 0
        self._stopped_by: str | None = None
        self._listened = 0.0

    def publish(self, requests: list[Request]) -> int:
        """Begin a call with `requests` (on the conductor); returns how many pieces they make."""
        self._collected = count = 0
        for count, piece in enumerate(pieces(requests, self.leaders), 1):
            self.store.set(self._key("piece", count - 1), json.dumps([request.to_json() for request in piece]))
        self.store.set(self._key("pieces"), str(count))
        return count

    def await_call(self) -> bool:
        """Wait for the conductor to begin the next call; False when there will be none."""
        self._wait(self._key("pieces"))
        return int(self.store.get(self._key("pieces"))) >= 0

    def publish_swap(self, path: str) -> None:
        """Begin a call in which every leader loads the checkpoint at `path` (on the conductor)."""
        self.store.set(self._key("swap"), path)
        self.store.set(self._key("pieces"), "0")

    def swapped_to(self) -> str | None:
        """The checkpoint to load in this call, if it is such a call."""
        return self.store.get(self._key("swap")).decode() if self.store.check([self._key("swap")]) else None

    def close(self) -> None:
        """Tell the other leaders that there will be no further call (on the conductor)."""
        self.store.set(self._key("pieces"), "-1")

    def take(self) -> Iterator[Request]:
        """The requests of this call that fall to this leader."""
        count = int(self.store.get(self._key("pieces")))
        while (number := self.store.add(self._key("next"), 1) - 1) < count:
            key = self._key("piece", number)
            piece = json.loads(self.store.get(key))
            self.store.delete_key(key)
            yield from map(Request.from_json, piece)

    def deliver(self, results: list[Result]) -> None:
        """Hand finished results to the conductor."""
        if results:
            number = self.store.add(self._key("delivered"), 1) - 1
            self.store.set(self._key("result", number), json.dumps([result.to_json() for result in results]))

    def collect(self) -> list[Result]:
        """Results delivered since the last time (on the conductor)."""
        results: list[Result] = []
        while self.store.check([self._key("result", self._collected)]):
            key = self._key("result", self._collected)
            results += [Result.from_json(data) for data in json.loads(self.store.get(key))]
            self.store.delete_key(key)
            self._collected += 1
        return results

    def stopping(self, signal: str | None) -> str | None:
        """The signal that stops the work, noticed by this leader (`signal`) or by another; None while there is none."""
        if self._stopped_by is None and signal is not None:
            self._stopped_by = signal
            self.store.set(STOP, signal)
        elif self._stopped_by is None and time.monotonic() - self._listened > LISTEN_S:
            self._listened = time.monotonic()
            self._stopped_by = self.store.get(STOP).decode() if self.store.check([STOP]) else None
        return self._stopped_by

    def finish(self) -> None:
        """The call is over on this leader."""
        self.call += 1

    def pause(self) -> None:
        """Wait a little for the other leaders."""
        self.check()
        time.sleep(POLL_S)

    def _wait(self, key: str) -> None:
        while True:
            try:
                self.store.wait([key], timedelta(seconds=1))
                return
            except dist.DistNetworkError:
                raise
            except RuntimeError:  # a DistStoreError; a FileStore says a plain RuntimeError
                self.check()

    def _key(self, name: str, number: int | None = None) -> str:
        return f"work/{self.call}/{name}" if number is None else f"work/{self.call}/{name}/{number}"
