"""Makes the communicators of a mesh: of those that work between some ranks, the best."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.choice import BySize, fastest, measure
from dist_infer.distributed.collectives import Communicator, ProcessGroup, SingleRank
from dist_infer.distributed.hierarchical import Hierarchical
from dist_infer.distributed.shared_memory import SharedMemory
from dist_infer.distributed.symmetric_memory import SymmetricMemory
from dist_infer.distributed.world import World

C = TypeVar("C", bound=Communicator)


class Connector:
    """Connects ranks of a world as `parallel.collectives` says.

    With auto, CPU ranks of one host use shared memory: no network beats it. Where the machine decides (GPUs, several hosts) all that
    works is measured.

    Attributes:
        notes: A sentence for each choice that was measured.
    """

    def __init__(self, world: World, parallel: ParallelOptions) -> None:
        self._world, self._parallel, self._wanted = world, parallel, parallel.collectives
        self._communicators: list[Communicator] = []
        self.notes: list[str] = []
        if self._wanted == "symmetric_memory" and world.device.type == "cpu":
            raise self._refusal("the ranks compute on CPU")

    def connect(self, ranks: tuple[int, ...], device: torch.device) -> Communicator:
        """A communicator between `ranks`, which must all call this, for tensors on `device`.

        Raises:
            ValueError: What was asked for by name does not work between them.
        """
        if len(ranks) == 1:
            return SingleRank()
        if self._wanted == "process_group":
            return self.process_group(ranks, device)
        hosts = self._hosts(ranks)
        if device.type == "cpu" and (len(hosts) == 1 or self._wanted == "shared_memory"):
            shared = self._shared(ranks)
            if isinstance(shared, str):
                if self._wanted == "shared_memory":
                    raise self._refusal(shared)
                return self.process_group(ranks, device)
            return shared
        group = self.process_group(ranks, device)
        candidates: dict[str, Communicator] = {"process_group": group}
        if len(hosts) == 1:
            self._add(candidates, "symmetric_memory", lambda: self._symmetric(ranks, group))
        elif len(hosts) < len(ranks):
            self._add(candidates, "hierarchical", lambda: self._hierarchical(ranks, hosts, group, device))
        return self._best(candidates, ranks, device)

    def process_group(self, ranks: tuple[int, ...], device: torch.device) -> ProcessGroup:
        """torch's process group of `ranks`."""
        timeout_s = self._parallel.timeout_s
        return self._keep(ProcessGroup(_group(self._world, ranks, timeout_s), device, timeout_s))

    def close(self) -> None:
        """Free the communicators."""
        while self._communicators:
            communicator = self._communicators.pop()
            self._world.watchdog.release(communicator)
            communicator.close()

    def _add(self, candidates: dict[str, Communicator], name: str, make: Callable[[], Communicator | str]) -> None:
        """Add what `make` makes, or hold to it alone if it was asked for by name."""
        if self._wanted not in ("auto", name):
            return
        made = make()
        if isinstance(made, Communicator):
            candidates[name] = made
            if self._wanted == name:
                del candidates["process_group"]
        elif self._wanted == name:
            raise self._refusal(made)

    def _best(self, candidates: dict[str, Communicator], ranks: tuple[int, ...], device: torch.device) -> Communicator:
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        own = {name: measure(communicator, device) for name, communicator in candidates.items()}
        of_ranks = self._world.exchange(f"collectives.{_name(ranks)}", own, ranks)
        best, sentence = fastest({name: [figures[name] for figures in of_ranks] for name in candidates})
        self.notes.append(f"collectives of ranks {', '.join(map(str, ranks))} on {device.type}: {sentence}")
        return candidates[best[0]] if len(set(best)) == 1 else BySize([candidates[name] for name in best])

    def _shared(self, ranks: tuple[int, ...]) -> SharedMemory | str:
        made = SharedMemory.connect(self._world, ranks, self._parallel.timeout_s)
        return made if isinstance(made, str) else self._keep(made)

    def _symmetric(self, ranks: tuple[int, ...], group: ProcessGroup) -> SymmetricMemory | str:
        if "nccl" not in self._world.backend:
            return "the ranks share GPUs"
        made = SymmetricMemory.connect(self._world, ranks, group)
        return made if isinstance(made, str) else self._keep(made)

    def _hierarchical(
        self, ranks: tuple[int, ...], hosts: list[tuple[int, ...]], group: ProcessGroup, device: torch.device
    ) -> Hierarchical | str:
        places = {rank: (host, index) for host, on_host in enumerate(hosts) for index, rank in enumerate(on_host)}
        host, index = places[self._world.rank]
        inside = self._inside(hosts[host], device)
        refused = self._world.exchange(f"inside.{_name(ranks)}", inside if isinstance(inside, str) else None, ranks)
        reason = next((text for text in refused if text is not None), None)
        if isinstance(inside, str) or reason is not None:
            return str(reason)
        peers = tuple(on_host[index] for on_host in hosts if index < len(on_host))
        even = len({len(on_host) for on_host in hosts}) == 1
        across = self.process_group(peers, device) if even or index == 0 else None
        return Hierarchical(group, inside, across, [places[rank] for rank in ranks], even)

    def _inside(self, ranks: tuple[int, ...], device: torch.device) -> Communicator | str:
        """Between the ranks of one host."""
        if len(ranks) == 1:
            return SingleRank()
        if device.type == "cpu":
            return self._shared(ranks)
        group = self.process_group(ranks, device)
        symmetric = self._symmetric(ranks, group)
        return group if isinstance(symmetric, str) else symmetric

    def _hosts(self, ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
        """`ranks` by host: those that can open each other's files, in order of their first ranks."""
        hosts: list[list[int]] = []
        for rank in ranks:
            place = self._world.hosts[rank]
            here = next((on_host for on_host in hosts if place.sees(self._world.hosts[on_host[0]])), None)
            if here is None:
                hosts.append([rank])
            else:
                here.append(rank)
        return [tuple(on_host) for on_host in hosts]

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"parallel.collectives={self._wanted}: {reason}; use auto or process_group")

    def _keep(self, communicator: C) -> C:
        self._communicators.append(communicator)
        self._world.watchdog.guard(communicator)
        return communicator


