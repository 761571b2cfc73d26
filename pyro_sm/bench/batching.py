# SPDX-License-Identifier: Apache-2.0
r"""Batched density: what evaluating B latents at once is worth, on five models.

Times are the smallest of several repetitions, in CPU milliseconds of this process on one thread, of
``log_prob_and_score`` per latent; both routes are timed in the same run. ``python -m pyro_sm bench batching``.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pyro_sm.bench.batching_models import PROBLEMS
from pyro_sm.model.density import ModelDensity, OneByOne


class Row(NamedTuple):
    """One line of the table; times in CPU milliseconds per latent."""

    name: str
    dim: int
    method: str
    one_by_one: float
    batched: float
    compiled: float | None = None
    """With ``compile=True``, if asked for."""

    @property
    def ratio(self) -> float:
        """How many times faster a latent is in the batch."""
        return self.one_by_one / self.batched


def _fastest(function: Callable[[], object], repeats: int) -> float:
    """Smallest CPU time of ``function()`` in milliseconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def measure(name: str, batch: int, *, single: int = 16, repeats: int = 7, compile: bool = False) -> Row:
    """Time one problem. ``single``: latents the loop is timed on; ``compile``: time that route as well."""
    model, args = PROBLEMS[name]()
    density = ModelDensity(model, args)
    loop = ModelDensity(model, args, batching=OneByOne())
    z = density.prior_draws(batch)
    batched = _fastest(lambda: density.log_prob_and_score(z), repeats) / batch
    row = _fastest(lambda: loop.log_prob_and_score(z[:single]), repeats) / single
    compiled = None
    if compile:
        graph = ModelDensity(model, args, compile=True)
        compiled = _fastest(lambda: graph.log_prob_and_score(z), repeats) / batch
    return Row(name, density.dim, density.batching_method, row, batched, compiled)


def table(rows: Sequence[Row], batch: int) -> str:
    """The rows as a Markdown table, with the machine stated."""
    lines = [
        f"Batched density: log p and its score, CPU ms per latent, B = {batch}, 1 thread "
        f"({os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__})",
        "",
        "| model (D) | way chosen | one by one | batched | ratio | compiled | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        compiled = f"{r.compiled:.3g} | {r.one_by_one / r.compiled:.0f}" if r.compiled else "– | –"
        lines.append(
            f"| {r.name} ({r.dim}) | {r.method} | {r.one_by_one:.3g} | {r.batched:.3g} | {r.ratio:.0f} | {compiled} |"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench batching``."""
    parser.add_argument("--batch", type=int, default=1024, help="latents per batch (default 1024)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions, of which the fastest counts")
    parser.add_argument("--compile", action="store_true", help="also time compile=True (a minute or two)")


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rows = [
                measure(name, options.batch, repeats=options.repeats, compile=options.compile) for name in PROBLEMS
            ]
    finally:
        torch.set_num_threads(threads)
    print(table(rows, options.batch))
