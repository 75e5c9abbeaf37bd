"""The cluster of these tests: one for all of them, mended after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, missing


@pytest.fixture(scope="session")
def whole_cluster() -> Iterator[Cluster]:
    """Three nodes; skipped where there can be none."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"no SLURM cluster can be started: {reason}")
    cluster = Cluster(3)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """Three idle nodes, to be disturbed."""
    yield whole_cluster
    whole_cluster.mend()
