"""`torch.distributed.checkpoint` directories: `.metadata` and `*.distcp` files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dist_infer.checkpoint.sources.codec import codec_of
from dist_infer.checkpoint.sources.metadata import (
    BytesMetadata,
    Metadata,
    Properties,
    StorageInfo,
    StorageKey,
    TensorMetadata,
    Unknown,
    read_metadata,
)
from dist_infer.checkpoint.sources.safetensors import Stored, read_header
from dist_infer.checkpoint.sources.source import (
    ITEM_SIZES,
    Box,
    Chunk,
    TensorEntry,
    check_dims,
    check_name,
    check_weight,
    file_size,
    is_other,
    short,
    tensor_entry,
)
from dist_infer.checkpoint.sources.unpickle import Record

METADATA = ".metadata"
_RANK = re.compile(r"__(\d{1,6})\.metadata")
_STAGE = re.compile(r"pp(\d{1,4})")
_VERSION = "1."
_MOST_IGNORED = 20  # things worth listing


def parts(root: Path) -> list[Path]:
    """The metadata files, relative to `root`, that together describe the DCP checkpoint there; none when it is not complete.

    They are one `.metadata`; or one `__R.metadata` for each rank, of a save that did not coordinate them; or one
    `ppK/.metadata` for each stage, of a pipeline-split save.
    """
    if (root / METADATA).is_file():
        return [] if (root / f"{METADATA}.tmp").exists() else [Path(METADATA)]
    by_rank = {int(found[1]): Path(file.name) for file in root.glob("__*.metadata") if (found := _RANK.fullmatch(file.name))}
    by_stage = {int(found[1]): Path(file.name, METADATA) for file in root.glob("pp*") if (found := _STAGE.fullmatch(file.name))}
    for numbered in (by_rank, by_stage):
        if numbered and sorted(numbered) == list(range(len(numbered))):
            files = [numbered[number] for number in sorted(numbered)]
            whole = all((root / file).is_file() and not (root / f"{file}.tmp").exists() for file in files)
            return files if whole else []
    return []


class _Part(NamedTuple):
    """What one metadata file says: its path, the directory its file names start from, and its items by name and offsets."""

    path: Path
    folder: str
    places: dict[tuple[str, tuple[int, ...]], StorageInfo]


class _Pieces(NamedTuple):
    """A tensor as the parts seen so far describe it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: dict[Box, Chunk]


