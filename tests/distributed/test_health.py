"""Ranks that fail, and what the others say."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.clock import OwnClock
from dist_infer.distributed.collectives import CollectiveTimeout
from dist_infer.distributed.health import RankFailure, Watchdog
from dist_infer.distributed.host import Host
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.neighbours import Neighbours
from dist_infer.distributed.world import World
from tests.distributed.test_launch import assert_gone, start_alone
from tests.ranks import PRELOAD, Ranks

HERE = Host.here(torch.device("cpu"))


def launched(rank: int, size: int, port: int, directory: str, kind: str, ready: Connection) -> None:
    """A rank as a launcher that serves the store itself would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ.pop("SLURM_STEP_ID", None)
    torch.set_num_threads(1)
    sys.stderr = Path(directory, str(rank)).open("a")  # noqa: SIM115  # as long as the process
    world = World.join(ParallelOptions(timeout_s=60, heartbeat_s=1.5), "cpu")
    rounds = os.open(Path(directory, "rounds"), os.O_CREAT | os.O_RDWR)
    mesh = Mesh(world, MeshShape(1, 1, size), ParallelOptions(collectives="process_group" if kind == "process_group" else "shared_memory"))
    mesh.tp.barrier()
    ready.send(True)
    rounds_done = 0
    try:
        while kind != "stuck":
            mesh.tp.all_reduce(torch.ones(8))
            if rank == 0:
                os.pwrite(rounds, str(rounds_done := rounds_done + 1).encode(), 0)
        while True:
            signal.pause()
    except Exception as error:
        first = world.watchdog.explain(error)
        print(f"rank {rank} raised: {first}", file=sys.stderr, flush=True)
        world.close(failed=True)
        os._exit(7)


class Launched:
    """Three ranks, and the store they were given."""

    def __init__(self, kind: str, directory: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.store: dist.TCPStore | None = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.directory = directory
        pipes = [context.Pipe(duplex=False) for _ in range(3)]
        self.processes = [
            context.Process(target=launched, args=(rank, 3, self.store.port, str(directory), kind, pipes[rank][1]), daemon=True)
            for rank in range(3)
        ]
        for process in self.processes:
            process.start()
        for reading, writing in pipes:
            writing.close()
            assert reading.recv()

    def exit_codes(self) -> list[int | None]:
        """Once all have left; 15 seconds are what they may take."""
        for process in self.processes:
            process.join(15.0)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def rounds(self) -> int:
        """Collectives so far."""
        return int((self.directory / "rounds").read_text() or 0)

    def await_rounds(self) -> None:
        """Until there were more."""
        before, deadline = self.rounds(), time.monotonic() + 30
        while self.rounds() <= before:
            assert time.monotonic() < deadline, "the ranks do not go on"
            time.sleep(0.02)

    def said(self, rank: int) -> list[str]:
        return (self.directory / str(rank)).read_text().splitlines()


@pytest.mark.parametrize("kind", ["shared_memory", "process_group", "stuck"])
def test_killed_rank_is_named(kind: str, tmp_path: Path) -> None:
    world = Launched(kind, tmp_path)
    pid = world.processes[1].pid
    world.processes[1].kill()
    codes = world.exit_codes()
    assert codes[1] == -signal.SIGKILL
    assert [codes[0], codes[2]] == ([1, 1] if kind == "stuck" else [7, 7])
    for rank in (0, 2):
        assert f"rank 1 (host {HERE.name}, pid {pid}) died without a word" in world.said(rank)[-1]
    announced = [line for rank in (0, 2) for line in world.said(rank) if line.startswith("dist-infer: rank 1")]
    assert len(announced) == (3 if kind == "stuck" else 1)  # at once by one of them; by both before they exit stuck


@pytest.mark.parametrize(("kind", "victim"), [("shared_memory", 0), ("process_group", 1)])
def test_stopped_rank_is_named_and_killed(kind: str, victim: int, tmp_path: Path) -> None:
    world = Launched(kind, tmp_path)
    pid = world.processes[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    codes = world.exit_codes()
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [7, 7]
    for rank in {0, 1, 2} - {victim}:
        assert f"rank {victim} (host {HERE.name}, pid {pid}) was stopped (SIGSTOP or SIGTSTP) for 1.5 s" in world.said(rank)[-1]


def test_a_pause_of_all_is_no_failure(tmp_path: Path) -> None:
    """As Ctrl-Z and fg do, the ranks before the launcher and after."""
    world = Launched("shared_memory", tmp_path)
    world.await_rounds()
    for process in world.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3.0)  # the pause is what is tested
    for process in world.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)
    world.await_rounds()
    time.sleep(1.0)  # twice what a watchdog takes between two looks
    world.await_rounds()
    for process in world.processes:
        process.kill()


