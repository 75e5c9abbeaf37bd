"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Warm gloo ranks: `ranks(2).run(function, ...)`."""
    pool = Ranks()
    yield pool
    pool.close()