def _name(ranks: tuple[int, ...]) -> str:
    return "-".join(map(str, ranks))


# Of the process's default group. torch names a group by its ranks and by how many groups there are, so one that is made again
# after it was destroyed finds what the first left in the store; and a look between training steps is taken often. They live as
# long as torch keeps them: a group that outlives its threads' time ends the process.
_groups: WeakValueDictionary[tuple[tuple[int, ...], str, float], dist.ProcessGroup] = WeakValueDictionary()


def _group(world: World, ranks: tuple[int, ...], timeout_s: float) -> dist.ProcessGroup:
    """The process group of `ranks`, all of which call this: an earlier mesh's, or a new one."""
    key = ranks, world.backend, timeout_s
    group = _groups.get(key)
    if group is None or not _exists(group):
        # Ranks of one host may be in more groups than those of another, and would look for the new one under unlike names.
        most = max(world.exchange(f"groups.{_name(ranks)}", _count(), ranks))
        while _count() < most:
            _new_group((world.rank,), world.backend, timeout_s)
        group = _groups[key] = _new_group(ranks, world.backend, timeout_s)
    return group


def _new_group(ranks: tuple[int, ...], backend: str, timeout_s: float) -> dist.ProcessGroup:
    made = dist.new_group(list(ranks), timedelta(seconds=timeout_s), backend, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _count() -> int:
    """How many groups this rank is in, as torch counts for their names."""
    return len(dist.distributed_c10d._world.pg_names)


def _exists(group: dist.ProcessGroup) -> bool:
    """Whether the default group that `group` was made beside is still there."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False
