"""The read plan, on paper: every element as often as its placement says, at any size, in seconds."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from dist_infer.checkpoint.dialects import find_dialect
from dist_infer.checkpoint.plan import Read, plan
from dist_infer.checkpoint.sources.source import Chunk, TensorEntry, tensor_entry
from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored
from dist_infer.model.weights import Weight, cut, describe, fsdp_rows


def tiny(**changes: object) -> ModelConfig:
    fields: dict = {
        "family": "llama", "vocab_size": 50, "hidden_size": 36, "ffn_size": 26, "layers": 2, "heads": 9, "kv_heads": 3, "head_dim": 4,
        "norm_eps": 1e-5, "max_position": 64,
    } | changes  # fmt: skip
    return ModelConfig(**fields)


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {piece.name: piece.shape for weight in describe(config) for piece in weight.pieces}


def torchtitan_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dialect = find_dialect(["tok_embeddings.weight", "layers.0.attention.wo.weight"])
    return {dialect.map(name, config).tensor: shape for name, shape in stored_shapes(config).items()}


def written(shapes: dict[str, tuple[int, ...]], rows: int, columns: int = 1) -> dict[str, TensorEntry]:
    """An index as `rows` x `columns` ranks would write it: matrices in tiles, vectors in rows."""
    index = {}
    for name, shape in shapes.items():
        cuts = [[fsdp_rows(shape[0], rows, row) for row in range(rows)]]
        cuts += [[cut(size, columns, column) for column in range(columns)] for size in shape[1:]]
        chunks = [Chunk(f"{number}.distcp", 0, 0, box) for number, box in enumerate(itertools.product(*cuts)) if all(a < b for a, b in box)]
        index[name] = tensor_entry(name, "bfloat16", shape, chunks[::-1])
    return index


def execute(reads: list[Read], stored: dict[str, np.ndarray], index: dict[str, TensorEntry], rows: dict[str, int], weights: list[Weight]):
    """Make `reads` on arrays, element by element: the slow, obvious way."""
    owners = {id(chunk): name for name, entry in index.items() for chunk in entry.chunks}
    local = {weight.parameter: np.full((rows[weight.parameter], *weight.shape[1:]), np.nan) for weight in weights}
    for read in reads:
        tensor = stored[owners[id(read.chunk)]]
        flat = tensor[tuple(slice(*edges) for edges in read.chunk.box)].reshape(-1)
        target = local[read.parameter].reshape(-1)
        for run in range(read.runs):
            for at in range(read.length):
                where = read.destination + run * read.step + at * read.spread
                assert np.isnan(target[where]), "an element is read twice"
                target[where] = flat[read.start + run * read.stride + at]
    return local


@pytest.mark.parametrize(("tp", "fsdp"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (4, 2), (3, 40)])
@pytest.mark.parametrize("writers", [(1, 1), (4, 1), (3, 2), (7, 5)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_element_lands_where_it_belongs(tp: int, fsdp: int, writers: tuple[int, int], interleaved: bool) -> None:
    config = tiny(qk_norm="head") if not interleaved else tiny()
    shapes = torchtitan_names(config) if interleaved else stored_shapes(config)
    index = written(shapes, *writers)
    dialect = find_dialect(index.keys())
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    stored = {
        name: np.arange(end - math.prod(shape), end, dtype=float).reshape(shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    for rank, coordinate in itertools.product(range(tp), range(fsdp)):
        weights = list(describe(config, tp, rank))
        held = {weight.parameter: fsdp_rows(weight.shape[0], fsdp, coordinate) for weight in weights}
        reads = plan(weights, fsdp, coordinate, index, dialect, config)
        local = execute(reads, stored, index, {name: b - a for name, (a, b) in held.items()}, weights)
        for weight in weights:
            whole = np.concatenate(
                [canonical(stored, dialect.map(piece.name, config))[tuple(slice(*edges) for edges in piece.box)] for piece in weight.pieces]
            )
            np.testing.assert_array_equal(local[weight.parameter], whole[slice(*held[weight.parameter])])


def canonical(stored: dict[str, np.ndarray], mapping: Stored) -> np.ndarray:
    """The stored tensor with its rows in canonical order, by views instead of arithmetic."""
    tensor = stored[mapping.tensor]
    if not mapping.pairs:
        return tensor
    return tensor.reshape(-1, mapping.pairs // 2, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


class Fused:
    """A made-up trainer: QKV fused by KV group with rotary pairs side by side, gate and up packed as experts, down transposed."""

    def map(self, name: str, config: ModelConfig) -> Stored:
        layer, _, rest = name.partition(".self_attn.")
        dim, group = config.head_dim, config.heads // config.kv_heads
        fused = {
            "q_proj.weight": {"offset": 0, "group": group * dim, "pairs": dim},
            "k_proj.weight": {"offset": group * dim, "group": dim, "pairs": dim},
            "v_proj.weight": {"offset": (group + 1) * dim, "group": dim},
        }
        if rest in fused:
            shape = (config.kv_heads * (group + 2) * dim, config.hidden_size)
            return Stored(f"{layer}.wqkv", shape, stride=(group + 2) * dim, **fused[rest])
        if "gate_proj" in name or "up_proj" in name:
            return Stored(
                name.split(".mlp.")[0] + ".pack", (2, config.hidden_size, config.ffn_size), member=int("up" in name), transposed=True
            )
        if "down_proj" in name:
            return Stored(name, (config.ffn_size, config.hidden_size), transposed=True)
        return Stored(name)


def in_canonical_order(stored: np.ndarray, place: Stored, config: ModelConfig, name: str) -> np.ndarray:
    """What `Fused` means, by views."""
    if place.member is not None:
        return stored[place.member].T
    if place.transposed:
        return stored.T
    if not place.group:
        return stored
    group, dim = config.heads // config.kv_heads, config.head_dim
    heads = stored.reshape(config.kv_heads, group + 2, dim, -1)
    part = {"q": heads[:, :group], "k": heads[:, group : group + 1], "v": heads[:, group + 1 :]}[name.split("self_attn.")[1][0]]
    part = part.reshape(-1, dim, config.hidden_size)
    if place.pairs:
        part = part.reshape(-1, dim // 2, 2, config.hidden_size).swapaxes(1, 2)
    return part.reshape(-1, config.hidden_size)


@pytest.mark.parametrize(("tp", "fsdp"), [(1, 1), (2, 1), (4, 1), (2, 3), (3, 40)])
@pytest.mark.parametrize("writers", [(1, 1), (3, 2), (7, 5)])
def test_fused_packed_and_transposed(tp: int, fsdp: int, writers: tuple[int, int]) -> None:
    config, dialect = tiny(), Fused()
    places = {name: dialect.map(name, config) for name in stored_shapes(config)}
    shapes = {place.tensor: place.shape or stored_shapes(config)[name] for name, place in places.items()}
    index = written(shapes, *writers)
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    stored = {
        name: np.arange(end - math.prod(shape), end, dtype=float).reshape(shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    whole = {name: in_canonical_order(stored[place.tensor], place, config, name) for name, place in places.items()}
    for rank, coordinate in itertools.product(range(tp), range(fsdp)):
        weights = list(describe(config, tp, rank))
        held = {weight.parameter: fsdp_rows(weight.shape[0], fsdp, coordinate) for weight in weights}
        reads = plan(weights, fsdp, coordinate, index, dialect, config)  # type: ignore[arg-type]
        local = execute(reads, stored, index, {name: b - a for name, (a, b) in held.items()}, weights)
        for weight in weights:
            expected = np.concatenate([whole[piece.name][tuple(slice(*edges) for edges in piece.box)] for piece in weight.pieces])
            np.testing.assert_array_equal(local[weight.parameter], expected[slice(*held[weight.parameter])])


def test_whole_rows_are_one_run_and_columns_are_strided_runs() -> None:
    config = tiny()
    index = written(stored_shapes(config), 1)
    weights = {weight.parameter: weight for weight in describe(config, 2, 1)}
    (rows,) = plan([weights["embedding.weight"]], 1, 0, index, find_dialect(index), config)
    assert (rows.start, rows.length, rows.runs) == (25 * 36, 25 * 36, 1)
    (columns,) = plan([weights["blocks.0.mlp.down.weight"]], 1, 0, index, find_dialect(index), config)
    assert (columns.start, columns.length, columns.stride, columns.runs, columns.step) == (13, 13, 26, 36, 13)


def test_llama_405b_on_1024_ranks() -> None:
    config = tiny(vocab_size=128256, hidden_size=16384, ffn_size=53248, layers=126, heads=128, kv_heads=8, head_dim=128)
    index = written(stored_shapes(config), 512)
    dialect = find_dialect(index.keys())
    tp, fsdp = 8, 128
    names = {id(entry): name for name, entry in index.items()}
    assert len(names) == 126 * 9 + 3
    brought: dict[str, int] = defaultdict(int)
    touched: dict[tuple[str, int], int] = defaultdict(int)  # (file, first row of the chunk) of the largest matrix
    for rank in range(tp):
        weights = list(describe(config, tp, rank))
        for coordinate in range(fsdp):
            elements = 0
            for read in plan(weights, fsdp, coordinate, index, dialect, config):
                count = read.length * read.runs
                brought[read.parameter] += count
                elements += count
                if read.parameter == "blocks.125.mlp.gate_up.weight":
                    touched[read.chunk.file, read.chunk.box[0][0]] += count
            assert elements == sum(
                (b - a) * math.prod(weight.shape[1:]) for weight in weights for a, b in [fsdp_rows(weight.shape[0], fsdp, coordinate)]
            )
    shapes = stored_shapes(config)
    for weight in describe(config):
        copies = tp if weight.parameter.endswith("norm.weight") else 1
        assert brought[weight.parameter] == copies * sum(math.prod(shapes[piece.name]) for piece in weight.pieces)
    # Gate and up have the same chunks, and each of them is read exactly once.
    assert set(touched.values()) == {2 * 104 * 16384} and len(touched) == 512
