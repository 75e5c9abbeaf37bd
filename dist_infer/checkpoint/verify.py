"""What is checked before and after weights are read, and what a checkpoint is known by."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dist_infer.checkpoint.dialects import Dialect
from dist_infer.checkpoint.plan import Read
from dist_infer.checkpoint.sources.source import Source, TensorEntry
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import Weight, describe, fsdp_rows

_READABLE = ("float32", "bfloat16", "float16", "float64")
_SLICE = 1 << 22  # elements looked at together, to keep the mask of finite ones small
_HEAD = "lm_head.weight"


def match(config: ModelConfig, index: Mapping[str, TensorEntry], dialect: Dialect) -> None:
    """Check that the checkpoint holds exactly the weights of the model.

    A head stored beside a declared tie is let be, as are tables that are computed anew.

    Raises:
        ValueError: A weight is missing, has another shape, has an element type that is no plain
            floating-point one, or is one the model does not have.
    """
    missing, misshapen, expected = [], [], set()
    for weight in describe(config):
        for piece in weight.pieces:
            place = dialect.map(piece.name, config)
            stored, shape = place.tensor, place.shape or piece.shape
            if stored in expected:  # a part of a fused matrix that was looked at
                continue
            entry = index.get(stored)
            expected.add(stored)
            if entry is None:
                missing.append(stored)
            elif entry.shape != shape:
                misshapen.append(f"{stored} is {_shape(entry.shape)} in the checkpoint and {_shape(shape)} by the model configuration")
            elif entry.dtype not in _READABLE:
                raise ValueError(f"weight {stored} is stored as {entry.dtype}; supported are {', '.join(_READABLE)}")
    head = dialect.map(_HEAD, config).tensor
    if missing == [head]:
        raise ValueError(f"missing weight {head}: if the head is tied to the embeddings, the model configuration must say so")
    if missing:
        raise ValueError(f"missing {_some('weight', missing)}; the model configuration does not describe this checkpoint")
    if misshapen:
        raise ValueError(_some("misshapen weight", misshapen))
    extra = [name for name in index if name.startswith(dialect.prefix) and name not in expected and not dialect.is_buffer(name)]
    if config.tied_head and head in extra:
        extra.remove(head)
    if extra:
        raise ValueError(
            f"extra {_some('weight', extra)}; the model configuration ({config.layers} layers of {config.family}) has no place for it"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _some(noun: str, names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    return f"{noun} {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def check_complete(weights: Iterable[Weight], fsdp: int, coordinate: int, reads: Iterable[Read]) -> None:
    """Assert that `reads` bring every element of the rank's part of `weights`, by counting."""
    brought: Counter[str] = Counter()
    for read in reads:
        brought[read.parameter] += read.elements
    for weight in weights:
        first, last = fsdp_rows(weight.shape[0], fsdp, coordinate)
        wanted = (last - first) * math.prod(weight.shape[1:])
        assert brought[weight.parameter] == wanted, f"{weight.parameter}: the plan brings {brought[weight.parameter]} of {wanted} elements"


def check_finite(weights: Iterable[Weight], fsdp: int, coordinate: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that no weight holds NaN or Inf.

    Raises:
        ValueError: One does; it is named, with the first such element.
    """
    for weight in weights:
        flat = tensors[weight.parameter].detach().view(-1)
        for begin in range(0, flat.numel(), _SLICE):
            part = flat[begin : begin + _SLICE]
            # The least and the greatest are finite only if all are: one fast pass, nothing kept.
            if not torch.stack(torch.aminmax(part)).isfinite().all():
                at = begin + int((~torch.isfinite(part)).nonzero()[0])
                raise ValueError(
                    f"weight {_canonical(weight, fsdp, coordinate, at)} is {flat[at].item()}; the checkpoint is damaged or diverged"
                )


def _canonical(weight: Weight, fsdp: int, coordinate: int, at: int) -> str:
    """The canonical name and position of element `at` of the rank's part of `weight`."""
    row, rest = divmod(at, math.prod(weight.shape[1:]))
    row += fsdp_rows(weight.shape[0], fsdp, coordinate)[0]
    piece = next(piece for piece in weight.pieces if piece.row <= row < piece.row + piece.rows)
    position = [row - piece.row + piece.box[0][0]]
    for dim in range(1, len(weight.shape)):
        inner = math.prod(weight.shape[dim + 1 :])
        position.append(rest // inner + piece.box[dim][0])
        rest %= inner
    return f"{piece.name}{position}"


def identity(source: Source) -> str:
    """A cheap fingerprint of a checkpoint: its index, the sizes of its files, and bytes sampled from its weights.

    It does not depend on where the checkpoint lies or when it was copied.
    """
    index = source.index()
    digest = hashlib.blake2b(digest_size=16)
    files: set[str] = set()
    for name in sorted(index):
        entry = index[name]
        files.update(chunk.file for chunk in entry.chunks)
        digest.update(json.dumps([name, entry.dtype, entry.shape, len(entry.chunks)]).encode())
    for file in sorted(files):
        digest.update(json.dumps([file, (source.root / file).stat().st_size]).encode())
    names = sorted(index)
    for name in names[:: max(1, len(names) // 64)]:
        chunk = index[name].chunks[0]
        digest.update(_sample(source.root / chunk.file, chunk.offset + chunk.length // 2))
    return digest.hexdigest()


def _sample(path: Path, offset: int) -> bytes:
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        return stream.read(64)