@pytest.mark.parametrize("victim", [0, 2])
def test_stopped_rank_of_our_own_leaves_nothing(victim: int) -> None:
    process = start_alone("loop", "1")
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())["pids"]
    os.kill(pids[victim], signal.SIGSTOP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if victim == 0 else 1)
    assert f"rank {victim} (host {HERE.name}, pid {pids[victim]}) was stopped" in err.strip().splitlines()[-1]
    assert_gone(pids)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("python_memory", "failed: MemoryError"),
        ("tensor_memory", "memory"),
        ("hang", "did not come to a collective in time: it was in misbehave (alone.py:"),
        ("hang_gloo", "did not come to a collective in time: it was in misbehave (alone.py:"),
    ],
)
def test_a_rank_without_memory_or_end_is_named(mode: str, said: str) -> None:
    process = start_alone(mode, "10", "1")
    out, err = process.communicate(timeout=60)
    last, pids = err.strip().splitlines()[-1], json.loads(out)["pids"]
    assert process.returncode == 1
    assert f"rank 2 (host {HERE.name}, pid {pids[2]})" in last and said in last
    assert_gone(pids)


def test_lost_store_is_named(tmp_path: Path) -> None:
    world = Launched("shared_memory", tmp_path)
    world.store = None
    assert world.exit_codes() == [7, 7, 7]
    assert all("rank 0 (" in world.said(rank)[-1] and "or its store" in world.said(rank)[-1] for rank in range(3))


def check_first_error() -> tuple[str, str]:
    """All ranks fail at once, differently."""
    with World.join(ParallelOptions(), "cpu") as world:
        error = world.watchdog.explain(ValueError(f"number {world.rank}"))
        first = str(world.watchdog.failure)
        world.exchange = None  # type: ignore[assignment,method-assign]  # nothing may need the others from here on
        world.close(failed=True)
        return first, f"{type(error).__name__}: {error}"


def test_first_error_wins(ranks: Ranks) -> None:
    answers = ranks(3).run(check_first_error)
    firsts = {first for first, _ in answers}
    assert len(firsts) == 1
    winner = int(firsts.pop().removeprefix("rank ").split()[0])
    for rank, (first, raised) in enumerate(answers):
        assert raised == (f"ValueError: number {rank}" if rank == winner else f"RankFailure: {first}")


def check_echo() -> str:
    """Rank 2 is late: rank 1 has waited for it too long, and rank 0 is told no more than that a connection broke."""
    world = World.join(ParallelOptions(), "cpu", may_exit=False)
    assert world.store is not None
    if world.rank == 0:
        threading.Thread(target=say_that_it_waits, args=(world,), daemon=True).start()
        error = world.watchdog.explain(RuntimeError("gloo: Connection closed by peer"))
    elif world.rank == 1:
        world.store.wait(["rank 0 waits"], timedelta(seconds=30))
        error = world.watchdog.explain(CollectiveTimeout("waited"))
    else:
        while world.watchdog.failure is None:
            threading.Event().wait(0.01)
        error = world.watchdog.failure
    world.close(failed=True)
    return str(error)


