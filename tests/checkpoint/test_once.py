"""With loader.read=once a byte that several ranks hold is read by one of them, all get it, and no rank waits for one that failed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_infer.checkpoint import open_checkpoint, reader
from dist_infer.checkpoint.shard import ModelShard
from dist_infer.config.loader import LoaderOptions
from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.world import World
from dist_infer.model.weights import describe, fsdp_rows
from tests.checkpoint.test_load import FIXTURES, cut_out, nine_heads, random_tensors, reference, save
from tests.ranks import Ranks

MESHES = [(2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 1), (3, 1, 1)]
CHECKPOINT = FIXTURES / "torchtitan_llama3" / "outputs/checkpoint/step-3"  # with rotary pairs to be put in order


def load_on_rank(path: str, axes: tuple[int, int, int], read: str, collectives: str, staging: int) -> dict[str, object]:
    """This rank's weights and the bytes it asked of files."""
    usual, reader.STAGING = reader.STAGING, staging
    parallel = ParallelOptions(collectives=collectives)
    checkpoint = open_checkpoint(path)
    with World.join(parallel, "cpu", math.prod(axes), may_exit=False) as world:
        mesh = Mesh(world, MeshShape(*axes), parallel)
        shard = ModelShard(checkpoint.config(), mesh, torch.float32, world.device)
        told: list[int] = []
        report = shard.load(checkpoint, LoaderOptions(read=read, threads=2), told.append)
        held = {name: tensor.numpy().copy() for name, tensor in shard.destinations().items()}
        mesh.close()
    reader.STAGING = usual
    return {"weights": held, "read": report.bytes_requested, "held": report.bytes_held, "told": sum(told)}


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize(("collectives", "staging"), [("auto", 640), ("process_group", 8 << 20)])
def test_every_rank_gets_its_weights(ranks: Ranks, axes: tuple[int, int, int], collectives: str, staging: int) -> None:
    checkpoint = open_checkpoint(str(CHECKPOINT))
    config = checkpoint.config()
    tensors = reference("torchtitan_llama3", config)
    shape = MeshShape(*axes)
    for rank, found in enumerate(ranks(shape.size).run(load_on_rank, str(CHECKPOINT), axes, "once", collectives, staging)):
        at = shape.coordinates(rank)
        expected = cut_out(config, tensors, shape.tp, at.tp, shape.fsdp, at.fsdp)
        assert expected.keys() == found["weights"].keys()
        for parameter, value in expected.items():
            assert torch.equal(torch.from_numpy(found["weights"][parameter]), value.float()), parameter
        assert found["told"] >= found["held"]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_each_byte_is_read_once(ranks: Ranks, axes: tuple[int, int, int], tmp_path: Path) -> None:
    config = nine_heads(hidden_size=64, heads=8, kv_heads=2)
    checkpoint = save("safetensors", random_tensors(config, torch.float32), tmp_path / "c")  # safetensors have no headers to look into
    own = tmp_path / "c" / "config.yaml"
    own.write_text(json.dumps({name: value for name, value in vars(config).items() if value is not None}))
    shape = MeshShape(*axes)
    found = ranks(shape.size).run(load_on_rank, str(checkpoint.path), axes, "once", "auto", 2048)
    wanted = 0
    for coordinate in range(shape.fsdp):
        parts = set()
        for tp in range(shape.tp):
            for weight in describe(config, shape.tp, tp):
                first, stop = fsdp_rows(weight.shape[0], shape.fsdp, coordinate)
                parts.add((weight, 4 * (stop - first) * math.prod(weight.shape[1:])))
        wanted += sum(size for _, size in parts)
    assert sum(rank["read"] for rank in found) == wanted
    if shape.replicas > 1:
        assert max(rank["read"] for rank in found) <= 1.2 * wanted / shape.size, "ranks take turns"
    each = ranks(shape.size).run(load_on_rank, str(checkpoint.path), axes, "each", "auto", 2048)
    assert all(rank["read"] == rank["held"] for rank in each)
    assert sum(rank["read"] for rank in each) > wanted or (shape.replicas, shape.tp) == (1, 1)


def fail_on_rank(path: str, axes: tuple[int, int, int]) -> str:
    """What this rank hears when the file ends early for the rank that reads the middle of it."""
    parallel = ParallelOptions(timeout_s=30)
    checkpoint = open_checkpoint(path)
    whole, usual = reader._fill, reader.STAGING

    def short(fd: int, buffer: memoryview, offset: int, chunk: object) -> None:
        if dist.get_rank() == 1:
            raise ValueError("model.safetensors: ends at byte 1,000, in the middle of a weight; it changed while it was read")
        whole(fd, buffer, offset, chunk)  # type: ignore[arg-type]

    reader._fill, reader.STAGING = short, 16 << 10  # every rank reads something
    world = World.join(parallel, "cpu", math.prod(axes), may_exit=False)
    try:
        mesh = Mesh(world, MeshShape(*axes), parallel)
        shard = ModelShard(checkpoint.config(), mesh, torch.float32, world.device)
        try:
            shard.load(checkpoint, LoaderOptions(read="once"))
        except ValueError as error:
            return str(error)
        return "nothing"
    finally:
        reader._fill, reader.STAGING = whole, usual
        world.close(failed=True)


def test_an_error_of_the_reader_reaches_all(ranks: Ranks) -> None:
    heard = ranks(3).run(fail_on_rank, str(CHECKPOINT), (3, 1, 1))
    assert heard == ["model.safetensors: ends at byte 1,000, in the middle of a weight; it changed while it was read"] * 3