class DcpSource:
    """A DCP directory; every entry of its index is checked when it is opened."""

    kind = "dcp"

    def __init__(self, root: Path) -> None:
        """Read and check the index of `root`.

        Raises:
            ValueError: The metadata is damaged or hostile, a file is cut short, or a weight is not stored whole.
            FileNotFoundError: A file is missing.
        """
        self.root = root
        self.other_bytes = 0
        self._ignored: dict[str, None] = {}
        self._blobs: dict[tuple[str, int], dict[str, Stored]] = {}
        pieces: dict[str, _Pieces] = {}
        for file in parts(root):
            path = root / file
            metadata, unknown = read_metadata(path)
            self._ignored.update(dict.fromkeys(f"class {name}" for name in unknown))
            try:
                self._read(path, metadata, "" if file.parent == Path() else f"{file.parent}/", pieces)
            except (AttributeError, TypeError) as error:
                raise ValueError(f"{path}: an entry is not what DCP writes ({error}); the file is damaged") from error
        self._index: dict[str, TensorEntry] = {}
        for name, found in pieces.items():
            try:
                self._index[name] = tensor_entry(name, found.dtype, found.shape, list(found.chunks.values()))
            except ValueError as error:
                raise ValueError(f"{root}: {error}") from error
        self.ignored: tuple[str, ...] = tuple(self._ignored)[:_MOST_IGNORED]

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor that may belong to a model."""
        return self._index

    def _read(self, path: Path, metadata: Metadata, folder: str, pieces: dict[str, _Pieces]) -> None:
        """Add what one metadata file describes to `pieces`."""
        version = metadata.state.get("version")
        if version is not None and not (isinstance(version, str) and version.startswith(_VERSION)):
            self._ignored[f"version {short(version)}"] = None
        self._note(metadata)
        part = _Part(path, folder, self._places(path, folder, metadata))
        room = path.stat().st_size  # a chunk takes several bytes to describe
        for name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorMetadata):
                room -= len(stored.chunks)
                if room < 0:
                    raise ValueError(f"{path}: describes more chunks than a file of its size can hold; it is damaged")
                if not is_other(name):
                    self._add(part, name, stored, pieces)
            elif isinstance(stored, Unknown):
                self._ignored[f"{short(name)}, a {type(stored).__name__}"] = None
            elif not isinstance(stored, BytesMetadata):
                raise ValueError(f"{path}: entry {short(name)} is a {type(stored).__name__}, neither tensor nor bytes")
        for (name, _), info in part.places.items():
            if name not in pieces:
                self.other_bytes += info.length

    def _note(self, *records: Record) -> None:
        """Remember the attributes of `records` that are not known here."""
        for record in records:
            for field in record.state.keys() - record.fields:
                if len(self._ignored) < _MOST_IGNORED:
                    self._ignored[f"{type(record).__name__}.{str(field)[:80]}"] = None

    def _places(self, path: Path, folder: str, metadata: Metadata) -> dict[tuple[str, tuple[int, ...]], StorageInfo]:
        """(name, offsets) of every stored item to where it lies, checked against the files as they are."""
        places: dict[tuple[str, tuple[int, ...]], StorageInfo] = {}
        sizes: dict[str, int] = {}
        for key, info in metadata.storage_data.items():
            if not isinstance(key, StorageKey) or not isinstance(info, StorageInfo):
                raise ValueError(f"{path}: its table of storage holds a {type(info).__name__}; the file is damaged")
            self._note(key, info)
            file, start, length = info.relative_path, info.offset, info.length
            if file not in sizes:
                sizes[file] = file_size(self.root, folder + check_name(file, str(path)), str(path))
            offsets = check_weight(key.fqn, key.state.get("offset") or (), str(path))
            if not (isinstance(start, int) and isinstance(length, int) and start >= 0 and length >= 0):
                at = f"({short(start)}, {short(length)})"
                raise ValueError(f"{path}: {key.fqn} lies at {at} of {file}, which is no place in a file")
            if start + length > sizes[file]:
                raise ValueError(
                    f"{self.root / folder / file}: has {sizes[file]:,} bytes but {key.fqn} ends at byte {start + length:,}; "
                    "the file is cut short, copy it again"
                )
            places[key.fqn, offsets] = info
        return places

    def _add(self, part: _Part, name: str, stored: TensorMetadata, pieces: dict[str, _Pieces]) -> None:
        """Add the chunks of one tensor; a chunk that another part has too is taken once."""
        shape, dtype = check_weight(name, stored.size, str(part.path)), stored.properties.dtype
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise ValueError(f"{part.path}: weight {name} has element type {short(dtype)}, which is not known here")
        self._note(stored, _properties(stored.properties))
        entry = pieces.setdefault(name, _Pieces(dtype, shape, {}))
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise ValueError(
                f"{part.path}: weight {name} is {dtype} {shape}, and {entry.dtype} {entry.shape} in another part of the checkpoint"
            )
        own: dict[Box, Chunk] = {}
        told_by = str(part.path)
        for chunk in stored.chunks:
            self._note(chunk)
            offsets, sizes = check_dims(name, chunk.offsets, told_by), check_dims(name, chunk.sizes, told_by)
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise ValueError(f"{part.path}: weight {name} of shape {shape} has a chunk of {len(sizes)} dims; the file is damaged")
            if not math.prod(sizes):  # a rank that has no rows left
                continue
            box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
            if box in own:
                raise ValueError(f"{part.path}: weight {name}: two chunks overlap at {offsets}; the checkpoint's index is damaged")
            info = part.places.get((name, offsets)) or part.places.get((name, ()))
            if info is None:
                raise ValueError(
                    f"{part.path.parent}: weight {name} has a chunk at {offsets} that no file holds; save the checkpoint again"
                )
            own[box] = self._chunk(part, name, dtype, box, info)
        for box, chunk in own.items():
            entry.chunks.setdefault(box, chunk)

    def _chunk(self, part: _Part, name: str, dtype: str, box: Box, info: StorageInfo) -> Chunk:
        file = part.folder + info.relative_path
        needed = math.prod(stop - start for start, stop in box) * ITEM_SIZES[dtype]
        transforms = info.state.get("transform_descriptors")
        if not transforms and info.length == needed:
            return self._from_safetensors(name, dtype, box, file, info.offset)
        try:
            codec = codec_of(transforms)
        except ValueError as error:
            raise ValueError(f"{self.root / file}: weight {name} {error}") from error
        if codec == "torch_save" and info.length < needed:
            sizes = f"{info.length:,} bytes where its chunk takes {needed:,}"
            raise ValueError(f"{self.root / file}: weight {name} has {sizes}; the index is damaged")
        return Chunk(file, info.offset, info.length, box, codec)

    def _from_safetensors(self, name: str, dtype: str, box: Box, file: str, offset: int) -> Chunk:
        """The chunk of an item that has no more bytes than its elements: it is one of the safetensors that begin at `offset`."""
        if (file, offset) not in self._blobs:
            self._blobs[file, offset] = read_header(self.root, file, offset)
        stored = self._blobs[file, offset].get(name)
        if stored is None or (stored.dtype, stored.origin) != (dtype, tuple(start for start, _ in box)) or stored.chunk(file).box != box:
            raise ValueError(f"{self.root / file}: does not hold the chunk of weight {name} that the index says; save the checkpoint again")
        return stored.chunk(file)


def _properties(value: Any) -> Properties:
    if not isinstance(value, Properties):
        raise TypeError(f"a {type(value).__name__} for the properties of a tensor")
    return value


def interrupted(root: Path) -> str | None:
    """Why `root`, which holds files of a DCP checkpoint, is not a complete one; None when it holds none."""
    folders: Iterable[Path] = (root, *(folder for folder in root.glob("pp*") if _STAGE.fullmatch(folder.name)))
    for folder in folders:
        if (folder / f"{METADATA}.tmp").exists():
            return f"{folder}: incomplete checkpoint: writing it was interrupted (.metadata.tmp is there)"
    for folder in folders:
        if any(folder.glob("*.distcp")) and not parts(folder):
            return f"{folder}: incomplete checkpoint: it has .distcp files but no .metadata, which is written last"
    stages = [folder.name for folder in folders if folder != root]
    return f"{root}: incomplete checkpoint: it has {', '.join(sorted(stages))}, and not all stages from pp0 on" if stages else None
