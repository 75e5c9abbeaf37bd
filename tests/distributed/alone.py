"""A program that nobody launched: it becomes rank 0 and starts itself twice more.

`alone.py MODE [heartbeat_s [timeout_s]]`: `sum` ends, `loop` goes on until something happens to a rank, in the other modes rank 2
does what they say.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.health import RankFailure
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.world import World


def main(mode: str, heartbeat_s: float = 10.0, timeout_s: float = 60.0) -> None:
    """Join, say who is there, and add ones."""
    size = None if "RANK" in os.environ else 3
    if mode == "broken" and size is None:
        sys.exit(3)
    collectives = "process_group" if mode == "hang_gloo" else "auto"
    parallel = ParallelOptions(timeout_s=timeout_s, heartbeat_s=heartbeat_s, collectives=collectives)
    world = World.join(parallel, "cpu", size, [sys.executable, __file__, *sys.argv[1:]])
    try:
        mesh = Mesh(world, MeshShape(1, 1, world.size), parallel)
        total = mesh.tp.all_reduce(torch.ones(1)).item()
        if world.rank == 0:
            print(json.dumps({"total": total, "pids": [host.pid for host in world.hosts]}), flush=True)
        if world.rank == 2:
            misbehave(mode)
        while mode != "sum":
            mesh.tp.all_reduce(torch.ones(1))
        mesh.tp.barrier()
        mesh.close()
    except Exception as error:
        first = world.watchdog.explain(error)
        world.close(failed=True)
        if world.rank == 0:
            print(f"{'failed' if isinstance(first, RankFailure) else 'own error'}: {first}", file=sys.stderr)
        sys.exit(1)
    world.close()


def misbehave(mode: str) -> None:
    """What rank 2 does."""
    if mode == "raise":
        raise ValueError("rank two has had enough")
    if mode == "python_memory":
        bytearray(1 << 60)
    if mode == "tensor_memory":
        torch.empty(1 << 58, dtype=torch.uint8)
    while mode.startswith("hang"):
        pass


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
