"""What the machines of a plan can do, as numbers a forecast divides by."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dist_infer.config.cluster import ClusterOptions
from dist_infer.config.options import read_options
from dist_infer.engine.memory import GIB

NEEDED = ("gpus_per_node", "memory_gib", "memory_gb_s", "tflops", "storage_gb_s")
CONTROL_S = 20e-6  # of a message of a few KB through shared memory
AMONG_GPUS, AMONG_NODES = ("intra_gb_s", "intra_us"), ("inter_gb_s", "inter_us")


@dataclass(frozen=True)
class Rates:
    """How fast one kind of work goes on a device.

    Attributes:
        bandwidth: Bytes/s.
        flops: Floating-point operations/s.
    """

    bandwidth: float
    flops: float

    def seconds(self, size: float, operations: float) -> float:
        """The roofline (Williams et al., 2009) with its corner rounded: memory and arithmetic of like length hide each other in part."""
        return math.hypot(size / self.bandwidth, operations / self.flops)


@dataclass(frozen=True)
class Link:
    """What ranks are joined by.

    Attributes:
        bandwidth: Bytes/s of each rank, one way.
        latency: Seconds of the smallest collective.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan. On GPUs a rank has one; cores of a CPU are shared out between its ranks.

    Attributes:
        name: For the user.
        kind: "cuda" or "cpu".
        nodes: Machines.
        devices: GPUs of a machine, or cores.
        memory: Bytes of a device that may be taken.
        products: Of projections, with weights as a replica that is not cut over fsdp has them (packed, on a CPU).
        gathered_products: Of projections whose weights were just gathered.
        attention: Of attention over the paged cache.
        intra: All-reduce inside a machine.
        gather: All-gather of weights inside a machine.
        inter: Between machines.
        control: Seconds of one message from or to the leader inside a machine.
        storage: Bytes/s a machine reads of a checkpoint, into memory that is at hand.
        cut_storage: The same where ranks read a part each, whose tensors are smaller.
        fresh: Bytes/s of memory that is not at hand but comes from a hypervisor; infinite where that costs nothing.
        packing: Bytes/s at which a machine reorders weights; infinite where it does not.
        layer_s: Least time of a layer.
        step_s: What a step takes beside the layers, on the host.
        overlaps: Whether weights are gathered while the block before computes.
    """

    name: str
    kind: str
    nodes: int
    devices: int
    memory: int
    products: Rates
    gathered_products: Rates
    attention: Rates
    intra: Link
    gather: Link
    inter: Link
    control: float
    storage: float
    cut_storage: float
    fresh: float = math.inf
    packing: float = math.inf
    layer_s: float = 0.0
    step_s: float = 0.0
    overlaps: bool = True

    @property
    def worlds(self) -> list[int]:
        """How many ranks it may run: one a GPU; on a CPU any number that shares out the cores."""
        if self.kind == "cuda":
            return [self.nodes * self.devices]
        return [self.nodes * ranks for ranks in range(1, self.devices + 1) if self.devices % ranks == 0]

    @classmethod
    def described(cls, options: ClusterOptions) -> Cluster:
        """The cluster of the figures given, over those of the machine named.

        Raises:
            ValueError: A figure that is needed is not given.
            FileNotFoundError: There is no such machine.
        """
        name = "the cluster given"
        values = {item.name: getattr(options, item.name) for item in fields(options)}
        if options.machine is not None:
            base = read_options((), options.machine).cluster
            values = {key: getattr(base, key) if value is None else value for key, value in values.items()}
            name = options.machine
        given = ClusterOptions(**values)
        nodes, gpus = given.nodes or 1, given.gpus_per_node or 1
        needed = [*NEEDED, *(AMONG_GPUS if gpus > 1 else ()), *(AMONG_NODES if nodes > 1 else ())]
        missing = [f"cluster.{key}" for key in needed if values[key] is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: not given, and a plan needs such figures; name a machine, such as "
                "cluster.machine=configs/clusters/h100x8.yaml"
            )
        attained = given.attained or 1.0
        rates = Rates(attained * 1e9 * (given.memory_gb_s or 0), attained * 1e12 * (given.tflops or 0))
        intra = Link(1e9 * (given.intra_gb_s or math.inf), 1e-6 * (given.intra_us or 0))
        inter = Link(1e9 * (given.inter_gb_s or math.inf), 1e-6 * (given.inter_us or 0))
        return cls(
            name=name,
            kind="cuda",
            nodes=nodes,
            devices=gpus,
            memory=int(((given.memory_gib or 0) - (given.reserved_gib or 0)) * GIB),
            products=rates,
            gathered_products=rates,
            attention=rates,
            intra=intra,
            gather=intra,
            inter=inter,
            control=CONTROL_S,
            storage=1e9 * (given.storage_gb_s or 0),
            cut_storage=1e9 * (given.storage_gb_s or 0),
            layer_s=1e-6 * (given.layer_us or 0),
            step_s=1e-6 * (given.step_us or 0),
        )
