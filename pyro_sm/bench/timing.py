# SPDX-License-Identifier: Apache-2.0
"""CPU times on one thread: the smallest of several repetitions, which is the one least disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REPEATS = 7
"""Repetitions, of which the fastest counts; on a busy machine ask for more."""


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Smallest CPU time of ``function()`` in seconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@contextmanager
def one_thread(dtype: torch.dtype | None = None) -> Iterator[None]:
    """One thread of torch, this default dtype, and the generator given back as it was."""
    before = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype or before[1])
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
