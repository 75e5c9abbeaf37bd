"""Collectives between hosts, simulated: ranks are told that some of the others run elsewhere."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.choice import SIZES, BySize, fastest
from dist_infer.distributed.collectives import CollectiveTimeout, SingleRank
from dist_infer.distributed.hierarchical import SLICED, Hierarchical
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.shared_memory import SLOT
from dist_infer.distributed.world import World
from tests.distributed.test_collectives import check_one, value
from tests.ranks import Ranks

LAYOUTS = ["aabb", "abbb", "abab"]  # the host of each rank


@contextmanager
def several_hosts(layout: str, **parallel: str | float) -> Iterator[tuple[World, Mesh]]:
    """A tp mesh over ranks that believe they are on the hosts of `layout`."""
    with World.join(ParallelOptions(), "cpu") as world:
        world.hosts = tuple(dataclasses.replace(host, boot_id=name) for host, name in zip(world.hosts, layout, strict=True))
        mesh = Mesh(world, MeshShape(1, 1, world.size), ParallelOptions(**parallel))  # type: ignore[arg-type]
        yield world, mesh
        mesh.close()


def check_sums(layout: str) -> list[bytes]:
    bits = []
    with several_hosts(layout, collectives="hierarchical") as (world, mesh):
        assert isinstance(mesh.tp, Hierarchical)
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            for call, bytes_ in enumerate((8, SLICED - 8, SLICED, SLICED + 24, SLOT + 8, 3 * SLOT)):
                shape = (bytes_ // 8, 8 // dtype.itemsize)
                tensor = mesh.tp.all_reduce(value(world.rank, call, shape, dtype))
                exact = torch.stack([value(rank, call, shape, dtype).double() for rank in range(world.size)])
                rounding = {torch.bfloat16: 2 * 2**-8, torch.float32: 2**-22, torch.int64: 0.0}[dtype]
                assert ((tensor.double() - exact.sum(0)).abs() <= rounding * exact.abs().sum(0)).all()
                bits.append(tensor.view(torch.uint8).numpy().tobytes())
        assert torch.equal(mesh.tp.all_reduce(torch.zeros(0, 4)), torch.zeros(0, 4))
    return bits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sum_is_right_and_the_same_everywhere(ranks: Ranks, layout: str) -> None:
    bits = ranks(len(layout)).run(check_sums, layout)
    assert all(other == bits[0] for other in bits)


def check_every_kind(layout: str) -> None:
    with several_hosts(layout, collectives="hierarchical") as (world, mesh):
        for call in range(12 * world.size):
            check_one(mesh.tp, call % 4, call // 4 % world.size, call, 1 + 7 * call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_from_every_rank(ranks: Ranks, layout: str) -> None:
    ranks(len(layout)).run(check_every_kind, layout)


def check_late_rank() -> str:
    message = ""
    with several_hosts("aabb", collectives="hierarchical", timeout_s=0.5) as (world, mesh):
        if world.rank != 3:
            with pytest.raises(CollectiveTimeout) as caught:
                mesh.tp.all_reduce(torch.ones(3))
            message = str(caught.value)
        world.exchange("done", None)
    return message


def test_late_rank_is_named_on_its_host(ranks: Ranks) -> None:
    messages = ranks(4).run(check_late_rank)
    assert "rank 3 did not come" in messages[2]
    assert "parallel.timeout_s" in messages[0]


def check_abort() -> None:
    """Rank 3 fails; rank 2 waits for it, and rank 1 for rank 0, in shared memory."""
    with several_hosts("aabb", collectives="hierarchical") as (world, mesh):
        if world.rank == 3:
            world.watchdog.report(ValueError("bad luck"))
            return
        with pytest.raises(RuntimeError) as caught:
            if world.rank:
                mesh.tp.all_reduce(torch.zeros(3))
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                world.watchdog.check()
        assert "failed: ValueError: bad luck" in str(caught.value)


def test_waiting_rank_raises_the_other_ranks_error(ranks: Ranks) -> None:
    ranks(4).run(check_abort)


def check_auto(layout: str) -> tuple[list[str], list[str]]:
    with several_hosts(layout) as (world, mesh):
        for call in range(8):
            check_one(mesh.tp, call % 4, call % world.size, call, SLICED)
        parts = mesh.tp._communicators if isinstance(mesh.tp, BySize) else [mesh.tp]
        return mesh.notes, [type(part).__name__ for part in parts]


def test_what_works_between_hosts_is_measured_and_all_ranks_choose_alike(ranks: Ranks) -> None:
    found = ranks(4).run(check_auto, "aabb")
    assert all(other == found[0] for other in found)
    (note,), parts = found[0]
    assert note.startswith("collectives of ranks 0, 1, 2, 3 on cpu: ") and "process_group" in note and "hierarchical" in note
    assert set(parts) <= {"Hierarchical", "ProcessGroup"}


def check_alone_on_every_host() -> str:
    with several_hosts("ab") as (_, mesh):
        mesh.tp.barrier()  # a rank that leaves at once would close the connection that the other one is still opening
        return type(mesh.tp).__name__


def test_hosts_of_one_rank_use_a_process_group(ranks: Ranks) -> None:
    assert ranks(2).run(check_alone_on_every_host) == ["ProcessGroup"] * 2


def check_refusal() -> list[str]:
    messages = []
    with World.join(ParallelOptions(), "cpu") as world:
        other = [dataclasses.replace(host, boot_id=name, machine="arm64") for host, name in zip(world.hosts, "abb", strict=True)]
        for kind, hosts in (("hierarchical", other), ("symmetric_memory", world.hosts), ("shared_memory", other)):
            world.hosts = tuple(hosts)
            with pytest.raises(ValueError) as caught:
                Mesh(world, MeshShape(1, 1, 3), ParallelOptions(collectives=kind))
            messages.append(str(caught.value))
    return messages


def test_what_does_not_work_is_refused_by_all_ranks_in_one_line(ranks: Ranks) -> None:
    found = ranks(3).run(check_refusal)
    assert all(other == found[0] for other in found)
    reasons = {"hierarchical": "arm64 may reorder", "symmetric_memory": "the ranks compute on CPU", "shared_memory": "arm64 may reorder"}
    for message, (kind, reason) in zip(found[0], reasons.items(), strict=True):
        assert message.startswith(f"parallel.collectives={kind}: {reason}") and message.endswith("; use auto or process_group")


def test_the_slowest_rank_decides_size_by_size() -> None:
    figures = {"process_group": [[9e-4, 1e-3, 5e-3], [1e-5, 1e-3, 5e-3]], "hierarchical": [[1e-4, 1e-4, 6e-3], [8e-4, 2e-4, 4e-3]]}
    best, sentence = fastest(figures)
    assert best == ["hierarchical", "hierarchical", "process_group"]
    assert sentence.startswith("hierarchical for 4 KiB, hierarchical for 128 KiB, process_group for 4096 KiB (measured in us ")
    assert "process_group 900, 1,000, 5,000; hierarchical 800, 200, 6,000" in sentence
    assert fastest({"hierarchical": figures["hierarchical"]})[1].startswith("hierarchical (measured")


class Labelled(SingleRank):
    """Adds its label instead of anything else."""

    def __init__(self, label: float) -> None:
        self.label = label

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add the label."""
        return tensor.add_(self.label)


def test_a_tensor_goes_with_the_size_it_is_nearest_to() -> None:
    small, middle, large = SIZES
    chosen = BySize([Labelled(1), Labelled(2), Labelled(3)])
    cases = [(4, 1), (small, 1), (4 * small, 1), (middle // 4, 2), (middle, 2), (4 * middle, 2), (large // 4, 3), (4 * large, 3)]
    for bytes_, label in cases:
        assert chosen.all_reduce(torch.zeros(bytes_ // 4))[0] == label, bytes_
