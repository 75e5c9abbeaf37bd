"""Every tensor of a source, read with the loader's own reader."""

from __future__ import annotations

import math

import torch

from dist_infer.checkpoint.plan import Read
from dist_infer.checkpoint.reader import read_all
from dist_infer.checkpoint.sources.source import Source


def tensors(source: Source, threads: int = 3) -> dict[str, torch.Tensor]:
    """The tensors of `source`, put together from their chunks."""
    reads, rooms = [], {}
    for name, entry in source.index().items():
        for number, chunk in enumerate(entry.chunks):
            count = math.prod(stop - start for start, stop in chunk.box)
            half = count // 2  # in two reads, as two weights that share a tensor would
            rooms[f"{name} {number}"] = torch.empty(count, dtype=getattr(torch, entry.dtype))
            for first, length in ((0, half), (half, count - half)):
                if length:
                    reads.append(Read(chunk, entry.dtype, first, length, length, 1, f"{name} {number}", first, length))
    read_all(source.root, reads, rooms, threads)
    whole = {}
    for name, entry in source.index().items():
        whole[name] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for number, chunk in enumerate(entry.chunks):
            part = rooms[f"{name} {number}"].view([stop - start for start, stop in chunk.box])
            whole[name][tuple(slice(start, stop) for start, stop in chunk.box)] = part
    return whole


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )
