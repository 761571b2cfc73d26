# SPDX-License-Identifier: Apache-2.0
r"""What a draw costs: density, score, draw and training step of an ``AutoDiffusion``, on five models.

Times are the smallest of several repetitions, in CPU time of this process on one thread. The network has its default
size (particles: ``EGNN``); what it has learned does not enter. ``python -m pyro_sm bench cost``; with ``--compile``
draws and training steps again with ``AutoDiffusion(compile=True)``, how many times faster they are, and what it took
to compile what one training step and one batch of draws need.
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

from pyro_sm.base import Arguments
from pyro_sm.bench.batching_models import eight_schools, hierarchical_logistic
from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase, PriorBase
from pyro_sm.guides.bases import Base
from pyro_sm.nn.egnn import EGNN
from pyro_sm.nn.mlp import Architecture
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching
from pyro_sm.targets import DoubleWellParticles, GaussianMixture, ManyWell, Target


class Problem(NamedTuple):
    """A model, its arguments, and base and network of its guide."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    base: Base
    architecture: Architecture | None = None

    def guide(self, num_steps: int, *, compile: bool = False) -> AutoDiffusion:
        """A fresh one."""
        return AutoDiffusion(
            self.model, base=self.base, architecture=self.architecture, num_steps=num_steps, compile=compile
        )


def _from_target(target: Target) -> Problem:
    network = None
    if isinstance(target, DoubleWellParticles):
        network = EGNN(target.particles.num_bodies, target.particles.space_dim)
    return Problem(factor_model(target.log_prob, target.dim), (), GivenBase(*target.start), network)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "GMM-40": lambda: _from_target(GaussianMixture()),
    "eight schools": lambda: Problem(*eight_schools(), PriorBase()),
    "hierarchical logistic": lambda: Problem(*hierarchical_logistic(), PriorBase()),
    "many-well": lambda: _from_target(ManyWell()),
    "DW-4, EGNN": lambda: _from_target(DoubleWellParticles()),
}


class Compiled(NamedTuple):
    """CPU microseconds for ``draw`` and ``point`` as in a :class:`Row`; ``seconds`` until the first of each."""

    draw: float
    point: float
    seconds: float


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
    compiled: Compiled | None = None
    """The same with a compiled network, if it was asked for."""


def _fastest(function: Callable[[], object], repeats: int) -> float:
    """Smallest CPU time of ``function()`` in seconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def measure(name: str, num_draws: int, *, repeats: int = 7, num_steps: int = 48, compile: bool = False) -> Row:
    """Time one problem; leaves the param store cleared.

    Args:
        name: of :data:`PROBLEMS`.
        num_draws: draws at once, and latents per batch.
        repeats: repetitions, of which the fastest counts.
        num_steps: kernels per draw.
        compile: whether to time a compiled network, too.
    """
    problem = PROBLEMS[name]()
    model, args = problem.model, problem.args
    pyro.clear_param_store()
    guide = problem.guide(num_steps)
    step, batch_size = _training_step(problem, guide, repeats)
    bound = guide.bind(model, *args)
    density, process = bound.density, bound.diffusion()
    with torch.no_grad():
        z, _ = process.draw(num_draws)
        row = Row(
            name,
            density.dim,
            1e6 * _fastest(lambda: density.log_prob(z), repeats) / num_draws,
            1e6 * _fastest(lambda: density.log_prob_and_score(z), repeats) / num_draws,
            1e6 * _fastest(lambda: process.draw(num_draws), repeats) / num_draws,
            1e6 * step / batch_size,
            _fastest(lambda: guide.draw_weighted(density, num_draws, Arguments(args)), repeats),
        )
    pyro.clear_param_store()
    return row._replace(compiled=_compiled(problem, num_draws, repeats, num_steps)) if compile else row


def _training_step(problem: Problem, guide: AutoDiffusion, repeats: int) -> tuple[float, int]:
    """CPU seconds of a step, and its noised points."""
    # Draws for the buffer come once, in the warm-up; no population, whose seeding is a round's business, too.
    objective = ImportanceWeightedScoreMatching(steps_per_round=10 * repeats + 10, population=None)
    svi = SVI(problem.model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), objective)
    return _fastest(lambda: svi.step(*problem.args), 10 * repeats), objective.batch_size


def _compiled(problem: Problem, num_draws: int, repeats: int, num_steps: int) -> Compiled:
    guide = problem.guide(num_steps, compile=True)
    guide(*problem.args)  # sets it up
    started = time.perf_counter()
    network, rows = guide.diffusion(Arguments(problem.args)).denoiser.network, 1024
    for levels, learns in ((rows, True), (1, False)):  # those of a training step, and of draws
        with torch.set_grad_enabled(learns):
            network(torch.zeros(rows, guide.latent_dim), torch.zeros(levels), None)
    seconds = time.perf_counter() - started
    step, batch_size = _training_step(problem, guide, repeats)
    process = guide.diffusion(Arguments(problem.args))
    with torch.no_grad():
        draw = _fastest(lambda: process.draw(num_draws), repeats)
    pyro.clear_param_store()
    return Compiled(1e6 * draw / num_draws, 1e6 * step / batch_size, seconds)


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
    if any(r.compiled for r in rows):
        lines[2] += " compiled: draws, training | compiling, s |"
        lines[3] += "---|---|"
    for r in rows:
        numbers = " | ".join(f"{x:.3g}" for x in (r.density, r.score, r.draw, r.point, r.weighted))
        lines.append(f"| {r.name} ({r.dim}) | {numbers} |")
        if r.compiled is not None:
            faster = f"{r.draw / r.compiled.draw:.2f}, {r.point / r.compiled.point:.2f} times faster"
            lines[-1] += f" {faster} | {r.compiled.seconds:.0f} |"
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench cost``."""
    parser.add_argument("--draws", type=int, default=10_000, help="draws at once (default %(default)s)")
    parser.add_argument("--kernels", type=int, default=48, help="of the guide (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions, of which the fastest counts")
    parser.add_argument("--compile", action="store_true", help="time compiled networks, too")
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
                measure(
                    name,
                    options.draws,
                    repeats=options.repeats,
                    num_steps=options.kernels,
                    compile=options.compile,
                )
                for name in PROBLEMS
            ]
        print(table(rows, options.draws, options.kernels))
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
