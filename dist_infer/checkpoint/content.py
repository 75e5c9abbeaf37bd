"""What all weights of a checkpoint are, in one hash: the same however they are cut, stored and named."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dist_infer.checkpoint.checkpoint import Checkpoint
from dist_infer.checkpoint.plan import plan
from dist_infer.checkpoint.reader import Job, batches
from dist_infer.checkpoint.sources.codec import verify_crc
from dist_infer.checkpoint.sources.source import ITEM_SIZES
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import Piece, Weight, describe

_SLICE = 16 << 20  # bytes of a weight that a thread holds at once


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor: its name, global shape and the type it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes it takes as it is stored."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def canonical_tensors(checkpoint: Checkpoint, config: ModelConfig) -> list[Tensor]:
    """Every tensor of the model, in model order, in the types the checkpoint holds."""
    pieces = {piece.name: piece for weight in describe(config) for piece in weight.pieces}
    index, dialect = checkpoint.index, checkpoint.dialect
    return [Tensor(name, piece.shape, index[dialect.map(name, config).tensor].dtype) for name, piece in pieces.items()]


def rows_of(tensor: Tensor, start: int, stop: int) -> Weight:
    """Rows `start` to `stop` of a canonical tensor, as a buffer named "rows" to be filled."""
    box = ((start, stop), *((0, size) for size in tensor.shape[1:]))
    return Weight("rows", (stop - start, *tensor.shape[1:]), (Piece(tensor.name, tensor.shape, box),))


def shares(sizes: Iterable[int], parts: int) -> list[int]:
    """Which of `parts` each item of the given sizes goes to, so that all have about the same to do."""
    sizes = list(sizes)
    loads, part = [0] * parts, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        part[item] = loads.index(min(loads))
        loads[part[item]] += sizes[item]
    return part


def hash_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    part: int,
    parts: int,
    threads: int,
    progress: Callable[[int], object] | None = None,
) -> dict[str, str]:
    """Read part `part` of `parts` of a checkpoint that matches the model, all its bytes, compared with the checksums it keeps.

    Returns:
        The hash of each weight of this part: BLAKE2b of its canonical rows, in order, as they are stored.

    Raises:
        ValueError: The bytes are not those that were saved.
    """
    tensors = canonical_tensors(checkpoint, config)
    mine = [tensor for tensor, at in zip(tensors, shares((t.bytes for t in tensors), parts), strict=True) if at == part]
    stored = sorted({checkpoint.dialect.map(tensor.name, config).tensor for tensor in tensors})
    chunks = [(chunk, checkpoint.index[name].dtype) for name in stored for chunk in checkpoint.index[name].chunks]
    to_compare = [one for one, at in zip(chunks, shares((c.length for c, _ in chunks), parts), strict=True) if at == part]
    with ThreadPoolExecutor(threads, "reader") as pool:
        compared = [pool.submit(verify_crc, checkpoint.source.root, chunk, dtype) for chunk, dtype in to_compare]
        hashed = {tensor.name: pool.submit(_hash, checkpoint, config, tensor, progress) for tensor in mine}
        try:
            for done in compared:
                done.result()
            return {name: done.result() for name, done in hashed.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def content_hash(checkpoint: Checkpoint, config: ModelConfig, hashes: Mapping[str, str]) -> str:
    """One hash for all weights, from that of each."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in sorted(canonical_tensors(checkpoint, config), key=lambda tensor: tensor.name):
        digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape, hashes[tensor.name]]).encode())
    return digest.hexdigest()


def _hash(checkpoint: Checkpoint, config: ModelConfig, tensor: Tensor, progress: Callable[[int], object] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    rows = min(tensor.shape[0], max(1, _SLICE * tensor.shape[0] // max(tensor.bytes, 1)))
    room = torch.empty((rows, *tensor.shape[1:]), dtype=getattr(torch, tensor.dtype))
    job = Job(checkpoint.source.root, {"rows": room}, progress)
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        job.work(deque(batches(plan([rows_of(tensor, start, stop)], 1, 0, checkpoint.index, checkpoint.dialect, config))))
        digest.update(room[: stop - start].view(torch.uint8).numpy().data)
    return digest.hexdigest()
