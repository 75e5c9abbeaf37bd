"""Notice that a rank failed, and end everywhere with the first error."""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import select
import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

from dist_infer.distributed.clock import OwnClock
from dist_infer.distributed.collectives import CollectiveTimeout, Communicator
from dist_infer.distributed.heartbeats import Heartbeats, left_key
from dist_infer.distributed.host import Host
from dist_infer.distributed.launch import LocalRanks
from dist_infer.distributed.logs import console, is_redirected
from dist_infer.distributed.neighbours import STOPPED, Neighbours, process_state
from dist_infer.distributed.roll_call import RollCall

POLL_S = 0.5  # how often the store is asked for another rank's error
GRACE_S = 5.0  # for the main thread to leave after a failure
VERDICT_S = 2.0  # for ranks to answer a roll call, and for a report to be heard
ECHO_S = 2.5 * VERDICT_S  # how long a broken connection waits to be told who broke it: a roll call and its report may have to come first

FAILURE = "failure"


class RankFailure(RuntimeError):
    """A rank failed; the text names it, its host and its first error.

    Attributes:
        rank: The rank that failed first; -1 if it cannot be told.
    """

    def __init__(self, text: str, rank: int = -1) -> None:
        super().__init__(text)
        self.rank = rank


class Watchdog:
    """Watches the other ranks from two daemon threads, which sleep while all is well.

    The first thread looks. A rank of this host is watched through its pidfd, and found dead at once, and through /proc, for it may be
    stopped; one of another host by rank 0, through heartbeats in the store. The first failure to reach the store is the world's,
    whoever else stumbles over it later.

    The second thread watches the first: a store whose host lost power, whose network was cut or whose process is stopped does not
    refuse an answer, it never gives one, and torch's connection to it waits for ever. So each side of a cut network ends by itself.
    It also ends the process when its main thread does not leave.

    All limits count the time in which this process ran; what is stopped as a whole (Ctrl-Z) and goes on later has not failed.

    Attributes:
        failure: The world's first error, once there is one.
        last_words: Called with the failure before the process is ended from within.
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
            heartbeat_s: A rank that is stopped, or silent on another host, for longer is dead; so is a store that does not answer.
            local_ranks: Ranks this process started, whose exit codes it can tell.
            may_exit: End the process if a rank failed and the main thread does not leave.
            announce: Print the failure as soon as it is known, because a launcher may end this rank before it can say so.
        """
        self.failure: RankFailure | None = None
        self.last_words: Callable[[RankFailure], None] | None = None
        self._rank, self._hosts, self._store, self._heartbeat_s = rank, hosts, store, heartbeat_s
        self._may_exit, self._announce = may_exit, announce
        self._communicators: list[Communicator] = []
        self._lock = threading.Lock()
        self._own: RankFailure | None = None  # what the main thread reports
        self._looks = 0  # begun and ended; odd while a look is under way
        self._found: RankFailure | None = None  # by this rank, though perhaps not published yet
        self._decided, self._stopping = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._neighbours = Neighbours(rank, hosts, local_ranks)
            self._heartbeats = Heartbeats(rank, hosts, heartbeat_s)
            self._roll_call = RollCall(rank, len(hosts))
            self._wake_read, self._wake_write = os.pipe()
            for run, name in ((self._run, "watchdog"), (self._watch_looks, "watchdog's watchdog")):
                self._threads.append(threading.Thread(target=run, name=f"dist_infer {name}", daemon=True))

    def start(self) -> None:
        """Begin to watch; ends with the process at the latest, for a thread that comes from torch while Python ends aborts it."""
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

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
        self._report(self._of(self._rank, f"failed: {_one_line(error)}"))

    def _report(self, failure: RankFailure) -> None:
        if self._threads and self._threads[0].is_alive() and not self._decided.is_set():
            self._own = failure
            os.write(self._wake_write, b"!")
            self._decided.wait(VERDICT_S)

    def explain(self, error: Exception) -> Exception:
        """The world's first error, given that this rank just raised `error`.

        That is another rank's RankFailure if one failed before (a peer's death often shows as a broken
        connection here first), else `error`, which is published so that the others leave with it. After a collective's time-out it is
        the failure of the rank that did not come.
        Use: `except Exception as error: raise world.watchdog.explain(error)`.
        """
        if not self._threads or isinstance(error, RankFailure):
            return error
        late = self._late() if isinstance(error, CollectiveTimeout) else None
        if late is None and _is_broken_connection(error):
            self._roll_call.waited = True  # it is not for this rank that another one calls
            self._decided.wait(ECHO_S)
        ours = self._of(self._rank, f"failed: {_one_line(error)}") if late is None else late
        self._report(ours)
        first = self.failure or late
        return error if first is None or (late is None and str(first) == str(ours)) else first

    def _late(self) -> RankFailure | None:
        """The failure of the rank for which this one has waited too long in a collective; None if it cannot be told."""
        assert self._store is not None
        self._roll_call.waited = True
        try:
            late = self._roll_call.hold(self._store, lambda: self._decided.wait(VERDICT_S))
        except dist.DistError:
            return None
        return None if late is None else self._of(late[0], f"did not come to a collective in time: {late[1]}")

    def stop(self) -> None:
        """Stop watching, before this rank leaves in order."""
        if self._threads and not self._stopping.is_set():
            self._stopping.set()
            os.write(self._wake_write, b"!")
            self._decided.set()
            atexit.unregister(self.stop)
            for thread in self._threads:
                if thread.is_alive() and thread is not threading.current_thread():  # whoever lets go of a model may be any
                    thread.join(GRACE_S if self.failure is None else POLL_S)  # it may be waiting for a store that is mute
            os.close(self._wake_write)
            os.close(self._wake_read)

    def _run(self) -> None:
        store = self._store
        assert store is not None
        clock, poll, wait_ms = OwnClock(2 * POLL_S), select.poll(), 0
        self._neighbours.open()
        for descriptor in (self._wake_read, *self._neighbours.descriptors):
            poll.register(descriptor, select.POLLIN)
        failure: RankFailure | None = None
        while failure is None and not self._stopping.is_set() and not self._decided.is_set():
            for descriptor, _ in poll.poll(wait_ms):
                if descriptor == self._wake_read:
                    os.read(descriptor, 1)
                else:
                    poll.unregister(descriptor)
                    self._neighbours.dead.add(self._neighbours.descriptors[descriptor])
            wait_ms = int(POLL_S * 1000)
            if self._stopping.is_set():
                break
            self._looks += 1
            try:
                failure = self._look(store, clock.read())
                if failure is not None:
                    mark_left(store, self._rank)  # the failure is known here; the server need not wait for us
            except dist.DistError as error:
                failure = failure or self._without_store(error)
            except Exception as error:  # nobody else would hear of it
                failure = self._of(self._rank, f"failed in its watchdog: {_one_line(error)}")
            self._looks += 1
        if failure is not None:
            self._settle(failure)
        self._neighbours.close()

    def _look(self, store: dist.Store, now: float) -> RankFailure | None:
        """One look at the world: the failure of a rank, or None."""
        stopped = self._neighbours.stopped(now, self._heartbeat_s)
        if store.check([FAILURE]):
            return _read(store.get(FAILURE))
        if self._own is not None:
            return self._publish(store, self._own)
        if self._neighbours.speaks(self._neighbours.dead):
            for rank in sorted(self._neighbours.dead):
                if not store.check([left_key(rank)]):
                    return self._publish(store, self._of(rank, self._neighbours.death(rank)))
        if stopped is not None:
            return self._publish(store, self._of(stopped, self._stopped_words()))
        with self._lock:
            waits = any(communicator.waiting for communicator in self._communicators)
        self._roll_call.answer(store, waits)
        silent = self._heartbeats.silent(store, now)
        if silent is not None:
            reason = f"was silent for {self._heartbeat_s:g} s; it, its host or the network to it is gone"
            return self._publish(store, self._of(silent, reason))
        return None

    def _of(self, rank: int, what: str) -> RankFailure:
        return RankFailure(f"rank {rank} ({self._hosts[rank]}) {what}", rank)

    def _stopped_words(self) -> str:
        return f"was stopped (SIGSTOP or SIGTSTP) for {self._heartbeat_s:g} s and did not go on"

    def _publish(self, store: dist.Store, found: RankFailure) -> RankFailure:
        """Put a failure into the store as the first one; returns the one that is there."""
        self._found = found
        ours = json.dumps({"text": str(found), "rank": found.rank, "by": self._rank}).encode()
        winner = store.compare_set(FAILURE, "", ours.decode())
        if winner == ours and self._announce:
            _print(str(found))
        return _read(winner)

    def _without_store(self, error: Exception) -> RankFailure:
        """The failure when the store is gone."""
        if self._found is not None:
            return self._found
        dead = self._neighbours.dead
        if self._neighbours.had_stopped(0):
            failure = self._of(0, self._stopped_words())
        elif 0 in dead:  # what happened here since is its echo
            failure = self._of(0, self._neighbours.death(0))
        elif self._own is not None:
            return self._own
        else:
            failure = self._of(0, f"is gone, or its store is, or the network to it: {_one_line(error)}")
        self._speak_alone(failure, dead | {0})
        return failure

    def _watch_looks(self) -> None:
        """Decide when a look takes too long, and see that the main thread leaves after a failure."""
        clock, look, since, stopped = OwnClock(2 * POLL_S), 0, 0.0, False
        while not self._decided.wait(POLL_S):
            now = clock.read(standing=self._launcher_stands())
            if self._looks != look or not look % 2:
                look, since, stopped = self._looks, now, False
                continue
            stopped = stopped or self._neighbours.is_stopped(0)  # another rank may have ended it by the time we decide
            if now - since > self._heartbeat_s:
                self._settle(self._mute_store(stopped))
        if self.failure is not None and not self._stopping.wait(GRACE_S) and self._may_exit:
            if is_redirected():
                faulthandler.dump_traceback()  # where it hangs
            if self.last_words is not None:
                self.last_words(self.failure)
            _print(str(self.failure))
            os._exit(1)

    def _mute_store(self, stopped: bool) -> RankFailure:
        """The failure when the store has not answered for too long; `stopped` if rank 0 is."""
        known = self._found or self._own
        if known is not None:
            return known
        mute = f"or its store cannot be reached for {self._heartbeat_s:g} s; its host or the network to it is gone"
        failure = self._of(0, self._stopped_words() if stopped else mute)
        self._speak_alone(failure, self._neighbours.dead | {0})
        return failure

    def _speak_alone(self, failure: RankFailure, gone: set[int]) -> None:
        """Print a failure that could not be published; rank 0's main thread says its own."""
        if self._rank != 0 and self.failure is None and self._neighbours.speaks(gone):
            _print(str(failure))

    def _launcher_stands(self) -> bool:
        """Whether a launcher that serves the store is stopped, as by Ctrl-Z, and will go on together with its terminal."""
        parent = os.getppid()
        return all(host.pid != parent for host in self._hosts) and process_state(parent) == STOPPED

    def _settle(self, failure: RankFailure) -> None:
        """Make the failure known here; the first one counts."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
            communicators = list(self._communicators)
        self._decided.set()
        self._neighbours.kill_if_stopped(failure.rank)
        for communicator in communicators:
            communicator.abort(failure)


def mark_left(store: dist.Store, rank: int) -> None:
    """Say that `rank` leaves in order, so that its end is no failure."""
    store.set(left_key(rank), "1")


def have_left(store: dist.Store, ranks: Sequence[int]) -> bool:
    """Whether all of `ranks` have left in order."""
    return store.check([left_key(rank) for rank in ranks])


def _read(failure: bytes) -> RankFailure:
    record = json.loads(failure)
    return RankFailure(record["text"], record["rank"])


def _one_line(error: BaseException) -> str:
    """What an error says, without the stack that torch may append."""
    text = " ".join(str(error).partition("\nException raised from")[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _print(text: str) -> None:
    print(f"dist-infer: {text}", file=console(), flush=True)


def _is_broken_connection(error: Exception) -> bool:
    """Whether `error` may be the echo of another rank's death."""
    text = str(error).lower()
    return isinstance(error, dist.DistError | ConnectionError | TimeoutError) or "gloo" in text or "nccl" in text
