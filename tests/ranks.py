"""Real gloo ranks for ordinary test functions, kept warm: importing torch costs seconds a process."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.device_mesh"]
TIMEOUT = timedelta(seconds=60)


class RankError(AssertionError):
    """A function failed on a rank; the text is its traceback."""


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection


class Ranks:
    """Warm processes; `pool(2).run(function, ...)` runs a function on two of them as ranks 0 and 1."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._ranks: list[_Rank] = []
        self._directory = tempfile.mkdtemp(prefix="dist_infer-ranks-")
        self._runs = 0

    def __call__(self, size: int) -> RankGroup:
        """The first `size` ranks."""
        return RankGroup(self, size)

    def run(self, size: int, function: str, arguments: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """Run `module:function` on `size` ranks with a fresh default process group; their results in rank order."""
        if any(not rank.process.is_alive() for rank in self._ranks):
            self._stop()
        while len(self._ranks) < size:
            self._ranks.append(self._start())
        self._runs += 1
        ranks = self._ranks[:size]
        # A file: the TCP store asks the name server about each connection, and some answer after seconds.
        store = f"{self._directory}/{self._runs}"
        for index, rank in enumerate(ranks):
            rank.connection.send((store, index, size, function, arguments))
        try:
            return self._collect(ranks, time.monotonic() + timeout_s)
        except RankError:
            self._stop()  # the ranks may be in any state now
            raise

    def _start(self) -> _Rank:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, sys.path), daemon=True)
        process.start()
        there.close()
        return _Rank(process, here)

    def _collect(self, ranks: list[_Rank], deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {rank.connection: index for index, rank in enumerate(ranks)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} did not finish in time")
            for connection in ready:
                assert isinstance(connection, Connection)
                index = waiting.pop(connection)
                try:
                    failed, result = connection.recv()
                except EOFError:
                    raise RankError(f"rank {index} died") from None
                if failed:
                    raise RankError(f"on rank {index}:\n{result}")
                results[index] = result
        return [results[index] for index in range(len(ranks))]

    def close(self) -> None:
        """End the pool."""
        self._stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _stop(self) -> None:
        for rank in self._ranks:
            rank.connection.close()
            rank.process.kill()
            rank.process.join()
        self._ranks.clear()


@dataclass
class RankGroup:
    """Some ranks of a pool."""

    pool: Ranks
    size: int

    def run(self, function: str | Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call a module-level function (or `"module:function"`) on every rank; their results in rank order.

        Raises:
            RankError: It raised on a rank, or did not return within `timeout_s`.
        """
        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        return self.pool.run(self.size, name, arguments, timeout_s)


def _serve(connection: Connection, path: list[str]) -> None:
    """What a warm rank does: wait for a function, join a process group, run it, answer."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    sys.path[:] = path
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        try:
            store, rank, size, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            module, _, function = name.partition(":")
            call = getattr(importlib.import_module(module), function)
            dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=TIMEOUT)
            answer = (False, call(*arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)
