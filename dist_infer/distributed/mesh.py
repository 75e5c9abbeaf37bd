"""The mesh: world = replicas x fsdp x tp, tp innermost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.collectives import Communicator
from dist_infer.distributed.connect import Connector
from dist_infer.distributed.world import World

WEIGHTS_FRACTION = 0.8  # of a rank's free memory that weights may take before fsdp cuts them


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on each axis."""

    replica: int
    fsdp: int
    tp: int


@dataclass(frozen=True)
class MeshShape:
    """Ranks along each axis."""

    replicas: int
    fsdp: int
    tp: int

    @property
    def size(self) -> int:
        """Ranks in the mesh."""
        return self.replicas * self.fsdp * self.tp

    def __str__(self) -> str:
        """As the user would give it."""
        return f"replicas={self.replicas} x fsdp={self.fsdp} x tp={self.tp}"

    def coordinates(self, rank: int) -> Coordinates:
        """Where world rank `rank` stands."""
        return Coordinates(rank // (self.fsdp * self.tp), rank // self.tp % self.fsdp, rank % self.tp)


def choose_mesh(
    parallel: ParallelOptions,
    world_size: int | None,
    ranks_per_node: int,
    heads: int | None = None,
    model_bytes: int | None = None,
    free_bytes_per_rank: int | None = None,
    accelerators: int = 0,
) -> tuple[MeshShape, str]:
    """The mesh, and a sentence that says what was chosen and why.

    Every rank of a world must call this with the same arguments.

    Args:
        parallel: The axes that the user gave.
        world_size: Ranks there are; None for a process that was started alone and may start as many as it likes.
        ranks_per_node: Ranks of a node, between which tp is fast; unused when started alone.
        heads: Query heads of the model, which tp cannot exceed.
        model_bytes: Bytes of all weights in the compute type.
        free_bytes_per_rank: Memory a rank may use; None if unknown.
        accelerators: GPUs of this machine, of which a process started alone uses all if no axis is given.

    Raises:
        ValueError: The axes given do not make up the world, or tp exceeds the heads.
    """
    replicas, fsdp, tp = parallel.replicas, parallel.fsdp, parallel.tp
    given = {name: value for name, value in (("replicas", replicas), ("fsdp", fsdp), ("tp", tp)) if value is not None}
    product = math.prod(given.values())
    if world_size is None:
        world_size = ranks_per_node = product if given else max(1, accelerators)
    if world_size % product or (len(given) == 3 and world_size != product):
        axes = " x ".join(f"{name}={value}" for name, value in given.items())
        ranks = f"{product} rank{'s' * (product > 1)}"
        valid = f"start {product}, or give axes whose product is {world_size}"
        raise ValueError(f"parallel: {axes} = {ranks}, but the world has {world_size}; {valid}")

    rest, reasons = world_size // product, []
    if tp is None:
        if fsdp is not None and replicas is not None:
            tp = rest
        else:
            limit = min(heads or rest, rest)
            tp = max(size for size in range(1, limit + 1) if math.gcd(rest, ranks_per_node) % size == 0)
            if rest > 1:
                reasons.append(f"tp over the ranks of a node ({ranks_per_node})")
        rest //= tp
    if heads is not None and tp > heads:
        raise ValueError(f"parallel.tp={tp}: the model has {heads} query heads; tp can be at most {heads}")
    if fsdp is None and replicas is None:
        fits, why = _fits(model_bytes, tp, free_bytes_per_rank)
        replicas, fsdp = (rest, 1) if fits else (1, rest)
        if rest > 1:
            reasons.append(f"the rest {'replicas' if fits else 'fsdp'}, as {why}")
    elif fsdp is None:
        fsdp = rest
    elif replicas is None:
        replicas = rest
    assert fsdp is not None and replicas is not None
    shape = MeshShape(replicas, fsdp, tp)
    because = f": {', '.join(reasons)}" if reasons else ""
    return shape, f"mesh of {world_size} rank{'s' * (world_size > 1)}: {shape}{because}"


def _fits(model_bytes: int | None, tp: int, free_bytes: int | None) -> tuple[bool, str]:
    """Whether a tp rank's weights leave room for a KV cache, in words too."""
    if model_bytes is None or free_bytes is None:
        return True, "the memory a rank has is not known"
    share = f"{model_bytes / tp / 2**30:.2f} GiB of weights a rank"
    free = f"{free_bytes / 2**30:.2f} GiB free"
    if model_bytes / tp <= WEIGHTS_FRACTION * free_bytes:
        return True, f"{share} fit in {free}"
    return False, f"{share} do not fit in {free}"


class Mesh:
    """This rank's place in the mesh and its communicators.

    Attributes:
        shape: Ranks along each axis.
        coordinates: Where this rank stands.
        control: All fsdp x tp ranks of this replica, for CPU tensors; index 0 is the leader, index = fsdp * shape.tp + tp.
        tp: The tp ranks that share this rank's sequences, for tensors of the compute device; `control` itself where that is the same.
        fsdp_device_mesh: torch's mesh of the fsdp axis, for `fully_shard`; None at fsdp=1.
    """

    def __init__(self, world: World, shape: MeshShape, parallel: ParallelOptions) -> None:
        """Make the communicators; every rank of the world must do so.

        Raises:
            ValueError: The shape is not the world's, or the collectives that were asked for do not work.
        """
        if shape.size != world.size:
            raise ValueError(f"parallel: {shape} = {shape.size} ranks, but the world has {world.size}")
        self.shape, self.coordinates = shape, shape.coordinates(world.rank)
        self._world, self._connector = world, Connector(world, parallel)
        width = shape.fsdp * shape.tp
        first = self.coordinates.replica * width
        replica = tuple(range(first, first + width))
        first_tp = first + self.coordinates.fsdp * shape.tp
        tp = tuple(range(first_tp, first_tp + shape.tp))
        fsdp = replica[self.coordinates.tp :: shape.tp]

        self._twins: Communicator | None = None
        cpu = torch.device("cpu")
        connect = self._connector.connect
        self.control = connect(replica, cpu)
        self.tp = self.control if (tp, world.device) == (replica, cpu) else connect(tp, world.device)
        self.fsdp_device_mesh: DeviceMesh | None = None
        if shape.fsdp > 1:
            group = self._connector.process_group(fsdp, world.device).group
            self.fsdp_device_mesh = DeviceMesh.from_group(group, world.device.type, mesh_dim_names=("fsdp",))

    @property
    def notes(self) -> list[str]:
        """What a person may want to know of how these ranks were connected."""
        return self._connector.notes

    @property
    def is_leader(self) -> bool:
        """Whether this rank decides for its replica."""
        return self.control.rank == 0

    @property
    def is_conductor(self) -> bool:
        """Whether this is world rank 0."""
        return self.is_leader and self.coordinates.replica == 0

    def twins(self) -> Communicator:
        """The ranks that hold the same weights, one of each replica in order, for CPU tensors; every rank makes the first call."""
        if self._twins is None:
            width = self.shape.fsdp * self.shape.tp
            first = self.coordinates.fsdp * self.shape.tp + self.coordinates.tp
            self._twins = self._connector.connect(tuple(range(first, self.shape.size, width)), torch.device("cpu"))
        return self._twins

    def close(self) -> None:
        """Free the communicators."""
        self._connector.close()
