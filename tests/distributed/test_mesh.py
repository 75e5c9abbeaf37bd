"""The mesh that is chosen, as a table."""

from __future__ import annotations

import pytest

from dist_infer.config.parallel import ParallelOptions
from dist_infer.distributed.mesh import Coordinates, MeshShape, choose_mesh

GIB = 2**30


@pytest.mark.parametrize(
    ("given", "world", "per_node", "heads", "sizes", "accelerators", "expected"),
    [
        # nothing given, alone
        ((None, None, None), None, 1, 32, None, 0, (1, 1, 1)),
        ((None, None, None), None, 1, 32, None, 8, (1, 1, 8)),
        # alone, the world is what is given
        ((None, None, 2), None, 1, 32, None, 8, (1, 1, 2)),
        ((2, 3, None), None, 1, 32, None, 0, (2, 3, 1)),
        # nothing given, launched: tp over the node, replicas if the model fits
        ((None, None, None), 16, 8, 32, (8 * GIB, 4 * GIB), 8, (2, 1, 8)),
        ((None, None, None), 16, 8, 32, (800 * GIB, 70 * GIB), 8, (1, 2, 8)),
        ((None, None, None), 16, 8, None, None, 8, (2, 1, 8)),
        # the largest divisor of the node's ranks that is at most the heads
        ((None, None, None), 6, 6, 4, (GIB, GIB), 0, (2, 1, 3)),
        ((None, None, None), 4, 4, 9, None, 0, (1, 1, 4)),
        # some given
        ((None, None, 2), 8, 8, 32, (GIB, GIB), 0, (4, 1, 2)),
        ((None, None, 2), 8, 8, 32, (9 * GIB, GIB), 0, (1, 4, 2)),
        ((None, 2, None), 8, 4, 32, None, 0, (1, 2, 4)),
        ((None, 2, None), 8, 4, 2, None, 0, (2, 2, 2)),
        ((2, None, None), 8, 8, 2, None, 0, (2, 2, 2)),
        ((2, 2, None), 8, 8, 32, None, 0, (2, 2, 2)),
        ((1, 2, 2), 4, 4, 32, None, 0, (1, 2, 2)),
    ],
)
def test_choices(
    given: tuple[int | None, int | None, int | None],
    world: int | None,
    per_node: int,
    heads: int | None,
    sizes: tuple[int, int] | None,
    accelerators: int,
    expected: tuple[int, int, int],
) -> None:
    replicas, fsdp, tp = given
    model, free = sizes or (None, None)
    shape, sentence = choose_mesh(ParallelOptions(tp=tp, fsdp=fsdp, replicas=replicas), world, per_node, heads, model, free, accelerators)
    assert shape == MeshShape(*expected)
    assert str(shape) in sentence


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (ParallelOptions(replicas=1, fsdp=2, tp=2), 3, "parallel: replicas=1 x fsdp=2 x tp=2 = 4 ranks, but the world has 3; start 4"),
        (ParallelOptions(replicas=1, fsdp=1, tp=2), 4, "parallel: replicas=1 x fsdp=1 x tp=2 = 2 ranks, but the world has 4"),
        (ParallelOptions(tp=3), 4, "parallel: tp=3 = 3 ranks, but the world has 4"),
        (ParallelOptions(tp=8), None, "parallel.tp=8: the model has 4 query heads"),
        (ParallelOptions(fsdp=1, replicas=1), 8, "parallel.tp=8: the model has 4 query heads"),
    ],
)
def test_refusals(parallel: ParallelOptions, world: int | None, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_mesh(parallel, world, world or 1, heads=4)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_coordinates_are_unique_and_tp_is_innermost() -> None:
    shape = MeshShape(2, 3, 4)
    places = [shape.coordinates(rank) for rank in range(shape.size)]
    assert len(set(places)) == 24
    assert places[:5] == [Coordinates(0, 0, 0), Coordinates(0, 0, 1), Coordinates(0, 0, 2), Coordinates(0, 0, 3), Coordinates(0, 1, 0)]
    assert all((place.replica * 3 + place.fsdp) * 4 + place.tp == rank for rank, place in enumerate(places))
