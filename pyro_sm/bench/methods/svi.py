# SPDX-License-Identifier: Apache-2.0
r"""Training by Pyro's ``SVI``: its guides and this package's, by the ELBO and by other losses of traces.

Sources, of the reverse KL of paths: "Path Integral Sampler" https://arxiv.org/abs/2111.15141 , "Denoising Diffusion
Samplers" https://arxiv.org/abs/2302.13834 ; further baselines: :mod:`pyro_sm.bench.methods.baselines`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import ClippedAdam, PyroLRScheduler, PyroOptim
from torch import Tensor

from pyro_sm.base import Evaluations
from pyro_sm.bench.methods import start
from pyro_sm.bench.methods.baselines import PathLogVariance
from pyro_sm.bench.methods.fit import Budget, Cost, Fit, Meter, begin, resampled
from pyro_sm.bench.problem import Problem, by_site
from pyro_sm.diagnostics import draw_from_guide
from pyro_sm.model.density import ModelDensity, OuterPlate
from pyro_sm.model.transforms import bijection_onto
from pyro_sm.targets import Target

CLIP_NORM = 10.0
"""Of the gradient: a single draw far in a tail must not end a fit."""
NUM_PARTICLES = 16
"""Per step of ``Trace_ELBO``: a budget of 20,000 is still 1250 steps."""
MAX_PLATES = 1
"""The most that any of the posteriors' models nests."""
_LARGE_PATHS = 8  # whose kernels are all held for a gradient through them: 64 would take tens of gigabytes
_ELBO_RATE = 0.02  # the smallest tried for `bench gaussian-guides`; flows had no trial of their own


class Cosine(NamedTuple):
    """Adam with a learning rate that falls to zero by a cosine, from ``first``; gradients clipped by norm."""

    first: float
    clip_norm: float | None = CLIP_NORM

    def optimiser(self, num_steps: int) -> PyroLRScheduler:
        """For so many steps."""
        schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": self.first}, "T_max": num_steps}
        return PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, schedule, _clipped(self.clip_norm))


class Geometric(NamedTuple):
    """Adam with a learning rate that falls geometrically from ``first`` to ``last``; gradients clipped by norm."""

    first: float
    last: float = 0.001
    clip_norm: float | None = None

    def optimiser(self, num_steps: int) -> PyroLRScheduler:
        """For so many steps."""
        decay = (self.last / self.first) ** (1 / max(num_steps, 1))
        schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": self.first}, "gamma": decay}
        return PyroLRScheduler(torch.optim.lr_scheduler.ExponentialLR, schedule, _clipped(self.clip_norm))


class Constant(NamedTuple):
    """Adam as it comes."""

    rate: float

    def optimiser(self, num_steps: int) -> PyroOptim:
        """For any number of steps."""
        return PyroOptim(torch.optim.Adam, {"lr": self.rate})  # pyro.optim.Adam, by a name that type checkers see


class ClippedDecay(NamedTuple):
    """Pyro's ``ClippedAdam``, whose learning rate falls geometrically from ``first`` to ``share`` of it."""

    first: float
    share: float

    def optimiser(self, num_steps: int) -> PyroOptim:
        """For so many steps."""
        return ClippedAdam({"lr": self.first, "lrd": self.share ** (1 / num_steps)})


def _clipped(clip_norm: float | None) -> dict[str, float] | None:
    return None if clip_norm is None else {"clip_norm": clip_norm}


Schedule = Cosine | Geometric | Constant | ClippedDecay


def train(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    guide: Callable[..., Any],
    loss: ELBO,
    schedule: Schedule,
    num_steps: int,
) -> None:
    """``SVI(model, guide, optim, loss)``, so many steps on ``args``."""
    optim = schedule.optimiser(num_steps)
    svi = SVI(model, guide, optim, loss=loss)
    for _ in range(num_steps):
        svi.step(*args)
        if isinstance(optim, PyroLRScheduler):
            optim.step()


def elbo_for(density: ModelDensity, num_particles: int) -> Trace_ELBO:
    """``Trace_ELBO``, vectorised if the model allows."""
    vectorised = isinstance(density.batching, OuterPlate)
    return Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorised, max_plate_nesting=MAX_PLATES)


def init_to_origin(site: Any = None) -> Any:
    """The constrained image of the origin; as ``init_to_feasible``, without a draw of the prior."""
    if site is None:
        return init_to_origin
    transform = bijection_onto(site["fn"].support)
    return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


# ---------------------------------------------------------------------------------------------------- on problems


