"""Fixtures of checkpoint tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.damage import FIXTURES, STEP


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a run, to be damaged."""
    shutil.copytree(FIXTURES / "kempnerforge", tmp_path / "run")
    return tmp_path / "run" / STEP
