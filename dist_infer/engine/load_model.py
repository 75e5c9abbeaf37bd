"""The sharded module alone, for loops of one's own."""

from __future__ import annotations

import weakref
from contextlib import ExitStack

from torch.distributed.device_mesh import DeviceMesh

from dist_infer.checkpoint.shard import ModelShard
from dist_infer.config.options import read_options
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.world import World
from dist_infer.engine.blueprint import Blueprint
from dist_infer.model.decoder import Decoder
from dist_infer.model.fallback.decoder import FallbackDecoder

AXES = ("replica", "fsdp", "tp")


def load_model(path: str, mesh: DeviceMesh | None = None, overrides: list[str] | None = None) -> Decoder | FallbackDecoder:
    """Load this rank's shard of the checkpoint at `path`; every rank of `mesh` calls it.

    The module is called with a `Batch` (see `dist_infer.model.batch`), a cache from its `new_cache`, and a
    function that receives the logits of this rank's vocabulary slice. As long as it lives, or the process, ranks that fail are noticed;
    when it is let go of this rank leaves in order.

    Args:
        path: Checkpoint directory, or a Hugging Face id in the local cache.
        mesh: Axes named replica, fsdp and tp, in this order (any may be left out), over all ranks; None for one rank.
        overrides: Further options, such as `["model.dtype=float32"]`.

    Raises:
        ValueError, OSError: The mesh or the checkpoint is not as it should be.
    """
    options = read_options([*(overrides or []), f"model.path={path}"])
    blueprint = Blueprint.of(options)
    assert blueprint.checkpoint is not None
    shape = _shape(mesh)
    world = World.join(options.parallel, options.device, shape.size, may_exit=False)
    with ExitStack() as member:
        member.enter_context(world)
        shard = ModelShard(blueprint.config, Mesh(world, shape, options.parallel), blueprint.dtype, world.device)
        shard.load(blueprint.checkpoint, options.loader)
        weakref.finalize(shard.decoder, member.pop_all().close)
    return shard.decoder


def _shape(mesh: DeviceMesh | None) -> MeshShape:
    if mesh is None:
        return MeshShape(1, 1, 1)
    names = mesh.mesh_dim_names or ()
    if not names or list(names) != [axis for axis in AXES if axis in names]:
        raise ValueError(f"mesh axes {names}: they must be named, from {', '.join(AXES)}, in this order")
    sizes = dict(zip(names, mesh.mesh.shape, strict=True))
    shape = MeshShape(*(int(sizes.get(axis, 1)) for axis in AXES))
    if mesh.mesh.flatten().tolist() != list(range(shape.size)):
        raise ValueError(f"mesh {mesh.mesh.tolist()}: its ranks must be in order, from 0 to {shape.size - 1}")
    return shape