def say_that_it_waits(world: World) -> None:
    """Beside the main thread: rank 1 may call the roll once this rank's explanation has begun."""
    while not world.watchdog._roll_call.waited:
        threading.Event().wait(0.001)
    assert world.store is not None
    world.store.set("rank 0 waits", "1")


def test_broken_connection_waits_for_the_roll_call(ranks: Ranks) -> None:
    for said in ranks(3).run(check_echo):
        assert re.match(r"rank 2 \(host .*, pid \d+\) did not come to a collective in time: it was in ", said), said


def check_stops_waiting() -> None:
    """A rank fails while the others wait for a message from it."""
    with contextlib.suppress(RankFailure), World.join(ParallelOptions(), "cpu") as world:
        if world.rank == 1:
            world.watchdog.report(ValueError("no"))
            return
        with pytest.raises(RankFailure, match=r"rank 1 \(host .*, pid \d+\) failed: ValueError: no"):
            world.exchange("never", None)
        world.watchdog.check()


def test_exchange_ends_with_the_error(ranks: Ranks) -> None:
    ranks(2).run(check_stops_waiting)


def test_missing_rank_is_named(ranks: Ranks) -> None:
    ranks(2).run(check_missing)


def check_missing() -> None:
    with World.join(ParallelOptions(timeout_s=0.2), "cpu") as world:
        assert world.store is not None
        if world.rank == 0:
            with pytest.raises(RuntimeError, match=r"rank 1 did not come to 'here' within .*\(rank 0 did\)"):
                world.exchange("here", None)
            world.store.set("go", "1")
        world.store.wait(["go"])


def test_orderly_end_is_no_failure(ranks: Ranks) -> None:
    assert ranks(2).run(check_orderly) == [None, None]


def check_orderly() -> None:
    world = World.join(ParallelOptions(), "cpu")
    world.exchange("once", None)
    world.close()
    assert world.watchdog.failure is None
    assert dist.is_initialized()  # it was there before


class Aborted(threading.Event):
    """Stands in for a communicator: set when aborted."""

    waiting = False

    def abort(self, error: Exception) -> None:
        self.set()


def test_silent_host_is_named() -> None:
    """Rank 1 is on another host and never beats again; rank 2 does."""
    store = dist.HashStore()
    hosts = [HERE, replace(HERE, name="far", boot_id="x"), replace(HERE, name="near", boot_id="y")]
    for rank in (1, 2):
        store.set(f"beat/{rank}", "0")
    watchdog = Watchdog(0, hosts, store, heartbeat_s=0.4, may_exit=False)
    aborted = Aborted()
    watchdog.guard(aborted)  # type: ignore[arg-type]
    watchdog.start()
    beats = 0
    deadline = time.monotonic() + 15
    while not aborted.wait(0.05) and time.monotonic() < deadline:
        beats += 1
        store.set("beat/2", str(beats))
    with pytest.raises(RankFailure, match=r"rank 1 \(host far, pid \d+\) was silent for 0.4 s"):
        watchdog.check()
    watchdog.stop()


def test_a_kill_for_lack_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = iter([4, 4, 5])
    monkeypatch.setattr("dist_infer.distributed.neighbours._killed_for_memory", lambda: next(killed))
    neighbours = Neighbours(0, [HERE, HERE], None)
    assert neighbours.death(1) == "died without a word: killed, or out of memory"
    assert neighbours.death(1).endswith("; the kernel has killed for lack of memory on this host since the run began")


def test_time_in_which_a_process_does_not_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("dist_infer.distributed.clock.time.monotonic", lambda: now)
    clock = OwnClock(most_s=1.0)
    now += 0.5
    assert clock.read() == 0.5
    now += 3600.0  # Ctrl-Z, lunch, fg
    assert clock.read() == 1.5
    now += 0.25
    assert clock.read(standing=True) == 1.5
    now += 0.25
    assert clock.read() == 1.75
