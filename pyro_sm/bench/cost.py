# SPDX-License-Identifier: Apache-2.0
r"""What a draw costs: density, score, draw and training step of an ``AutoDiffusion``, on four models.

Times are the smallest of several repetitions, in CPU time of this process on one thread. The network has its default
size; what it has learned does not enter. ``python -m pyro_sm bench cost``.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim

from pyro_sm.bench.batching_models import eight_schools, hierarchical_logistic
from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase, PriorBase
from pyro_sm.guides.bases import Base
from pyro_sm.objectives.importance_weighted import ImportanceWeightedScoreMatching
from pyro_sm.targets import GaussianMixture, ManyWell, Target


class Problem(NamedTuple):
    """A model, its arguments, and the base of its guide."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    base: Base


def _from_target(target: Target) -> Problem:
    return Problem(factor_model(target.log_prob, target.dim), (), GivenBase(*target.start))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "GMM-40": lambda: _from_target(GaussianMixture()),
    "eight schools": lambda: Problem(*eight_schools(), PriorBase()),
    "hierarchical logistic": lambda: Problem(*hierarchical_logistic(), PriorBase()),
    "many-well": lambda: _from_target(ManyWell()),
}


class Row(NamedTuple):
    """One line of the table; CPU microseconds, and for the last entry seconds."""

    name: str
    dim: int
    density: float
    """One latent in a batch."""
    score: float
    """One latent in a batch, density and score together."""
    draw: float
    """One of the sampler's own draws, with its path log ratio; the density is not in it."""
    point: float
    """One noised point of a training step: loss, gradient and optimiser; rounds of fresh draws are not in it."""
    weighted: float
    """All weighted draws together: draws of the guide and of the prior, density, weights."""


def _fastest(function: Callable[[], object], repeats: int) -> float:
    """Smallest CPU time of ``function()`` in seconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def measure(name: str, num_draws: int, *, repeats: int = 7, num_steps: int = 48) -> Row:
    """Time one problem; leaves the param store cleared.

    Args:
        name: of :data:`PROBLEMS`.
        num_draws: draws at once, and latents per batch.
        repeats: repetitions, of which the fastest counts.
        num_steps: kernels per draw.
    """
    model, args, base = PROBLEMS[name]()
    pyro.clear_param_store()
    guide = AutoDiffusion(model, base=base, num_steps=num_steps)
    # Draws for the buffer come once, in the warm-up; no population, whose seeding is a round's business, too.
    objective = ImportanceWeightedScoreMatching(steps_per_round=10 * repeats + 10, population=None)
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), objective)
    step = _fastest(lambda: svi.step(*args), 10 * repeats)
    density = guide.density(model, args, {})
    process = guide.diffusion(args, {})
    with torch.no_grad():
        z, _ = process.draw(num_draws)
        row = Row(
            name,
            density.dim,
            1e6 * _fastest(lambda: density.log_prob(z), repeats) / num_draws,
            1e6 * _fastest(lambda: density.log_prob_and_score(z), repeats) / num_draws,
            1e6 * _fastest(lambda: process.draw(num_draws), repeats) / num_draws,
            1e6 * step / objective.batch_size,
            _fastest(lambda: guide.draw_weighted(density, num_draws, args), repeats),
        )
    pyro.clear_param_store()
    return row


def table(rows: Sequence[Row], num_draws: int, num_steps: int) -> str:
    """The rows as a Markdown table, with the machine stated."""
    lines = [
        f"CPU µs each, {num_draws:,} draws at once through {num_steps} kernels, "
        f"{str(torch.get_default_dtype()).removeprefix('torch.')}, 1 thread "
        f"({os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__})",
        "",
        "| model (D) | density | density and score | guide draw with path weight | training, per noised point "
        f"| {num_draws:,} weighted draws, s |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = " | ".join(f"{x:.3g}" for x in (r.density, r.score, r.draw, r.point, r.weighted))
        lines.append(f"| {r.name} ({r.dim}) | {numbers} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench cost``."""
    parser.add_argument("--draws", type=int, default=10_000, help="draws at once (default %(default)s)")
    parser.add_argument("--kernels", type=int, default=48, help="of the guide (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions, of which the fastest counts")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rows = [
                measure(name, options.draws, repeats=options.repeats, num_steps=options.kernels) for name in PROBLEMS
            ]
        print(table(rows, options.draws, options.kernels))
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
