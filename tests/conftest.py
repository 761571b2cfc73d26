# SPDX-License-Identifier: Apache-2.0
"""Every test is seeded from its own name, with an empty param store and one thread."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pyro
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # every core has a worker: what tests start must not take two
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    pyro.clear_param_store()
    # Without the folder: a test that moves keeps its numbers.
    name = request.node.nodeid.rpartition("/")[2]
    pyro.set_rng_seed(zlib.crc32(f"tests/{name}".encode()))
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Two threads on a busy machine can be tens of times slower than one.
    torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Default dtype float64 within a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
