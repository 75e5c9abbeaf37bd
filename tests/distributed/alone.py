"""A program that nobody launched: it becomes rank 0 and starts itself twice more. `sum` ends, `loop` goes on until a rank is killed."""

from __future__ import annotations

import json
import os
import sys

import torch

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.health import RankFailure
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.world import World


def main(mode: str) -> None:
    """Join, say who is there, and add ones."""
    size = None if "RANK" in os.environ else 3
    if mode == "broken" and size is None:
        sys.exit(3)
    world = World.join(ParallelOptions(timeout_s=60), "cpu", size, [sys.executable, __file__, mode])
    try:
        mesh = Mesh(world, MeshShape(1, 1, 3), ParallelOptions())
        total = mesh.tp.all_reduce(torch.ones(1)).item()
        if world.rank == 0:
            print(json.dumps({"total": total, "pids": [host.pid for host in world.hosts]}), flush=True)
        while mode == "loop":
            mesh.tp.all_reduce(torch.ones(1))
        if mode == "raise" and world.rank == 2:
            raise ValueError("rank two has had enough")
        mesh.tp.barrier()
        mesh.close()
    except Exception as error:
        first = world.watchdog.explain(error)
        world.close(failed=True)
        if world.rank == 0:
            print(f"{'failed' if isinstance(first, RankFailure) else 'own error'}: {first}", file=sys.stderr)
        sys.exit(1)
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
