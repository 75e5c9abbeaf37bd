"""Sources: checkpoint formats, and where in them the bytes of each tensor lie."""

from __future__ import annotations

from pathlib import Path

from dist_infer.checkpoint.sources.dcp import DcpSource, parts
from dist_infer.checkpoint.sources.fast_llm import FastLlmSource, holds_fast_llm
from dist_infer.checkpoint.sources.safetensors import INDEX, SafetensorsSource
from dist_infer.checkpoint.sources.source import Source
from dist_infer.checkpoint.sources.torch_save import SUFFIXES, TorchSaveSource, holds_torch_save


def is_checkpoint(path: Path) -> bool:
    """Whether the file or directory `path` is a complete checkpoint by the names of its files; nothing else is looked at."""
    return _format(path) is not None


def open_source(path: Path) -> Source:
    """The source at `path`, a directory or a single file, its index read and checked.

    Raises:
        FileNotFoundError: A file it refers to is missing.
        ValueError: It is damaged or hostile.
    """
    return (_format(path) or SafetensorsSource)(path)


def _format(path: Path) -> type[DcpSource | FastLlmSource | SafetensorsSource | TorchSaveSource] | None:
    if path.is_file():
        if path.suffix in SUFFIXES:
            return TorchSaveSource
        return SafetensorsSource if path.suffix == ".safetensors" else None
    if parts(path):
        return DcpSource
    if holds_fast_llm(path):
        return FastLlmSource
    if any((path / name).is_file() for name in (INDEX, "model.safetensors")):
        return SafetensorsSource
    return TorchSaveSource if holds_torch_save(path) else None
