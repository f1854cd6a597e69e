"""One cluster for all tests of this folder; they are skipped where Slurm cannot be had."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        yield started
