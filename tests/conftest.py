"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is first imported


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Warm gloo ranks: `ranks(2).run(function, ...)`."""
    pool = Ranks()
    yield pool
    pool.close()
