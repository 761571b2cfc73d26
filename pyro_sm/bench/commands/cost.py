# SPDX-License-Identifier: Apache-2.0
r"""What a draw costs: density, score, draw and training step of an ``AutoDiffusion``, on five models.

``python -m pyro_sm bench cost``; with ``--compile`` draws and training steps again with
``AutoDiffusion(compile=True)``.

Columns: CPU microseconds of one latent's density in a batch, of density and score together, of one of the sampler's
own draws with its path log ratio (the density is not in it), and of one noised point of a training step (loss,
gradient and optimiser; rounds of fresh draws are not in it); CPU seconds of all weighted draws together (of the guide
and of the prior, density, weights); how many times faster draws and training are with a compiled network, and what it
took to compile what one training step and one batch of draws need. Times are the smallest of several repetitions, of
this process on one thread. The network has its default size (particles: ``EGNN``); what it has learned does not
enter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim

from pyro_sm.base import Arguments
from pyro_sm.bench.batching_models import eight_schools, hierarchical_logistic
from pyro_sm.bench.problem import Problem, from_target
from pyro_sm.bench.rows import Row, add_out, run_all
from pyro_sm.bench.table import Column, Costs, Part, Table, entry, figure, lines, short, shown, split
from pyro_sm.bench.table import markdown as as_markdown
from pyro_sm.bench.timing import REPEATS, fastest, one_thread
from pyro_sm.guides import AutoDiffusion, PriorBase
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching
from pyro_sm.targets import DoubleWellParticles, GaussianMixture, ManyWell

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "GMM-40": lambda: from_target(GaussianMixture()),
    "eight schools": lambda: Problem(*eight_schools(), PriorBase()),
    "hierarchical logistic": lambda: Problem(*hierarchical_logistic(), PriorBase()),
    "many-well": lambda: from_target(ManyWell()),
    "DW-4, EGNN": lambda: from_target(DoubleWellParticles()),
}
KEYS = ("model", "draws", "kernels", "repeats", "compile", "dtype")
"""What identifies a row."""
_STEPS_PER_REPEAT = 10  # a training step is so much shorter than a batch of draws
_ROWS = 1024  # of a compiled network's first call: as many as a training step's


def _guide(problem: Problem, num_steps: int, *, compile: bool = False) -> AutoDiffusion:
    return AutoDiffusion(
        problem.model, base=problem.base, architecture=problem.architecture, num_steps=num_steps, compile=compile
    )


def measure(name: str, num_draws: int, *, repeats: int = REPEATS, num_steps: int = 48, compile: bool = False) -> Row:
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
    guide = _guide(problem, num_steps)
    step, batch_size = _training_step(problem, guide, repeats)
    bound = guide.bind(model, *args)
    density, process = bound.density, bound.diffusion()
    with torch.no_grad():
        z, _ = process.draw(num_draws)
        row: Row = {
            "model": name,
            "D": density.dim,
            "density": 1e6 * fastest(lambda: density.log_prob(z), repeats) / num_draws,
            "score": 1e6 * fastest(lambda: density.log_prob_and_score(z), repeats) / num_draws,
            "draw": 1e6 * fastest(lambda: process.draw(num_draws), repeats) / num_draws,
            "point": 1e6 * step / batch_size,
            "weighted": fastest(lambda: guide.draw_weighted(density, num_draws, Arguments(args)), repeats),
        }
    pyro.clear_param_store()
    return row | (_compiled(problem, num_draws, repeats, num_steps) if compile else {})


def _training_step(problem: Problem, guide: AutoDiffusion, repeats: int) -> tuple[float, int]:
    """CPU seconds of a step, and its noised points."""
    num_steps = _STEPS_PER_REPEAT * repeats
    # Draws for the buffer come once, in the warm-up; no population, whose seeding is a round's business, too.
    objective = ImportanceWeightedScoreMatching(steps_per_round=num_steps + _STEPS_PER_REPEAT, population=None)
    svi = SVI(problem.model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), objective)
    return fastest(lambda: svi.step(*problem.args), num_steps), objective.batch_size


def _compiled(problem: Problem, num_draws: int, repeats: int, num_steps: int) -> Row:
    """CPU microseconds of a draw and of a point; seconds until the first of each."""
    guide = _guide(problem, num_steps, compile=True)
    guide(*problem.args)  # sets it up
    started = time.perf_counter()
    network = guide.diffusion(Arguments(problem.args)).denoiser.network
    for levels, learns in ((_ROWS, True), (1, False)):  # those of a training step, and of draws
        with torch.set_grad_enabled(learns):
            network(torch.zeros(_ROWS, guide.latent_dim), torch.zeros(levels), None)
    seconds = time.perf_counter() - started
    step, batch_size = _training_step(problem, guide, repeats)
    process = guide.diffusion(Arguments(problem.args))
    with torch.no_grad():
        draw = fastest(lambda: process.draw(num_draws), repeats)
    pyro.clear_param_store()
    return {
        "compiled draw": 1e6 * draw / num_draws,
        "compiled point": 1e6 * step / batch_size,
        "compiling": seconds,
    }


def _times_faster(value: float) -> str:
    return f"{value:.2f}"


def _faster(key: str) -> Callable[[Row], float | None]:
    return lambda row: row[key] / row[f"compiled {key}"] if f"compiled {key}" in row else None


_FIGURES = (
    figure("density", short),
    figure("score", short, "density and score"),
    figure("draw", short, "guide draw with path weight"),
    figure("point", short, "training, per noised point"),
    figure("weighted", short, "all weighted draws, s"),
)
_COMPILED: tuple[Column, ...] = (
    Costs(
        "times faster compiled: draws, training",
        (Part(_faster("draw"), _times_faster), Part(_faster("point"), _times_faster)),
        ", ",
    ),
    Costs("compiling, s", (entry("compiling"),)),
)


def line(row: Row) -> str:
    """A row in words."""
    times = ", ".join(f"{key} {row[key]:.3g}" for key in ("density", "score", "draw", "point"))
    return f"{row['model']} ({row['D']}), CPU µs: {times}; {row['weighted']:.3g} s for all weighted draws"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    found = lines(rows, lambda row: (f"{row['model']} ({row['D']})",))
    compiled = _COMPILED if shown([figure("compiling")], found) else ()
    return as_markdown(("model (D)",), found, (*_FIGURES, *compiled))


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each setting."""

    def setting(row: Row) -> str:
        return f"{row['draws']:,} draws at once through {row['kernels']} kernels, {row['dtype']}"

    return split(rows, setting, markdown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench cost``."""
    parser.add_argument("--draws", type=int, default=10_000, help="draws at once (default %(default)s)")
    parser.add_argument("--kernels", type=int, default=48, help="of the guide (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repetitions, of which the fastest counts")
    parser.add_argument("--compile", action="store_true", help="time compiled networks, too")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    """Time all models, then print the table."""

    def measured(key: Row) -> Row:
        torch.manual_seed(0)  # for each: a row does not depend on which were in the file
        return key | measure(
            key["model"],
            key["draws"],
            repeats=key["repeats"],
            num_steps=key["kernels"],
            compile=key["compile"],
        )

    keys = [{"model": name, **{key: getattr(options, key) for key in KEYS[1:]}} for name in PROBLEMS]
    with one_thread(getattr(torch, options.dtype)):
        rows = run_all(keys, len(keys), measured, line, options.out)
    print(f"\n{tables(rows)[0].title}, 1 thread\n\n{markdown(rows)}")
