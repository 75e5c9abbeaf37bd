"""Notice that a rank failed, and end everywhere with the first error."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

from dist_infer.distributed.collectives import Communicator
from dist_infer.distributed.host import Host
from dist_infer.distributed.launch import LocalRanks, ending

POLL_S = 0.5  # how often the store is asked for another rank's error
GRACE_S = 5.0  # for the main thread to leave after a failure
VERDICT_S = 2.0  # how long a broken connection waits to be told whose death broke it
BEATS = 5  # heartbeats in the time after which silence is death

FAILURE = "failure"


class RankFailure(RuntimeError):
    """A rank failed; the text names it and its first error."""


class Watchdog:
    """Watches the other ranks from a daemon thread, which sleeps unless one of them dies.

    A rank of this host is watched through its pidfd, and found dead at once; one of another host by rank 0, through heartbeats
    in the store. The first failure to reach the store is the world's, whoever else stumbles over it later.

    Attributes:
        failure: The world's first error, once there is one.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[Host],
        store: dist.Store | None,
        heartbeat_s: float,
        local_ranks: LocalRanks | None = None,
        may_exit: bool = True,
        announce: bool = False,
    ) -> None:
        """Watch from `start` on; in a world of one there is nothing to watch.

        Args:
            rank: This rank.
            hosts: Where each rank runs.
            store: A connection of the watchdog's own: a main thread that waits on another must not block it.
            heartbeat_s: A rank of another host that is silent for longer is dead.
            local_ranks: Ranks this process started, whose exit codes it can tell.
            may_exit: End the process if a rank failed and the main thread does not leave.
            announce: Print the failure as soon as it is known, because a launcher may end this rank before it can say so.
        """
        self.failure: RankFailure | None = None
        self._rank, self._hosts, self._store = rank, hosts, store
        self._heartbeat_s, self._local_ranks = heartbeat_s, local_ranks
        self._may_exit, self._announce = may_exit, announce
        self._communicators: list[Communicator] = []
        self._lock = threading.Lock()
        self._own_error: str | None = None
        self._decided, self._stopping = threading.Event(), threading.Event()
        self._beat, self._next_beat = 0, 0.0
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._thread: threading.Thread | None = None
        if store is not None:
            self._wake_read, self._wake_write = os.pipe()
            self._thread = threading.Thread(target=self._run, name="dist_infer watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._thread:
            self._thread.start()

    def guard(self, communicator: Communicator) -> None:
        """Abort `communicator` when a rank fails."""
        with self._lock:
            self._communicators.append(communicator)
        if self.failure:
            communicator.abort(self.failure)

    def release(self, communicator: Communicator) -> None:
        """Forget a communicator that is being closed."""
        with self._lock:
            self._communicators.remove(communicator)

    def check(self) -> None:
        """Raise RankFailure if a rank failed."""
        if self.failure:
            raise self.failure

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one failed with `error`; the first report wins."""
        if self._thread is None or not self._thread.is_alive() or self._decided.is_set():
            return
        self._own_error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        os.write(self._wake_write, b"!")
        self._decided.wait(VERDICT_S)

    def explain(self, error: Exception) -> Exception:
        """The world's first error, given that this rank just raised `error`.

        That is another rank's RankFailure if one failed before (a peer's death often shows as a broken
        connection here first), else `error`, which is published so that the others leave with it.
        Use: `except Exception as error: raise world.watchdog.explain(error)`.
        """
        if self._thread is None or isinstance(error, RankFailure):
            return error
        if _is_broken_connection(error):
            self._decided.wait(VERDICT_S)
        self.report(error)
        first = self.failure
        return error if first is None or str(first).startswith(f"rank {self._rank} failed") else first

    def stop(self) -> None:
        """Stop watching, before this rank leaves in order."""
        if self._thread and not self._stopping.is_set():
            self._stopping.set()
            os.write(self._wake_write, b"!")
            if self._thread.is_alive():
                self._thread.join(GRACE_S)
            os.close(self._wake_write)
            os.close(self._wake_read)

    def _run(self) -> None:
        store = self._store
        assert store is not None
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        watched = self._open_pidfds()
        for descriptor in watched:
            poll.register(descriptor, select.POLLIN)
        dead: set[int] = set()
        text: str | None = None
        wait_ms = 0
        while text is None and not self._stopping.is_set():
            for descriptor, _ in poll.poll(wait_ms):
                if descriptor == self._wake_read:
                    os.read(descriptor, 1)
                else:
                    poll.unregister(descriptor)
                    dead.add(watched[descriptor])
            wait_ms = int(POLL_S * 1000)
            if self._stopping.is_set():
                break
            try:
                text = self._look(store, dead)
                if text is not None:
                    mark_left(store, self._rank)  # the failure is known here; the server need not wait for us
            except dist.DistError as error:
                text = text or self._without_store(dead, error)
        if text is not None:
            self._fail(text)
        for descriptor in watched:
            os.close(descriptor)

    def _open_pidfds(self) -> dict[int, int]:
        """Descriptors that become readable when a rank of this host ends, with its rank."""
        here, watched = self._hosts[self._rank], {}
        if hasattr(os, "pidfd_open"):
            for rank, host in enumerate(self._hosts):
                if rank != self._rank and here.sees(host):
                    try:
                        watched[os.pidfd_open(host.pid)] = rank
                    except ProcessLookupError:
                        watched[_readable()] = rank
        return watched

    def _look(self, store: dist.Store, dead: set[int]) -> str | None:
        """One look at the world: the failure of a rank, in words, or None."""
        if store.check([FAILURE]):
            return _text(store.get(FAILURE))
        if self._own_error is not None:
            return self._publish(store, f"rank {self._rank} failed: {self._own_error}")
        if self._speaks(dead):
            for rank in sorted(dead):
                if not store.check([_left_key(rank)]):
                    return self._publish(store, self._death(rank))
        now = time.monotonic()
        if now >= self._next_beat and len({host.boot_id for host in self._hosts}) > 1:
            self._next_beat = now + self._heartbeat_s / BEATS
            self._beat += 1
            store.set(_beat_key(self._rank), str(self._beat))
            silent = self._silent(store, now)
            if silent is not None:
                place = self._hosts[silent]
                reason = f"was silent for {self._heartbeat_s:g} s; it, its host or the network to it is gone"
                return self._publish(store, f"rank {silent} ({place}) {reason}")
        return None

    def _silent(self, store: dist.Store, now: float) -> int | None:
        """A rank of another host whose heartbeats have stopped. Rank 0 looks at all, the others at rank 0."""
        here = self._hosts[self._rank]
        others = range(len(self._hosts)) if self._rank == 0 else (0,)
        ranks = [rank for rank in others if rank != self._rank and not here.sees(self._hosts[rank])]
        keys = [_beat_key(rank) for rank in ranks]
        if not store.check(keys):  # some have not begun; reading would wait for them
            return None
        for rank, beat in zip(ranks, store.multi_get(keys), strict=True):
            last, since = self._beats.get(rank, (b"", now))
            if beat != last:
                self._beats[rank] = (beat, now)
            elif now - since > self._heartbeat_s and not store.check([_left_key(rank)]):
                return rank
        return None

    def _publish(self, store: dist.Store, text: str) -> str:
        """Put `text` into the store as the first failure; returns the one that is there."""
        ours = json.dumps({"text": text, "by": self._rank}).encode()
        winner = store.compare_set(FAILURE, "", ours.decode())
        if winner == ours and self._announce:
            _print(text)
        return _text(winner)

    def _speaks(self, dead: set[int]) -> bool:
        """Whether this is the first rank of its host that lives; rank 0 knows best how the ranks that it started ended."""
        here = self._hosts[self._rank]
        return self._rank == min(
            rank for rank, host in enumerate(self._hosts) if rank == self._rank or (here.sees(host) and rank not in dead)
        )

    def _without_store(self, dead: set[int], error: Exception) -> str:
        """The failure when the store cannot say."""
        if self._own_error is not None:
            return f"rank {self._rank} failed: {self._own_error}"
        if 0 not in dead:
            first = str(error).split("\n", 1)[0]
            return f"rank 0 ({self._hosts[0]}) is gone, or its store is, or the network to it: {first}"
        text = self._death(0)
        if self._speaks(dead):
            _print(text)
        return text

    def _death(self, rank: int) -> str:
        code = self._local_ranks.poll().get(rank) if self._local_ranks else None
        how = "died without a word: killed, or out of memory" if code is None else ending(code)
        return f"rank {rank} ({self._hosts[rank]}) {how}"

    def _fail(self, text: str) -> None:
        """Make the failure known here, and see that the main thread leaves."""
        failure = RankFailure(text)
        with self._lock:
            self.failure = failure
            communicators = list(self._communicators)
        self._decided.set()
        for communicator in communicators:
            communicator.abort(failure)
        if not self._stopping.wait(GRACE_S) and self._may_exit:
            _print(text)
            os._exit(1)


def mark_left(store: dist.Store, rank: int) -> None:
    """Say that `rank` leaves in order, so that its end is no failure."""
    store.set(_left_key(rank), "1")


def have_left(store: dist.Store, ranks: Sequence[int]) -> bool:
    """Whether all of `ranks` have left in order."""
    return store.check([_left_key(rank) for rank in ranks])


def _left_key(rank: int) -> str:
    return f"left/{rank}"


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _text(failure: bytes) -> str:
    return json.loads(failure)["text"]


def _print(text: str) -> None:
    print(f"dist-infer: {text}", file=sys.stderr, flush=True)


def _readable() -> int:
    """A descriptor that is readable at once, in place of the pidfd of a process that is gone."""
    read, write = os.pipe()
    os.close(write)
    return read


def _is_broken_connection(error: Exception) -> bool:
    """Whether `error` may be the echo of another rank's death."""
    text = str(error).lower()
    return isinstance(error, dist.DistError | ConnectionError | TimeoutError) or "gloo" in text or "nccl" in text
