"""Shared fixtures: a run's keys, and an environment without surprises."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from twinrl.core.keys import ROLES, Keys, create_keys


@pytest.fixture
def keys(tmp_path):
    """{role: Keys} of a fresh run folder `tmp_path`."""
    create_keys(tmp_path / "keys")
    return {role: Keys.load(tmp_path / "keys" / f"{role}.key") for role in ROLES}


@pytest.fixture
def bench(tmp_path):
    """A replay service to be started, with its writers and readers."""
    from buffer_service.testing import Bench

    bench = Bench(tmp_path / "run")
    yield bench
    bench.close()
