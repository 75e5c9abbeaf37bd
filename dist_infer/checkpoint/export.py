"""Writing a model anew, from any source and dialect, under transformers' names: as safetensors or DCP."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_infer.checkpoint.checkpoint import Checkpoint
from dist_infer.checkpoint.content import Tensor, canonical_tensors, rows_of, shares
from dist_infer.checkpoint.plan import plan
from dist_infer.checkpoint.reader import Job, batches
from dist_infer.checkpoint.sources.source import ITEM_SIZES
from dist_infer.checkpoint.transformers_config import transformers_config
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.config import ModelConfig
from dist_infer.model.families import stored
from dist_infer.model.stored import Stored

_MOST_FILE = 2 << 30  # bytes of weights in a safetensors file, which a rank holds while it writes them
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "spiece.model",
)  # fmt: skip


class Part(NamedTuple):
    """A canonical tensor and its place in a written one."""

    tensor: Tensor
    place: Stored


@dataclass(frozen=True)
class Written:
    """A tensor to be written: its name, shape and type, and what fills it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Export:
    """What is to be written of a checkpoint.

    Attributes:
        checkpoint: The source, which matches the model.
        config: The model, as its trainer calls it.
        settings: transformers' `config.json`.
        tensors: In model order, under transformers' names.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    settings: dict[str, Any]
    tensors: tuple[Written, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: ModelConfig, dtype: str, explicit: str | None = None) -> Export:
        """Plan an export.

        Args:
            checkpoint: The source, which matches the model.
            config: The model.
            dtype: Element type to write; "auto" keeps each weight's own.
            explicit: The configuration file that the user named.

        Raises:
            ValueError: transformers has no such model.
        """
        named, settings = transformers_config(config, checkpoint.path, explicit)
        settings = {**settings, "dtype": checkpoint.dtype(config) if dtype == "auto" else dtype}
        settings.pop("torch_dtype", None)
        parts: dict[str, list[Part]] = {}
        for tensor in canonical_tensors(checkpoint, config):
            place = stored(tensor.name, named)
            parts.setdefault(place.tensor, []).append(Part(tensor, place))
        tensors = []
        for name, of_name in parts.items():
            first = of_name[0]
            kind = first.tensor.dtype if dtype == "auto" else dtype
            tensors.append(Written(name, first.place.shape or first.tensor.shape, kind, tuple(of_name)))
        return cls(checkpoint, config, settings, tuple(tensors))

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.bytes for tensor in self.tensors)

    def write_safetensors(
        self, directory: Path, rank: int, ranks: int, options: LoaderOptions, progress: Callable[[int], object] | None = None
    ) -> None:
        """Write every `ranks`-th file of weights, and on rank 0 their index.

        Raises:
            ValueError: The source is damaged, or a weight is not finite.
            OSError: A file cannot be read or written.
        """
        from safetensors.torch import save_file

        files = _files(self.tensors, min(_MOST_FILE, -(-self.bytes // ranks)))
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)] if files[1:] else ["model.safetensors"]
        for name, tensors in list(zip(names, files, strict=True))[rank::ranks]:
            save_file(dict(self._read(tensors, options, progress)), directory / name, {"format": "pt"})
            _sync(directory / name)
        if rank == 0 and len(files) > 1:
            weight_map = {tensor.name: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            _write_json(directory / "model.safetensors.index.json", index)

    def write_dcp(
        self, directory: Path, rank: int, ranks: int, options: LoaderOptions, progress: Callable[[int], object] | None = None
    ) -> None:
        """Write this rank's share of the tensors with torch's own writer; the ranks are those of the default process group.

        Raises:
            ValueError: The source is damaged, or a weight is not finite.
            OSError: A file cannot be read or written.
        """
        import torch.distributed.checkpoint as dcp

        share = shares((tensor.bytes for tensor in self.tensors), ranks)
        mine = [tensor for tensor, at in zip(self.tensors, share, strict=True) if at == rank]
        dcp.save(dict(self._read(mine, options, progress)), checkpoint_id=directory, no_dist=ranks == 1)

    def write_rest(self, directory: Path) -> None:
        """Write the configuration, and copy what belongs to the tokenizer and to generation."""
        _write_json(directory / "config.json", self.settings)
        tokenizer, generation = self.checkpoint.tokenizer_directory(), self.checkpoint.generation_config()
        files = {file for pattern in _TOKENIZER for file in tokenizer.glob(pattern)} if tokenizer is not None else set()
        for file in sorted(files | ({generation} if generation is not None else set())):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)

    def _read(
        self, tensors: list[Written], options: LoaderOptions, progress: Callable[[int], object] | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in tensors:
            whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
            for part in tensor.parts:
                self._fill(whole, part, options, progress)
            yield tensor.name, whole

    def _fill(self, whole: torch.Tensor, part: Part, options: LoaderOptions, progress: Callable[[int], object] | None) -> None:
        """Bring one canonical tensor into its place in `whole`."""
        checkpoint, (tensor, place) = self.checkpoint, part
        plain = place == Stored(place.tensor) or place == Stored(place.tensor, shape=tensor.shape)
        room = whole if plain else torch.empty(tensor.shape, dtype=whole.dtype)
        job = Job(checkpoint.source.root, {"rows": room}, progress)
        rows = rows_of(tensor, 0, tensor.shape[0])
        job.work(deque(batches(plan([rows], 1, 0, checkpoint.index, checkpoint.dialect, self.config))))
        if options.check_finite and job.doubtful and not room.isfinite().all():
            raise ValueError(f"{checkpoint.path}: weight {tensor.name} is not finite in {str(room.dtype).removeprefix('torch.')}")
        if not plain:
            target = whole if place.member is None else whole[place.member]
            target = target.T if place.transposed else target
            for run in place.rows(0, tensor.shape[0]):
                target[run.stored : run.stored + run.step * run.length : run.step] = room[run.canonical : run.canonical + run.length]


def _files(tensors: tuple[Written, ...], most: int) -> list[list[Written]]:
    """`tensors`, in order, in files of at most `most` bytes, or of one larger tensor."""
    files: list[list[Written]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.bytes > most:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    return files


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Return when the file is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
