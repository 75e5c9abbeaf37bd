"""Checkpoints: sources say where bytes lie, dialects what names mean, the plan which bytes each rank reads."""

from __future__ import annotations

from dist_infer.checkpoint.checkpoint import Checkpoint, load, open_checkpoint
from dist_infer.checkpoint.reader import LoadReport

__all__ = ["Checkpoint", "LoadReport", "load", "open_checkpoint"]