@dataclass(frozen=True)
class ElboWay:
    """``Trace_ELBO``, 16 particles, Adam from 0.02 falling by a cosine; then weighted like the sampler's draws.

    Args:
        guide: of Pyro's, for a model.
    """

    guide: Callable[[Callable[..., Any]], Callable[..., Any]]

    def __call__(self, problem: Problem, seed: int, budget: Budget) -> Fit:
        """Train, draw, resample; float64."""
        started = time.process_time()
        begin(seed)
        density = problem.density(torch.float64)
        guide = self.guide(problem.model)
        num_steps = budget.evaluations // NUM_PARTICLES
        train(problem.model, problem.args, guide, elbo_for(density, NUM_PARTICLES), Cosine(_ELBO_RATE), num_steps)
        training = time.process_time() - started
        draws = draw_from_guide(guide, density, budget.pool, problem.args)
        drawing = time.process_time() - started - training
        samples = by_site(density, resampled(draws, budget.draws, seed))
        spent = num_steps * NUM_PARTICLES
        return Fit(samples, Cost(spent, spent, training), Cost(budget.pool, 0, drawing), draws.log_weight)


# ----------------------------------------------------------------------------------------------------- on targets


Guided = tuple[Callable[[], None], Callable[..., Any], bool]
"""Model, guide, and whether their latent is the whitened one."""


def normal_guide(target: Target) -> Guided:
    """Pyro's ``AutoNormal`` from the start's own mean and scales: at ``u = 0`` with scale 1."""
    model = start.whitened_model(target)
    origin = torch.zeros_like(target.start.loc)
    return model, AutoNormal(model, init_loc_fn=init_to_value(values={"x": origin}), init_scale=1.0), True


def diffusion_guide(target: Target) -> Guided:
    """:class:`~pyro_sm.AutoDiffusion` with the start as its base; of particles, with a bounded network."""
    model = start.model(target)
    return model, start.guide_at(target, model, bounded=True), False


@dataclass(frozen=True)
class InverseFlowGuide:
    """Pyro's ``AutoIAFNormal``.

    Args:
        num_transforms: inverse autoregressive layers.
        width: of their two hidden layers; twice the number of latents if that is more.
    """

    num_transforms: int = 4
    width: int = 64

    def __call__(self, target: Target) -> Guided:
        """Over ``u``."""
        model = start.whitened_model(target)
        hidden = [max(self.width, 2 * target.dim)] * 2
        return model, AutoIAFNormal(model, hidden_dim=hidden, num_transforms=self.num_transforms), True


@dataclass(frozen=True)
class ElboLoss:
    """Pyro's ``Trace_ELBO``, vectorised: one gradient a particle. For a diffusion it is the reverse KL of paths."""

    uses_gradients = True

    def __call__(self, num_particles: int) -> ELBO:
        """The loss."""
        return Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=0)


@dataclass(frozen=True)
class LogVarianceLoss:
    """:class:`PathLogVariance`: one value a particle, no gradient."""

    uses_gradients = False

    def __call__(self, num_particles: int) -> ELBO:
        """The loss."""
        return PathLogVariance(num_particles=num_particles)


@dataclass(frozen=True)
class Variational:
    """``SVI`` with Adam, its learning rate decaying to zero by a cosine, gradients clipped by norm 10.

    Args:
        name: of the method.
        guide: how to make the guide.
        loss: how to make the loss.
        learning_rate: at the start; half of it for particles.
        num_particles: paths per step, fewer for large clusters; as many steps as the budget has paths for.
    """

    name: str
    guide: Callable[[Target], Guided]
    loss: ElboLoss | LogVarianceLoss
    learning_rate: float
    num_particles: int = 64

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Train, then weigh a pool of draws and resample it."""
        begin(seed)
        meter = Meter()
        model, guide, whitened = self.guide(target)
        many = start.are_many_particles(target)
        num_particles = min(self.num_particles, _LARGE_PATHS) if many else self.num_particles
        num_steps = max(budget.evaluations // num_particles, 1)
        rate = self.learning_rate / 2 if start.are_particles(target) else self.learning_rate
        train(model, (), guide, self.loss(num_particles), Cosine(rate), num_steps)
        spent = num_steps * num_particles
        training = meter.look(Evaluations())._replace(values=spent, scores=spent if self.loss.uses_gradients else 0)
        density = ModelDensity(model, ())
        draws = draw_from_guide(guide, density, budget.pool)
        x: Tensor = resampled(draws, budget.draws, seed)
        drawing = meter.look(Evaluations())._replace(values=density.evaluations.values)
        if whitened:
            x = target.start.loc + target.start.scale * x
        return Fit({"x": x}, training, drawing, draws.log_weight, note=f"{num_steps} steps")
