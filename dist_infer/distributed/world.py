"""The ranks that work together: who they are, where they run, and how they meet."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.health import Watchdog, have_left, mark_left
from dist_infer.distributed.host import Host
from dist_infer.distributed.launch import LocalRanks, RankVariables, ending, start_local_ranks, survive_parent_thread, threads_per_rank

LEAVE_S = 10.0  # how long rank 0 waits for ranks that have not left yet
FAILED_LEAVE_S = 2.0  # the same when a rank failed
PREFIX = "dist_infer"

START_S = 120.0  # ranks may take so long to start, however short parallel.timeout_s: importing torch from a busy disk does


class World:
    """All ranks of this run, made by `join`. Close it, or use it as a context manager.

    Attributes:
        rank, size: This rank and how many there are.
        local_rank, local_size: The same among the ranks of this node.
        device: Where this rank computes.
        hosts: Where each rank runs.
        store: Key-value store all ranks share, under a prefix of our own; None in a world of one.
        backend: Backend for process groups of these ranks.
        watchdog: Watches the other ranks; in a world of one it has nothing to watch.
    """

    def __init__(
        self,
        variables: RankVariables,
        device: torch.device,
        store: dist.Store | None,
        timeout_s: float,
        local_ranks: LocalRanks | None = None,
    ) -> None:
        """Meet the other ranks at `store`; without one this is a world of one."""
        self.rank, self.size = variables.rank, variables.world_size
        self.local_rank, self.local_size = variables.local_rank, variables.local_world_size
        self.device, self.store = device, store
        self._timeout_s, self._local_ranks = max(timeout_s, START_S), local_ranks
        self._device_before: int | None = None
        if device.type == "cuda":
            self._device_before = torch.cuda.current_device()
            torch.cuda.set_device(device)
        self._exchanges: Counter[str] = Counter()
        self._owns_group = self._serves_store = False
        self._threads: int | None = None
        self.hosts: tuple[Host, ...] = (Host.here(device),)
        self.watchdog = Watchdog(0, self.hosts, None, 1.0)
        if store is not None:
            records = self._exchange("host", asdict(self.hosts[0]), range(self.size), self._check_start)
            self._timeout_s = timeout_s
            self.hosts = tuple(Host(**record) for record in records)
        gpus = [(host.boot_id, host.gpu) for host in self.hosts]
        self.backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and len(set(gpus)) == self.size else "gloo"

    @classmethod
    def join(
        cls,
        parallel: ParallelOptions,
        device: str = "auto",
        size: int | None = None,
        worker_command: Sequence[str] | None = None,
        may_exit: bool = True,
    ) -> World:
        """Meet the other ranks.

        Args:
            parallel: Time-outs.
            device: auto, cpu or cuda.
            size: Ranks wanted. Under torchrun or srun, or in a process group that exists already, it must be None or their number;
                alone, this process becomes rank 0 and starts the others.
            worker_command: Program of the ranks that we start ourselves, with its arguments.
            may_exit: The watchdog may end the process when a rank failed and the main thread does not leave.

        Raises:
            ValueError: The device is not there, or the world has another size.
            RuntimeError: Not all ranks came in time; the message says which did.
        """
        if dist.is_initialized():
            return cls._join_group(parallel, device, size, may_exit)
        variables = RankVariables.read()
        if variables is None and (size or 1) > 1:
            return cls._start(parallel, device, size or 1, worker_command, may_exit)
        variables = variables or RankVariables(0, 1, 0, 1, "127.0.0.1", 0)
        _check_size(size, variables.world_size, variables.launcher)
        place = choose_device(device, variables.local_rank)
        if variables.world_size == 1:
            return cls(variables, place, None, parallel.timeout_s)
        store, serves = _connect(variables, parallel.timeout_s)
        world = cls(variables, place, store, parallel.timeout_s)
        world._serves_store = serves
        world._begin(parallel, may_exit, announce=variables.launcher != "local")
        if variables.launcher == "local":
            survive_parent_thread()
        return world

    @classmethod
    def _start(cls, parallel: ParallelOptions, device: str, size: int, command: Sequence[str] | None, may_exit: bool) -> World:
        """Become rank 0 and start the other ranks."""
        if command is None:
            raise ValueError(f"a world of {size} ranks: start it with torchrun or srun")
        place = choose_device(device, 0)
        server = _serve_locally(size, parallel.timeout_s)
        local_ranks = start_local_ranks(size, command, server.port)
        try:
            variables = RankVariables(0, size, 0, size, "127.0.0.1", server.port, launcher="local")
            world = cls(variables, place, dist.PrefixStore(f"{PREFIX}/0", server), parallel.timeout_s, local_ranks)
            world._serves_store = True
            if "OMP_NUM_THREADS" not in os.environ:
                world._threads = torch.get_num_threads()
                torch.set_num_threads(threads_per_rank(size))
            world._begin(parallel, may_exit, announce=False)
        except BaseException:
            local_ranks.stop(0.0)
            raise
        return world

    @classmethod
    def _join_group(cls, parallel: ParallelOptions, device: str, size: int | None, may_exit: bool) -> World:
        """Use the default process group of a job that runs already."""
        rank, found = dist.get_rank(), dist.get_world_size()
        _check_size(size, found, "the running process group")
        local_rank = RankVariables.read()
        local, local_size = (local_rank.local_rank, local_rank.local_world_size) if local_rank else (rank, found)
        variables = RankVariables(rank, found, local, local_size, "", 0)
        use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        place = torch.device("cuda", torch.cuda.current_device()) if use_gpu else choose_device(device, local)
        if found == 1:
            return cls(variables, place, None, parallel.timeout_s)
        group = dist.group.WORLD
        assert group is not None
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        store = dist.PrefixStore(f"{PREFIX}/{name[0]}", _second_connection(group.get_group_store()))
        world = cls(variables, place, store, parallel.timeout_s)
        world._begin(parallel, may_exit, announce=False)
        return world

    def _begin(self, parallel: ParallelOptions, may_exit: bool, announce: bool) -> None:
        """Start the watchdog, and the process group unless there is one."""
        assert self.store is not None
        self.watchdog = Watchdog(
            self.rank, self.hosts, _second_connection(self.store), parallel.heartbeat_s, self._local_ranks, may_exit, announce
        )
        self.watchdog.start()
        if not dist.is_initialized():
            timeout = timedelta(seconds=parallel.timeout_s)
            groups = dist.PrefixStore("groups", self.store)
            try:
                dist.init_process_group(self.backend, store=groups, rank=self.rank, world_size=self.size, timeout=timeout)
            except Exception as error:
                raise self.watchdog.explain(error) from error
            self._owns_group = True

    @property
    def sharing(self) -> int:
        """Ranks that share this one's memory: its GPU's, or on CPU its node's."""
        here = self.hosts[self.rank]
        if here.gpu is None:
            return self.local_size
        return sum((host.boot_id, host.gpu) == (here.boot_id, here.gpu) for host in self.hosts)

    def exchange(self, topic: str, value: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        """Every rank's `value` (JSON), in the order of `ranks` (world ranks, default all), which must all call this.

        Raises:
            RankFailure: A rank failed meanwhile.
            RuntimeError: Some did not come within `parallel.timeout_s`; the message says which.
        """
        return self._exchange(topic, value, range(self.size) if ranks is None else ranks, self.watchdog.check)

    def _exchange(self, topic: str, value: Any, ranks: Sequence[int], check: Callable[[], None]) -> list[Any]:
        if self.store is None:
            return [value]
        self._exchanges[topic] += 1
        keys = [f"exchange/{topic}/{self._exchanges[topic]}/{rank}" for rank in ranks]
        started, pause = time.monotonic(), 0.0002
        try:
            self.store.set(keys[ranks.index(self.rank)], json.dumps(value))
            while not self.store.check(keys):
                check()
                if time.monotonic() - started > self._timeout_s:
                    raise RuntimeError(self._missing(topic, ranks, [self.store.check([key]) for key in keys]))
                time.sleep(pause)
                pause = min(pause * 1.5, 0.02)
            return [json.loads(item) for item in self.store.multi_get(keys)]
        except dist.DistError as error:
            raise self.watchdog.explain(RuntimeError(f"rank {self.rank} lost the store, which rank 0 or its launcher serves")) from error

    def _missing(self, topic: str, ranks: Sequence[int], came: Sequence[bool]) -> str:
        here = ", ".join(str(rank) for rank, there in zip(ranks, came, strict=True) if there)
        gone = ", ".join(str(rank) for rank, there in zip(ranks, came, strict=True) if not there)
        look = "look at these ranks' own output, and whether their hosts reach MASTER_ADDR:MASTER_PORT"
        return f"rank {gone} did not come to '{topic}' within {self._timeout_s:g} s (rank {here} did); {look}"

    def _check_start(self) -> None:
        """Raise if a rank that we started has ended before it came."""
        for rank, code in (self._local_ranks.poll() if self._local_ranks else {}).items():
            raise RuntimeError(f"rank {rank} {ending(code)} while starting; its own error is above")

    def close(self, failed: bool = False) -> None:
        """Leave: orderly with the others, or (`failed`) without waiting for them. What `join` found is left as it was."""
        if self._device_before is not None:
            torch.cuda.set_device(self._device_before)
            self._device_before = None
        store, self.store = self.store, None
        if store is None:
            return
        if not failed:
            failed = not self._leave(store)
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        self.watchdog.stop()
        if self._serves_store:
            self._serve_until_left(store, FAILED_LEAVE_S if failed else LEAVE_S)
        if self._local_ranks:
            self._local_ranks.stop(FAILED_LEAVE_S if failed else LEAVE_S)
        if self._threads:
            torch.set_num_threads(self._threads)

    def _leave(self, store: dist.Store) -> bool:
        """Say that this rank leaves in order; False if the store is gone."""
        try:
            mark_left(store, self.rank)
        except dist.DistError:
            return False
        return self.watchdog.failure is None

    def _serve_until_left(self, store: dist.Store, limit_s: float) -> None:
        """Let the others read the store until they have left, or learnt of the failure."""
        deadline = time.monotonic() + limit_s
        while not have_left(store, range(self.size)) and time.monotonic() < deadline:
            if self._local_ranks and len(self._local_ranks.poll()) == self.size - 1:
                return
            time.sleep(0.005)

    def __enter__(self) -> World:
        """The world itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close; the others are told of an error that passes through here."""
        if error is not None:
            self.watchdog.report(error)
        self.close(failed=error is not None)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device `auto`, `cpu` or `cuda` means for a rank; ranks share GPUs when there are more ranks.

    Raises:
        ValueError: Another word, or no CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: must be one of auto, cpu, cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no CUDA device here; use device=cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _check_size(wanted: int | None, found: int, whose: str) -> None:
    if wanted is not None and wanted != found:
        raise ValueError(f"parallel: the mesh has {wanted} ranks, but {whose} has {found}; give axes whose product is {found}")


def _second_connection(store: dist.Store) -> dist.Store:
    """The same store, not blocked while another thread waits on the first connection."""
    return store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # torch's stubs lack it


def _serve_locally(size: int, timeout_s: float) -> dist.TCPStore:
    """A store that only this machine can reach, at a port that is free."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4 * size)
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=max(timeout_s, START_S))
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach())


def _connect(variables: RankVariables, timeout_s: float) -> tuple[dist.Store, bool]:
    """A connection to the store at the master address, and whether this rank serves it."""
    serves = variables.rank == 0 and not variables.agent_store
    address = (variables.master_addr, variables.master_port)
    try:
        store = dist.TCPStore(*address, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=max(timeout_s, START_S)))
    except RuntimeError as error:
        where = f"{address[0]}:{address[1]}"
        problem = f"rank {variables.rank} cannot {'serve' if serves else 'reach'} the store at {where}"
        raise RuntimeError(f"{problem}; look at rank 0's output, at MASTER_ADDR and MASTER_PORT") from error
    return dist.PrefixStore(f"{PREFIX}/{variables.attempt}", store), serves
