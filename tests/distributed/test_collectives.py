"""Communicators against sums done by hand, on ranks that hold different values."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.collectives import CollectiveTimeout, Communicator, ProcessGroup, SingleRank
from dist_infer.distributed.connect import Connector
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.shared_memory import SLOT, SharedMemory
from dist_infer.distributed.world import World
from tests.ranks import Ranks

KINDS = {"shared_memory": SharedMemory, "process_group": ProcessGroup}
SHAPES = [(1,), (7,), (3, 5), (0, 4), (1000,), (33, 129)]


def value(rank: int, call: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `rank` brings to a call: anyone can compute anyone's."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


def tp_mesh(world: World, collectives: str) -> Mesh:
    return Mesh(world, MeshShape(1, 1, world.size), ParallelOptions(collectives=collectives))


def check_sums(collectives: str, dtype: torch.dtype) -> list[bytes]:
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, collectives)
        assert type(mesh.tp) is (SingleRank if world.size == 1 else KINDS[collectives])
        bits = []
        large = [(SLOT // 4 + 1,), (3 * SLOT // 8, 3)]
        for call, shape in enumerate(SHAPES + large + SHAPES):
            tensor = value(world.rank, call, shape, dtype)
            mesh.tp.all_reduce(tensor)
            exact = torch.stack([value(rank, call, shape, dtype).double() for rank in range(world.size)]).sum(0)
            rounding = {torch.bfloat16: 2**-8, torch.float32: 2**-22, torch.int64: 0.0}[dtype]
            assert ((tensor.double() - exact).abs() <= rounding * (exact.abs() + 1e-3 * world.size) + (dtype == torch.float32) * 1e-6).all()
            bits.append(tensor.view(torch.uint8).numpy().tobytes())
        mesh.close()
    return bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("collectives", list(KINDS))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sum_is_right_and_the_same_everywhere(ranks: Ranks, size: int, collectives: str, dtype: torch.dtype) -> None:
    bits = ranks(size).run(check_sums, collectives, dtype)
    assert all(other == bits[0] for other in bits)


def check_order() -> None:
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, "shared_memory")
        tensor = value(world.rank, 0, (257,), torch.float32)
        expected = value(0, 0, (257,), torch.float32)
        for rank in range(1, world.size):
            expected = expected + value(rank, 0, (257,), torch.float32)
        assert torch.equal(mesh.tp.all_reduce(tensor), expected)
        mesh.close()


def test_shared_memory_sums_in_rank_order(ranks: Ranks) -> None:
    ranks(4).run(check_order)


def check_many_calls(collectives: str, calls: int) -> None:
    """A random, but everywhere the same, sequence of operations; each rank comes to them at its own pace."""
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, collectives)
        choices = torch.Generator().manual_seed(5)
        for call in range(calls):
            kind, root, length = (int(torch.randint(high, (), generator=choices)) for high in (4, world.size, 300))
            check_one(mesh.tp, kind, root, call, length)
            if call % 97 == 13 * world.rank:
                sum(range(20000))
        mesh.close()


def check_one(communicator: Communicator, kind: int, root: int, call: int, length: int) -> None:
    brought = [torch.full((length,), 100.0 * rank + call) for rank in range(communicator.size)]
    tensor = brought[communicator.rank].clone()
    if kind == 0:
        assert torch.equal(communicator.all_reduce(tensor), torch.stack(brought).sum(0))
    elif kind == 1:
        assert torch.equal(communicator.broadcast(tensor, root), brought[root])
    elif kind == 2:
        gathered = communicator.gather(tensor, root)
        assert (gathered is not None) == (communicator.rank == root)
        assert gathered is None or all(torch.equal(got, wanted) for got, wanted in zip(gathered, brought, strict=True))
    else:
        communicator.barrier()


@pytest.mark.parametrize(("collectives", "calls"), [("shared_memory", 1000), ("process_group", 100)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_many_calls_of_all_kinds(ranks: Ranks, size: int, collectives: str, calls: int) -> None:
    ranks(size).run(check_many_calls, collectives, calls)


def check_large_broadcast_and_gather() -> None:
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, "shared_memory")
        tensor = value(world.rank, 0, (SLOT // 2, 3), torch.float32)
        gathered = mesh.tp.gather(tensor, 1)
        assert (gathered is None) == (world.rank != 1)
        for rank, got in enumerate(gathered or []):
            assert torch.equal(got, value(rank, 0, (SLOT // 2, 3), torch.float32))
        assert torch.equal(mesh.tp.broadcast(tensor, 1), value(1, 0, (SLOT // 2, 3), torch.float32))
        mesh.close()


def test_tensors_larger_than_a_slot(ranks: Ranks) -> None:
    ranks(2).run(check_large_broadcast_and_gather)


def check_submeshes() -> tuple[float, float, int]:
    """tp=2 x fsdp=2: each communicator reaches its own ranks only."""
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = Mesh(world, MeshShape(1, 2, 2), ParallelOptions())
        assert mesh.fsdp_device_mesh is not None
        of_tp = mesh.tp.all_reduce(torch.tensor(10.0**world.rank)).item()
        of_all = mesh.control.all_reduce(torch.tensor(10.0**world.rank)).item()
        assert mesh.is_leader == mesh.is_conductor == (world.rank == 0)
        size = mesh.fsdp_device_mesh.size()
        mesh.close()
        return of_tp, of_all, size


def test_axes_reach_their_own_ranks(ranks: Ranks) -> None:
    got = ranks(4).run(check_submeshes)
    assert got == [(11.0, 1111.0, 2), (11.0, 1111.0, 2), (1100.0, 1111.0, 2), (1100.0, 1111.0, 2)]


def check_replicas() -> tuple[bool, bool, float]:
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = Mesh(world, MeshShape(2, 1, 2), ParallelOptions())
        total = mesh.control.all_reduce(torch.tensor(10.0**world.rank)).item()
        mesh.close()
        return mesh.is_leader, mesh.is_conductor, total


def test_replicas_have_a_leader_each(ranks: Ranks) -> None:
    assert ranks(4).run(check_replicas) == [(True, True, 11.0), (False, False, 11.0), (True, False, 1100.0), (False, False, 1100.0)]


def check_segment_goes() -> None:
    def mapped() -> bool:
        return "memfd:dist_infer" in Path("/proc/self/maps").read_text()

    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, "shared_memory")
        mesh.tp.all_reduce(torch.ones(3))
        assert mapped()
        mesh.close()
        gc.collect()
        assert not mapped()


def test_closing_gives_the_memory_back(ranks: Ranks) -> None:
    ranks(2).run(check_segment_goes)


def check_late_rank() -> str:
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = Mesh(world, MeshShape(1, 1, 3), ParallelOptions(timeout_s=0.3, collectives="shared_memory"))
        message = ""
        if world.rank != 2:
            with pytest.raises(CollectiveTimeout) as caught:
                mesh.tp.barrier()
            message = str(caught.value)
        world.exchange("done", None)
        mesh.close()
        return message


def test_late_rank_is_named(ranks: Ranks) -> None:
    messages = ranks(3).run(check_late_rank)
    assert all("rank 2 did not come" in message for message in messages[:2])


def check_abort() -> float:
    """A watchdog's failure ends a wait at once."""
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, "shared_memory")
        if world.rank == 1:
            world.watchdog.report(ValueError("bad luck"))
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"rank 1 \(host .*, pid \d+\) failed: ValueError: bad luck"):
            mesh.tp.all_reduce(torch.zeros(3)) if world.rank == 0 else world.watchdog.check()
        waited = time.monotonic() - started
        world.close(failed=True)
        return waited


