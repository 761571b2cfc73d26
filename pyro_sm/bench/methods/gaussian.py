# SPDX-License-Identifier: Apache-2.0
r"""Full-covariance Gaussians in unconstrained space: by the ELBO, by the Fisher divergence, by Batch-and-Match.

Each from ``N(0, 0.1² I)``, the point of ``init_to_feasible`` and the default ``init_scale`` (Batch-and-Match as its
guide method does: by way of the mode next to it, if that is better). A gradient is the gradient of the log density at
one latent. ``FisherDivergence``'s path gradient takes a score and a Hessian-vector product at each particle, which
count as two. Learning rates fall geometrically to 0.001, from 0.3 for ``Trace_ELBO`` and 0.02 for
``FisherDivergence``: the best of 0.02, 0.1 and 0.3 for each in a trial with one seed on most of the same posteriors
that ``bench gaussian-guides`` has, which favours these two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_sm.bench.methods.svi import CLIP_NORM, NUM_PARTICLES, Geometric, elbo_for, train
from pyro_sm.bench.problem import Problem
from pyro_sm.gaussians.batch_and_match import Gaussian, batch_and_match, start_at_mode
from pyro_sm.model.density import ModelDensity
from pyro_sm.objectives import FisherDivergence
from pyro_sm.objectives.metrics import Identity, Metric

_BATCH = 32  # of Batch-and-Match: its default
_INIT_SCALE = 0.1  # of Pyro's Gaussian guides
_MANY_PARTICLES = 128  # of a further way: eight times as many as the others have


class Task(NamedTuple):
    """A problem, its density, which counts, and the gradients of the log density that a way may spend."""

    problem: Problem
    density: ModelDensity
    evaluations: int


class GaussianFit(NamedTuple):
    """A Gaussian in unconstrained space, and the gradients of the log density that it took."""

    gaussian: Gaussian
    gradients: int


def start(dim: int) -> Gaussian:
    """``N(0, 0.1² I)``, float64, where every way starts."""
    return Gaussian(torch.zeros(dim, dtype=torch.float64), _INIT_SCALE**2 * torch.eye(dim, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- by gradients


def guide_at(task: Task, gaussian: Gaussian) -> AutoMultivariateNormal:
    """Pyro's guide with the parameters of ``gaussian``."""
    problem, density = task.problem, task.density
    values = {name: value[0] for name, value in density.unpack(gaussian.loc[None]).items()}
    guide = AutoMultivariateNormal(problem.model, init_loc_fn=init_to_value(values=values), init_scale=_INIT_SCALE)
    guide(*problem.args)
    tril = torch.linalg.cholesky(gaussian.covariance)
    guide.loc.data = gaussian.loc.clone()
    guide.scale = tril.diagonal().clone()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    return guide


def fit_by_svi(
    task: Task, loss: Trace_ELBO | FisherDivergence, schedule: Geometric, num_steps: int, first: Gaussian
) -> Gaussian:
    """``SVI(model, guide, optim, loss)`` from ``first``.

    Raises:
        ValueError: a parameter of the guide is not finite at the end; or what Pyro raises on the way.
    """
    pyro.clear_param_store()
    guide = guide_at(task, first)
    train(task.problem.model, task.problem.args, guide, loss, schedule, num_steps)
    with torch.no_grad():
        tril = guide.scale[:, None] * guide.scale_tril
        loc = guide.loc.detach().clone()
    if not bool(torch.isfinite(tril).all() and torch.isfinite(loc).all()):
        raise ValueError("the parameters are not finite")
    return Gaussian(loc, tril @ tril.T)


def fit_by_elbo(task: Task) -> GaussianFit:
    """``Trace_ELBO``, vectorised if the model allows; one gradient a particle."""
    num_steps = task.evaluations // NUM_PARTICLES
    elbo = elbo_for(task.density, NUM_PARTICLES)
    gaussian = fit_by_svi(task, elbo, Geometric(0.3), num_steps, start(task.density.dim))
    return GaussianFit(gaussian, num_steps * NUM_PARTICLES)


def fit_by_fisher(
    task: Task,
    *,
    num_particles: int = NUM_PARTICLES,
    metric: Metric | None = None,
    sobolev: float = 0.0,
    clip_norm: float | None = None,
    first: Gaussian | None = None,
) -> GaussianFit:
    """``FisherDivergence``; two gradients a particle."""
    num_steps = task.evaluations // (2 * num_particles)
    loss = FisherDivergence(num_particles, metric=metric, sobolev=sobolev)
    schedule = Geometric(0.02, clip_norm=clip_norm)
    gaussian = fit_by_svi(task, loss, schedule, num_steps, first or start(task.density.dim))
    return GaussianFit(gaussian, 2 * num_steps * num_particles)


# --------------------------------------------------------------------------------------------- without gradients


def fit_by_batch_and_match(task: Task, *, search_mode: bool = True) -> GaussianFit:
    """Batch-and-Match in batches of 32, one gradient a draw; by default after a search for the mode, also counted."""
    before = task.density.evaluations.scores
    first = start(task.density.dim)
    if search_mode:
        first = start_at_mode(task.density, first, batch_size=_BATCH)
    left = task.evaluations - (task.density.evaluations.scores - before)
    found = batch_and_match(task.density, first, num_batches=max(left // _BATCH, 1), batch_size=_BATCH)
    gaussian = Gaussian(found.gaussian.loc, found.gaussian.covariance)
    return GaussianFit(gaussian, task.density.evaluations.scores - before)


def fit_by_fisher_after_batch_and_match(task: Task) -> GaussianFit:
    """Half of the evaluations for either, one after the other."""
    half = task._replace(evaluations=task.evaluations // 2)
    first = fit_by_batch_and_match(half)
    second = fit_by_fisher(half, first=first.gaussian)
    return GaussianFit(second.gaussian, first.gradients + second.gradients)


WAYS: dict[str, Callable[[Task], GaussianFit]] = {
    "elbo": fit_by_elbo,
    "fisher": fit_by_fisher,
    "batch-and-match": fit_by_batch_and_match,
    "fisher-sobolev": lambda task: fit_by_fisher(task, sobolev=1.0),
    "fisher-identity": lambda task: fit_by_fisher(task, metric=Identity()),
    "fisher-clipped": lambda task: fit_by_fisher(task, clip_norm=CLIP_NORM),
    "fisher-128": lambda task: fit_by_fisher(task, num_particles=_MANY_PARTICLES),
    "batch-and-match-from-start": lambda task: fit_by_batch_and_match(task, search_mode=False),
    "fisher-after-bam": fit_by_fisher_after_batch_and_match,
}
"""The ways by the names of the command line."""
DEFAULT_WAYS = ("elbo", "fisher", "batch-and-match")
