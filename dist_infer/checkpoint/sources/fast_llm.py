"""Fast-LLM's own format: safetensors files, and a metadata.yaml that says what is in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dist_infer.checkpoint.sources.safetensors import read_indexed
from dist_infer.checkpoint.sources.source import TensorEntry, check_weight_map, short

METADATA = "metadata.yaml"
_MOST_METADATA = 16 << 20  # bytes
_MOST_DEPTH = 50
_OLDEST = (0, 3, 0)
_SHARD = "/weights"  # how names of weights end, and those of optimizer state do not


def holds_fast_llm(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint of Fast-LLM, in whichever of its formats."""
    path = directory / METADATA
    if not path.is_file() or path.stat().st_size > _MOST_METADATA:
        return False
    return re.search(rb"^(fast_llm_version|checkpoint_version|checkpoint_type):", path.read_bytes(), re.MULTILINE) is not None


class FastLlmSource:
    """A checkpoint in the format `fast_llm`, whose tensors are called `<parameter>/<shard>`."""

    kind = "fast_llm"
    ignored: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        """Read and check the metadata of the directory `path` and the headers of the files it names.

        Raises:
            ValueError: It is damaged, too old, or a format that only Fast-LLM can read.
            FileNotFoundError: A file is missing.
        """
        self.root = path
        metadata = path / METADATA
        fields = _read(metadata)
        version, form = fields.get("fast_llm_version", "0"), fields.get("format", "fast_llm")
        if form != "fast_llm":
            raise ValueError(
                f"{metadata}: format {short(form)} can be read by Fast-LLM alone; export the checkpoint with "
                "`fast-llm convert`, to the format fast_llm or a Hugging Face one"
            )
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", version) if isinstance(version, str) else None
        if numbers is None or tuple(int(number or 0) for number in numbers.groups()) < _OLDEST:
            raise ValueError(
                f"{metadata}: written by Fast-LLM {short(version)}, and only 0.3.0 and later can be read; convert it with a newer one"
            )
        about = fields.get("metadata")
        names = about.get("state_index") if isinstance(about, dict) else None
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{metadata}: has no metadata.state_index, which names the file of each weight; it was not written whole")
        found = read_indexed(path, check_weight_map(names, metadata), metadata)
        self._index = {name: entry for name, entry in found.items() if name.endswith(_SHARD)}
        others = found.keys() - self._index.keys()
        self.other_bytes = sum(chunk.length for name in others for chunk in found[name].chunks)

    def index(self) -> dict[str, TensorEntry]:
        """Every weight."""
        return self._index


def _read(path: Path) -> dict[Any, Any]:
    """The YAML mapping at `path`, every scalar in it a string: nothing is resolved, merged or built."""
    if path.stat().st_size > _MOST_METADATA:
        raise ValueError(f"{path}: has more than {_MOST_METADATA:,} bytes, which no metadata of a checkpoint needs")
    loader, text, depth = getattr(yaml, "CBaseLoader", yaml.BaseLoader), path.read_bytes(), 0
    try:
        for event in yaml.parse(text, loader):  # nesting overflows the stack of the builder, so it is looked at first
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_DEPTH:
                raise ValueError(f"nests more than {_MOST_DEPTH} levels")
        fields = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds a YAML {type(fields).__name__} where a mapping is expected")
    return fields