def test_waiting_rank_raises_the_other_ranks_error(ranks: Ranks) -> None:
    assert len(ranks(2).run(check_abort)) == 2


class Device:
    """Stands for an event of a GPU, which is come to when it has been asked for `asked` times."""

    def __init__(self, asked: float) -> None:
        self.left = asked

    def query(self) -> bool:
        """Whether it is."""
        self.left -= 1
        return self.left < 0


def check_waiting_for_a_device(collectives: str) -> None:
    with World.join(ParallelOptions(), "cpu") as world:
        mesh = tp_mesh(world, collectives)
        mesh.control.timeout_s = 0.3
        mesh.control.wait_for(Device(3))  # type: ignore[arg-type]
        assert not mesh.control.waiting
        with pytest.raises(CollectiveTimeout, match=r"the GPU has waited for other ranks for longer than parallel.timeout_s=0.3 s"):
            mesh.control.wait_for(Device(float("inf")))  # type: ignore[arg-type]
        assert mesh.control.waiting  # so that a roll call finds this rank at its place
        mesh.control.abort(RuntimeError("bad luck"))
        with pytest.raises(RuntimeError, match="bad luck"):
            mesh.control.wait_for(Device(float("inf")))  # type: ignore[arg-type]
        world.exchange("done", None)


@pytest.mark.parametrize("collectives", list(KINDS))
def test_a_device_that_waits_for_other_ranks_is_not_waited_for_for_ever(ranks: Ranks, collectives: str) -> None:
    ranks(2).run(check_waiting_for_a_device, collectives)


def check_unequal_groups() -> float:
    """Ranks 0 and 1 are in a group that rank 2 knows nothing of; then all are in one."""
    with World.join(ParallelOptions(timeout_s=20.0), "cpu") as world:
        if world.rank < 2:
            Connector(world, ParallelOptions(timeout_s=20.0)).process_group((0, 1), torch.device("cpu"))
        connector = Connector(world, ParallelOptions(timeout_s=20.0))
        total = connector.process_group((0, 1, 2), torch.device("cpu")).all_reduce(torch.ones(1))
        connector.close()
    return float(total)


def test_ranks_of_unequally_many_groups_meet_in_another(ranks: Ranks) -> None:
    assert ranks(3).run(check_unequal_groups) == [3.0] * 3
