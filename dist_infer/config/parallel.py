"""The mesh: how many ranks, and what each direction of them does."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class ParallelOptions:
    """world = replicas x fsdp x tp, tp innermost."""

    tp: int | None = option(None, "ranks that cut heads, ffn and vocabulary between them", low=1)
    fsdp: int | None = option(None, "ranks that cut each block's parameters again and run their own part of the batch", low=1)
    replicas: int | None = option(None, "complete copies of the model; they share the requests", low=1)
    timeout_s: float = option(600.0, "how long a collective may wait, in seconds", above=0)
    heartbeat_s: float = option(10.0, "a rank stopped, or silent on another host, for longer is taken for dead, in seconds", above=0)
    collectives: str = option(
        "auto",
        "how ranks sum; auto: shared memory between CPU ranks of one host, else the fastest as measured (a name makes rounding repeatable)",
        choices=("auto", "shared_memory", "process_group", "hierarchical", "symmetric_memory"),
    )
