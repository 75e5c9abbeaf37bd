"""How the ranks of a session meet: all that is cheap is checked first, and every rank hears of a mistake."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from dist_infer.config.options import Options
from dist_infer.distributed.health import RankFailure
from dist_infer.distributed.mesh import MeshShape, choose_mesh
from dist_infer.distributed.world import World
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.memory import KVPlan, free_bytes

USER_ERRORS = (ValueError, OSError)
PROGRAM = ".py", ".cpp"  # files that this program is made of

Check = Callable[[Blueprint], None]


@dataclass(frozen=True)
class Meeting:
    """What the ranks have agreed on.

    Attributes:
        world: They themselves.
        blueprint: Of what they will load.
        shape: Their mesh.
        why: A sentence about its choice.
        tolerant: Whether a damaged checkpoint is no reason to end, as the conductor says.
    """

    world: World
    blueprint: Blueprint
    shape: MeshShape
    why: str
    tolerant: bool


def meet(
    options: Options,
    make: Callable[[], Blueprint],
    check: Check | None,
    alone: bool,
    may_exit: bool,
    last_words: Callable[[RankFailure], None] | None,
    tolerant: bool,
) -> Meeting:
    """Check all that is cheap and meet the other ranks, in whichever order lets everyone hear of a mistake.

    Args:
        options: What the user set.
        make: Makes the blueprint.
        check: Further cheap checks, made on the conductor.
        alone: This process was not started by a launcher: it starts the other ranks itself.
        may_exit: The watchdog may end the process.
        last_words: Called with the failure before it does.
        tolerant: See `Meeting`.

    Raises:
        ValueError, OSError: A user's mistake; on every rank the same.
        RankFailure: A rank failed.
    """
    found: tuple[Blueprint, MeshShape, str] | None = None
    size, command = None, None
    if alone:
        found = _find(make, check, None, 1, 1, conductor=True)
        size, command = found[1].size, [sys.executable, "-m", "dist_infer", "worker", json.dumps(options.to_json())]
    code = program() if size != 1 else None  # as near as can be to what was imported: files may change while ranks start
    world = World.join(options.parallel, options.device, size, command, may_exit=may_exit)
    world.watchdog.last_words = last_words
    try:
        error: str | None = None
        try:
            found = found or _find(make, check, world.size, world.local_size, world.sharing, conductor=world.rank == 0)
        except USER_ERRORS as mistake:
            error = str(mistake)
        identity = found[0].checkpoint.identity if found is not None and found[0].checkpoint is not None else None
        checked = world.exchange("checks", [error, astuple(found[1]) if found else None, identity, tolerant, code])
    except BaseException:
        world.close(failed=True)
        raise
    wrong = next((text if rank == 0 else f"rank {rank}: {text}" for rank, (text, *_) in enumerate(checked) if text is not None), None)
    _, _, places, _, programs = zip(*checked, strict=True)
    wrong = wrong or _unlike(programs, "runs another dist_infer than rank 0 does: is it the same on all hosts?")
    wrong = wrong or _unlike(places, "finds another checkpoint than rank 0 does: is their file system the same?")
    if wrong is not None:
        world.close()
        raise ValueError(wrong)
    assert found is not None
    # Free memory, which a mesh may depend on, differs from rank to rank: rank 0's choice counts.
    return Meeting(world, found[0], MeshShape(*checked[0][1]), found[2], checked[0][3])


def plan_kv(blueprint: Blueprint, shape: MeshShape, free: int) -> KVPlan:
    """The KV cache of a rank that has `free` bytes."""
    engine, longest = blueprint.options.engine, blueprint.max_model_len
    return KVPlan.make(blueprint.config, shape.tp, shape.fsdp, blueprint.dtype, engine, longest, free)


def program() -> str:
    """A hash of this program's files: ranks that run unlike ones may wait for each other for ever."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(path for path in package.rglob("*") if path.suffix in PROGRAM and path.is_file()):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _unlike(told: Sequence[str | None], what: str) -> str | None:
    """Says `what` of the first rank that told another thing than rank 0."""
    other = next((rank for rank, text in enumerate(told) if text != told[0]), None)
    return f"rank {other} {what}" if other is not None else None


def _find(
    make: Callable[[], Blueprint], check: Check | None, world_size: int | None, ranks_per_node: int, sharing: int, conductor: bool
) -> tuple[Blueprint, MeshShape, str]:
    """Blueprint, mesh and why that mesh: all that can be known before ranks meet or weights are read."""
    blueprint = make()
    shape, why = _shape(blueprint, world_size, ranks_per_node, sharing)
    if conductor and check is not None:
        check(blueprint)
    return blueprint, shape, why


def _shape(blueprint: Blueprint, world_size: int | None, ranks_per_node: int, sharing: int) -> tuple[MeshShape, str]:
    options = blueprint.options
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    shape, why = choose_mesh(
        options.parallel,
        world_size,
        ranks_per_node,
        heads=blueprint.config.heads,
        model_bytes=blueprint.parameters * blueprint.dtype.itemsize,
        free_bytes_per_rank=free_bytes(device, sharing),
        accelerators=torch.cuda.device_count() if on_gpu else 0,
    )
    plan_kv(blueprint, shape, free_bytes(device, 1))  # too little memory is said before a weight is read
    return shape, why
