"""Checkpoints to be damaged, and what is said of them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from dist_infer.checkpoint import load, open_checkpoint
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.weights import describe

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
STEP = "checkpoints/step_3"
NAME = "model.layers.1.mlp.down_proj.weight"


def open_and_load(path: Path, config: Path | None = None) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(path))
    model = checkpoint.config(str(config) if config else None)
    checkpoint.match(model)
    weights = list(describe(model))
    room = {weight.parameter: torch.full(weight.shape, torch.nan) for weight in weights}
    load(checkpoint, model, weights, 1, 0, room, LoaderOptions())
    return room


def refusal(path: Path, config: Path | None = None) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_and_load(path, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(run: Path, edit: Callable[[Metadata], None]) -> None:
    """Rewrite the metadata of `run`, a file this test trusts."""
    path = run / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def move(fqn: str, **changes: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        key = next(key for key in metadata.storage_data if key.fqn == fqn)
        metadata.storage_data[key] = dataclasses.replace(metadata.storage_data[key], **changes)

    return edit
