"""`torch.distributed.checkpoint` directories: `.metadata` and `*.distcp` files."""

from __future__ import annotations

import math
import re
from pathlib import Path

from dist_infer.checkpoint.sources.metadata import BytesMetadata, Metadata, StorageInfo, StorageKey, TensorMetadata, read_metadata
from dist_infer.checkpoint.sources.source import ITEM_SIZES, Chunk, TensorEntry, check_name, file_size, tensor_entry

# Parts of names below which training state is kept, not the model.
_OTHER = re.compile(r"(^|\.)(optim|optimizer|optimizers|lr_scheduler|scheduler|train_state|dataloader|rng_state)(\.|$)")


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
        self._index: dict[str, TensorEntry] = {}
        try:
            self._read(read_metadata(root / ".metadata"))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{root}/.metadata: an entry is not what DCP writes ({error}); the file is damaged") from error

    def _read(self, metadata: Metadata) -> None:
        places = self._places(metadata)
        for name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorMetadata) and not _OTHER.search(name):
                self._index[name] = self._entry(name, stored, places)
            elif not isinstance(stored, TensorMetadata | BytesMetadata):
                raise ValueError(f"{self.root}/.metadata: entry {name!r} is a {type(stored).__name__}, neither tensor nor bytes")
        for (name, _), info in places.items():
            if name not in self._index:
                self.other_bytes += info.length

    def index(self) -> dict[str, TensorEntry]:
        """Every tensor that may belong to a model."""
        return self._index

    def _places(self, metadata: Metadata) -> dict[tuple[str, tuple[int, ...]], StorageInfo]:
        """(name, offsets) of every stored item to where it lies, checked against the files as they are."""
        places: dict[tuple[str, tuple[int, ...]], StorageInfo] = {}
        sizes: dict[str, int] = {}
        for key, info in metadata.storage_data.items():
            if not isinstance(key, StorageKey) or not isinstance(info, StorageInfo):
                raise ValueError(f"{self.root}/.metadata: its table of storage holds a {type(info).__name__}; the file is damaged")
            file, start, length = info.relative_path, info.offset, info.length
            if file not in sizes:
                told_by = f"{self.root}/.metadata"
                sizes[file] = file_size(self.root, check_name(file, told_by), told_by)
            if not (isinstance(start, int) and isinstance(length, int) and start >= 0 and length >= 0):
                raise ValueError(f"{self.root}/.metadata: {key.fqn} lies at ({start!r}, {length!r}) of {file}, which is no place in a file")
            if start + length > sizes[file]:
                raise ValueError(
                    f"{self.root / file}: has {sizes[file]:,} bytes but {key.fqn} ends at byte {start + length:,}; "
                    "the file is cut short, copy it again"
                )
            places[key.fqn, tuple(key.offset or ())] = info
        return places

    def _entry(self, name: str, stored: TensorMetadata, places: dict[tuple[str, tuple[int, ...]], StorageInfo]) -> TensorEntry:
        shape, dtype = tuple(stored.size), stored.properties.dtype
        if dtype not in ITEM_SIZES:
            raise ValueError(f"{self.root}/.metadata: weight {name} has element type {dtype!r}, which is not known here")
        chunks = []
        for chunk in stored.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise ValueError(
                    f"{self.root}/.metadata: weight {name} of shape {shape} has a chunk of {len(sizes)} dims; the file is damaged"
                )
            info = places.get((name, offsets)) or places.get((name, ()))
            if info is None:
                if math.prod(sizes) == 0:
                    continue
                raise ValueError(f"{self.root}: weight {name} has a chunk at {offsets} that no file holds; save the checkpoint again")
            if info.transform_descriptors:
                raise ValueError(
                    f"{self.root / info.relative_path}: weight {name} is stored through {info.transform_descriptors!r}; "
                    "only items written without compression can be read"
                )
            box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
            chunks.append(Chunk(info.relative_path, info.offset, info.length, box, "torch_save"))
        return tensor_entry(name, dtype, shape, chunks)
