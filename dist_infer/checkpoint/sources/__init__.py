"""Sources: checkpoint formats, and where in them the bytes of each tensor lie."""

from __future__ import annotations

from pathlib import Path

from dist_infer.checkpoint.sources.dcp import DcpSource
from dist_infer.checkpoint.sources.safetensors import SafetensorsSource
from dist_infer.checkpoint.sources.source import Source


def open_source(path: Path) -> Source:
    """The source at `path`, a DCP directory or safetensors, its index read and checked.

    Raises:
        FileNotFoundError: A file it refers to is missing.
        ValueError: It is damaged or hostile.
    """
    return DcpSource(path) if (path / ".metadata").is_file() else SafetensorsSource(path)
