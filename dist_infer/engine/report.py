"""What a run says of itself: what made its results, and one line at the end."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.session import Session


def provenance(session: Session, blueprint: Blueprint | None = None) -> dict[str, Any]:
    """What made a result: checkpoint, topology, the options that differ from the defaults, and versions.

    Args:
        session: The running model.
        blueprint: Of the checkpoint that was asked, if that is not the one that is loaded.
    """
    blueprint = blueprint or session.blueprint
    checkpoint, shape = blueprint.checkpoint, session.mesh.shape
    return {
        "checkpoint": str(checkpoint.path) if checkpoint is not None else None,
        "identity": checkpoint.identity if checkpoint is not None else None,
        "content_hash": session.resident.content_hash if blueprint.checkpoint is session.blueprint.checkpoint else None,
        "topology": {"replicas": shape.replicas, "fsdp": shape.fsdp, "tp": shape.tp, "device": session.world.device.type},
        "dtype": str(blueprint.dtype).removeprefix("torch."),
        "options": blueprint.options.changed(),
        "versions": {name: importlib.metadata.version(name) for name in ("dist_infer", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def summary(session: Session) -> str:
    """One line: parameters, topology, bytes read and GB/s, prefill and decode tokens/s (of the conductor's replica)."""
    assert session.engine is not None
    s, shape = session.engine.statistics, session.mesh.shape
    parts = [
        f"{_short(session.blueprint.parameters)} parameters",
        f"replicas={shape.replicas} fsdp={shape.fsdp} tp={shape.tp} on {session.world.device.type}",
    ]
    read = session.resident
    if read.read_seconds:
        parts.append(f"read {_bytes(read.read_bytes)} at {read.read_bytes / read.read_seconds / 1e9:.2f} GB/s")
    if s.prefill_seconds:
        parts.append(f"prefill {s.prefill_tokens / s.prefill_seconds:,.0f} tokens/s")
    if s.decode_seconds:
        parts.append(f"decode {s.decode_tokens / s.decode_seconds:,.0f} tokens/s")
    return " | ".join(parts)


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
