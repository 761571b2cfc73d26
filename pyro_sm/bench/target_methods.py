# SPDX-License-Identifier: Apache-2.0
r"""Ways to sample a benchmark target, all from the same start and by the same budget.

Each method is told a target, a seed and a :class:`Budget`, and hands back a :class:`Fit`. All begin at the target's
covering Gaussian ``N(m, diag(s)²)``: as the base of a diffusion, as the first particles, as starts of chains, or, for
Pyro's own guides, as the standard normal of ``u = (x − m)/s``. The target is the Pyro model
``factor_model(target.log_prob, target.dim)``.

Evaluations are counted in latents: a score is one gradient, and the density that comes with it one density. A method
counts as spending the larger of the two. Baselines share network, kernels and defence with the package's default.

Sources: "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
https://arxiv.org/abs/2505.19431 ; reverse KL of paths: "Path Integral Sampler" https://arxiv.org/abs/2111.15141 ,
"Denoising Diffusion Samplers" https://arxiv.org/abs/2302.13834 ; further baselines:
:mod:`pyro_sm.bench.target_baselines`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import PyroLRScheduler
from torch import Tensor

from pyro_sm.base import Draws, Evaluations
from pyro_sm.bench.target_baselines import BoundedOutput, PathLogVariance, UnitWeights
from pyro_sm.corrections import DampedResampling, ImportanceResampling
from pyro_sm.diagnostics import draw_from_guide
from pyro_sm.examples.improper import factor_model
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.guides import AutoDiffusion, GivenBase
from pyro_sm.model.density import ModelDensity
from pyro_sm.nn.egnn import EGNN
from pyro_sm.objectives import ImportanceWeightedScoreMatching, MarginalWeights, PathWeights
from pyro_sm.objectives.importance_weighted.population import Population
from pyro_sm.objectives.importance_weighted.weightings import Weighting
from pyro_sm.sampler import DiffusionSampler, StoppingRule
from pyro_sm.smc import Crossover, HamiltonianMove, LocalMoves
from pyro_sm.smc.tempered import TemperedParticles, TemperedSMC
from pyro_sm.targets import DoubleWellParticles, LennardJones, Target
from pyro_sm.weights import evidence

_STEPS = 100  # per round: the package's default
# Messages between particles are dear beside their energies: more steps to a round, more moves of the population.
_PARTICLE_STEPS = 300
_DROPLET_MOVES = 10
_PARTICLE_KERNELS, _DROPLET_KERNELS = 96, 64
# Of large clusters a message passes between 1485 pairs: less of everything, or one round takes an hour.
_LARGE = 20
_LARGE_DRAWS, _LARGE_BATCH, _LARGE_POPULATION, _LARGE_STEPS, _LEAPFROG = 256, 64, 512, 600, 10
_LARGE_PATHS = 8  # whose kernels are all held for a gradient through them: 64 would take tens of gigabytes


class Budget(NamedTuple):
    """``evaluations`` to spend on training, and the number of usable ``draws`` wanted of the result.

    Methods with weights draw a ``pool`` four times as large and resample it; its evaluations are not of the budget.
    """

    evaluations: int
    draws: int = 10_000

    @property
    def pool(self) -> int:
        """Weighted draws."""
        return 4 * self.draws


class Cost(NamedTuple):
    """``density`` and ``gradient`` evaluations, and CPU ``seconds`` of the process."""

    density: int
    gradient: int
    seconds: float


class Fit(NamedTuple):
    """What a method leaves.

    ``samples``: (n, d), equally weighted. ``log_weight``: (N,) of the pool they were resampled from; None if the
    method has no weights. ``log_evidence`` and ``log_evidence_se``: nats; None if it estimates none. ``note``: what
    the method chose by itself, in words.
    """

    samples: Tensor
    log_weight: Tensor | None
    log_evidence: float | None
    log_evidence_se: float | None
    training: Cost
    drawing: Cost
    note: str = ""


class Method(Protocol):
    """A way to sample."""

    @property
    def name(self) -> str:
        """As the command line calls it."""
        ...

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Train, draw, and count. Leaves the param store cleared.

        Raises:
            Exception: whatever goes wrong; it becomes a row of the results.
        """
        ...


# ------------------------------------------------------------------------------------------------- shared parts


class Meter:
    """Differences of counted evaluations and of CPU time since the last look."""

    def __init__(self) -> None:
        self._seen = Evaluations()
        self._started = time.process_time()

    def look(self, evaluations: Evaluations) -> Cost:
        """What was spent since the last look."""
        now = time.process_time()
        cost = Cost(
            evaluations.values - self._seen.values, evaluations.scores - self._seen.scores, now - self._started
        )
        self._seen = Evaluations(evaluations.values, evaluations.scores)
        self._started = now
        return cost


def _begin(seed: int) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def _model(target: Target) -> Callable[[], None]:
    return factor_model(target.log_prob, target.dim)


def _whitened_model(target: Target) -> Callable[[], None]:
    """The target as a model of ``u = (x − m)/s``, with the log determinant: its evidence is the target's.

    Pyro's flow guides begin with a draw of the prior, which an improper one has not: ``N(0, I)`` is put in and taken
    out again.
    """
    loc, scale = target.start
    log_det = float(scale.log().sum())
    normal = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)

    def model() -> None:
        u = pyro.sample("x", normal)
        pyro.factor("log_prob", target.log_prob(loc + scale * u) + log_det - normal.log_prob(u))

    return model


def _are_particles(target: Target) -> TypeGuard[DoubleWellParticles | LennardJones]:
    return isinstance(target, DoubleWellParticles | LennardJones)


def _are_many_particles(target: Target) -> bool:
    return _are_particles(target) and target.particles.num_bodies > _LARGE


def _guide(
    target: Target, model: Callable[[], None], *, bounded: bool = False, compile: bool = False
) -> AutoDiffusion:
    """The start as its base and everything else at its default.

    For particles, for every method alike, the network that has their symmetry, and more kernels: they have one
    variance for all directions, which bonded particles have not, and short steps make up for it. ``bounded``: that
    network's output, for objectives that are unstable without.
    """
    base = GivenBase(*target.start)
    if not _are_particles(target):
        return AutoDiffusion(model, base=base, compile=compile)
    network = EGNN(target.particles.num_bodies, target.particles.space_dim)
    num_steps = _DROPLET_KERNELS if isinstance(target, LennardJones) else _PARTICLE_KERNELS
    architecture = BoundedOutput(network) if bounded else network
    return AutoDiffusion(model, base=base, architecture=architecture, num_steps=num_steps, compile=compile)


def _resampled(draws: Draws, budget: Budget, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return draws.z[ImportanceResampling().apply(draws, budget.draws, generator)]


def _weighted_fit(samples: Tensor, draws: Draws, training: Cost, drawing: Cost, note: str = "") -> Fit:
    estimate = evidence(draws.log_weight)
    return Fit(samples, draws.log_weight, estimate.log_evidence, estimate.log_evidence_se, training, drawing, note)


# ---------------------------------------------------------------------------------------- score-matching methods


class ObjectiveFor(Protocol):
    """How a :class:`Sampler` makes its objective for a budget."""

    def __call__(self, target: Target, evaluations: int) -> ImportanceWeightedScoreMatching:
        """A fresh objective."""
        ...


@dataclass(frozen=True)
class PathObjective:
    """Path weights, at the package's defaults or without what it adds to them.

    Args:
        plain: forward KL by raw weights: no damping, no population, clean points as targets.
    """

    plain: bool = False

    def __call__(self, target: Target, evaluations: int) -> ImportanceWeightedScoreMatching:
        """The objective, whatever the budget; with more steps to a round for particles."""
        steps = _PARTICLE_STEPS if _are_particles(target) else _STEPS
        if not self.plain:
            population = Population(num_moves=_DROPLET_MOVES) if isinstance(target, LennardJones) else Population()
            if _are_many_particles(target):
                move = HamiltonianMove(_LEAPFROG)
                seeding = TemperedSMC(_LARGE_POPULATION, _DROPLET_MOVES, move, effective_share=0.7)
                return ImportanceWeightedScoreMatching(
                    _LARGE_DRAWS,
                    batch_size=_LARGE_BATCH,
                    steps_per_round=_LARGE_STEPS,
                    population=Population(_LARGE_POPULATION, _DROPLET_MOVES, move, seeding),
                )
            return ImportanceWeightedScoreMatching(steps_per_round=steps, population=population)
        # A share so small that γ = 1 always.
        return ImportanceWeightedScoreMatching(
            effective_share=1e-9, population=None, weighting=PathWeights(target_score=False), steps_per_round=steps
        )


@dataclass(frozen=True)
class InnerObjective:
    """A form that evaluates the density in every step; batches and rounds are cut so that the budget lasts.

    Args:
        weighting: with K inner draws.
        batch_size: rows per step.
        num_rounds: rounds to aim at; with fewer than 100 steps each if the budget is small.
    """

    weighting: Weighting
    batch_size: int = 64
    num_rounds: int = 16

    def __call__(self, target: Target, evaluations: int) -> ImportanceWeightedScoreMatching:
        """The objective for this budget."""
        per_round = max(evaluations // self.num_rounds, 1)
        most = _LARGE_DRAWS if _are_many_particles(target) else 2048
        num_particles = max(min(most, per_round // 4), 64)
        step = self.batch_size * self.weighting.num_inner
        return ImportanceWeightedScoreMatching(
            num_particles,
            weighting=self.weighting,
            batch_size=self.batch_size,
            steps_per_round=min(max((per_round - num_particles) // step, 1), 100),
        )


@dataclass(frozen=True)
class Sampler:
    """``DiffusionSampler(model, base=GivenBase(start))`` with its defaults and a budget.

    Args:
        name: of the method.
        objective: what it trains by.
        moves: of the draws, which are then chosen by damped weights; None for draws as their weights say.
        compile: whether to compile the network.
    """

    name: str
    objective: ObjectiveFor
    moves: LocalMoves | None = None
    compile: bool = False

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Train and draw; stops early if the effective sample size has stopped rising."""
        _begin(seed)
        meter = Meter()
        model = _model(target)
        sampler = DiffusionSampler(
            model,
            guide=_guide(target, model, compile=self.compile),
            objective=self.objective(target, budget.evaluations),
            stopping=StoppingRule(max_evaluations=budget.evaluations),
            seed=seed,
            disable_progbar=True,
        )
        sampler.run()
        spent = sampler.objective.evaluations
        training = meter.look(spent)
        draws = sampler.draws(budget.pool)
        note = f"{len(sampler.history)} rounds"
        # The sampler counts its final draws apart from training: one density each.
        drawn = Evaluations(draws.z.shape[0])
        if self.moves is None:
            samples = _resampled(draws, budget, seed)
        else:
            generator = torch.Generator().manual_seed(seed)
            moving = ModelDensity(model, ())
            moved = self.moves.run(moving, draws.z[DampedResampling().apply(draws, budget.draws, generator)])
            samples, moves = moved.z, moving.evaluations
            drawn = Evaluations(drawn.values + moves.values, moves.scores)
            note += f", {self.moves.num_moves} moves of every draw, acceptance {moved.acceptance:.2f}"
        drawing = meter.look(spent)._replace(density=drawn.values, gradient=drawn.scores)
        return _weighted_fit(samples, draws, training, drawing, note)


# ------------------------------------------------------------------------------------------------ other trainings


class GuideFor(Protocol):
    """How :class:`Variational` makes its guide."""

    def __call__(self, target: Target) -> tuple[Callable[[], None], Callable[..., Any], bool]:
        """Model, guide, and whether their latent is the whitened one."""
        ...


@dataclass(frozen=True)
class NormalGuide:
    """Pyro's ``AutoNormal`` from the start's own mean and scales."""

    def __call__(self, target: Target) -> tuple[Callable[[], None], Callable[..., Any], bool]:
        """At ``u = 0`` with scale 1."""
        model = _whitened_model(target)
        origin = torch.zeros_like(target.start.loc)
        return model, AutoNormal(model, init_loc_fn=init_to_value(values={"x": origin}), init_scale=1.0), True


@dataclass(frozen=True)
class InverseFlowGuide:
    """Pyro's ``AutoIAFNormal``.

    Args:
        num_transforms: inverse autoregressive layers.
        width: of their two hidden layers; twice the number of latents if that is more.
    """

    num_transforms: int = 4
    width: int = 64

    def __call__(self, target: Target) -> tuple[Callable[[], None], Callable[..., Any], bool]:
        """Over ``u``."""
        model = _whitened_model(target)
        hidden = [max(self.width, 2 * target.dim)] * 2
        return model, AutoIAFNormal(model, hidden_dim=hidden, num_transforms=self.num_transforms), True


@dataclass(frozen=True)
class DiffusionGuideAtStart:
    """:class:`~pyro_sm.AutoDiffusion` with the start as its base; of particles, with a bounded network."""

    def __call__(self, target: Target) -> tuple[Callable[[], None], Callable[..., Any], bool]:
        """Over ``x``: the guide whitens by itself."""
        model = _model(target)
        return model, _guide(target, model, bounded=True), False


@dataclass(frozen=True)
class ElboLoss:
    """Pyro's ``Trace_ELBO``, vectorised: one gradient a particle. For a diffusion it is the reverse KL of paths."""

    uses_gradients = True

    def __call__(self, num_particles: int) -> ELBO:
        """The loss."""
        return Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=0)


@dataclass(frozen=True)
class LogVarianceLoss:
    """:class:`PathLogVariance`: one density a particle, no gradient."""

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
    guide: GuideFor
    loss: ElboLoss | LogVarianceLoss
    learning_rate: float
    num_particles: int = 64

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Train, then weigh a pool of draws and resample it."""
        _begin(seed)
        meter = Meter()
        model, guide, whitened = self.guide(target)
        num_particles = min(self.num_particles, _LARGE_PATHS) if _are_many_particles(target) else self.num_particles
        num_steps = max(budget.evaluations // num_particles, 1)
        rate = self.learning_rate / 2 if _are_particles(target) else self.learning_rate
        schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "T_max": num_steps}
        optim = PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, schedule, {"clip_norm": 10.0})
        svi = SVI(model, guide, optim, loss=self.loss(num_particles))
        for _ in range(num_steps):
            svi.step()
            optim.step()
        spent = num_steps * num_particles
        training = meter.look(Evaluations())._replace(
            density=spent, gradient=spent if self.loss.uses_gradients else 0
        )
        density = ModelDensity(model, ())
        draws = draw_from_guide(guide, density, budget.pool)
        samples = _resampled(draws, budget, seed)
        drawing = meter.look(Evaluations())._replace(density=density.evaluations.values)
        if whitened:
            samples = target.start.loc + target.start.scale * samples
        return _weighted_fit(samples, draws, training, drawing, f"{num_steps} steps")


# ------------------------------------------------------------------------------------------------ without training


@dataclass(frozen=True)
class Tempered:
    """:class:`~pyro_sm.smc.tempered.TemperedSMC` from the start, with crossover; longer moves for clusters.

    A pilot with few particles finds the number of temperatures; the run then has as many particles as the rest of the
    budget pays for. If it pays for no more than the pilot had, the pilot is the result: what was spent is counted.

    Args:
        name: of the method.
        pilot_share: of the budget, if there were 50 temperatures with 10 moves.
    """

    name: str = "smc"
    pilot_share: float = 0.1

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Pilot and run. The particles are the samples: there are no more to be had without another run."""
        _begin(seed)
        meter = Meter()
        density = ModelDensity(_model(target), ())
        start = GaussianDensity(target.start.loc, torch.diag(target.start.scale))
        move = HamiltonianMove(_LEAPFROG if _are_many_particles(target) else 1)
        per_pilot = 500 * move.num_leapfrog
        num_pilot = max(int(self.pilot_share * budget.evaluations / per_pilot), 32)
        pilot = TemperedSMC(num_pilot, move=move, crossover=Crossover())
        found: TemperedParticles = pilot.run(density, start)
        spent = density.evaluations.values
        # Between room for one temperature more and none: a schedule that adapts has not always the same length.
        per_particle = spent / pilot.num_particles * (1 + 0.5 / len(found.history))
        num_particles = int((budget.evaluations - spent) / per_particle)
        if num_particles > pilot.num_particles:
            found = TemperedSMC(num_particles, move=move, crossover=Crossover()).run(density, start)
        training = meter.look(density.evaluations)
        note = f"{found.z.shape[0]} particles, {len(found.history)} temperatures"
        return Fit(
            found.z, None, found.log_evidence, found.log_evidence_se, training, meter.look(density.evaluations), note
        )


class _BudgetSpentError(Exception):
    """Thrown out of a chain when its share of the budget is gone."""


@dataclass(frozen=True)
class Chains:
    """Pyro's ``NUTS``: chains from draws of the start, each with its share of the budget, one after the other.

    A gradient is counted for every leapfrog step, those of warm-up and of the search for a step size included. The
    chain ends with its budget, in the middle of a trajectory, whose draw is lost.

    Args:
        name: of the method.
        num_chains: chains.
        evaluations_per_warmup_step: the warm-up has one step for so many evaluations of the chain's budget.
    """

    name: str = "nuts"
    num_chains: int = 4
    evaluations_per_warmup_step: int = 100

    def fit(self, target: Target, seed: int, budget: Budget) -> Fit:
        """Run the chains; more draws than wanted are thinned evenly.

        Raises:
            ValueError: a chain's budget ended before its warm-up did.
        """
        _begin(seed)
        meter = Meter()
        loc, scale = target.start
        allowed = budget.evaluations // self.num_chains
        warmup = max(allowed // self.evaluations_per_warmup_step, 10)
        spent = Evaluations()
        chains = []
        for chain in range(self.num_chains):
            pyro.set_rng_seed(self.num_chains * seed + chain)
            begin = loc + scale * torch.randn_like(loc)
            draws, calls = self._chain(target, begin, allowed, warmup)
            spent = Evaluations(spent.values + calls, spent.scores + calls)
            chains.append(draws)
        x = torch.cat(chains)
        note = f"{self.num_chains} chains, {x.shape[0]} draws after {warmup} warm-up steps each"
        training = meter.look(spent)
        stride = -(-x.shape[0] // budget.draws)
        return Fit(x[::stride], None, None, None, training, meter.look(spent), note)

    def _chain(self, target: Target, begin: Tensor, allowed: int, warmup: int) -> tuple[Tensor, int]:
        calls = 0
        model = _model(target)
        draws: list[Tensor] = []

        def counted() -> None:
            nonlocal calls
            if calls >= allowed:
                raise _BudgetSpentError
            calls += 1
            model()

        def keep(kernel: Any, params: dict[str, Tensor], stage: str, step: int) -> None:
            if stage.startswith("Sample"):
                draws.append(params["x"].detach().clone())

        mcmc = MCMC(
            # An improper prior cannot be drawn from: both the plates and the first value are given.
            NUTS(counted, max_plate_nesting=0, init_strategy=init_to_value(values={"x": begin})),
            num_samples=allowed,
            warmup_steps=warmup,
            hook_fn=keep,
            disable_progbar=True,
        )
        with contextlib.suppress(_BudgetSpentError):
            mcmc.run()
        if not draws:
            raise ValueError(f"{allowed} evaluations of a chain ended within its warm-up of {warmup} steps")
        return torch.stack(draws), calls


_METHODS: tuple[Method, ...] = (
    Sampler("iwsm", PathObjective()),
    Sampler("iwsm-compiled", PathObjective(), compile=True),
    Sampler("iwsm-moves", PathObjective(), LocalMoves(100, HamiltonianMove(_LEAPFROG))),
    Sampler("iwsm-marginal", InnerObjective(MarginalWeights())),
    Tempered(),
    Chains(),
    Variational("auto-normal", NormalGuide(), ElboLoss(), learning_rate=1e-2),
    Variational("auto-iaf", InverseFlowGuide(), ElboLoss(), learning_rate=2e-3),
    Sampler("idem", InnerObjective(UnitWeights())),
    Sampler("forward-kl", PathObjective(plain=True)),
    Variational("reverse-kl", DiffusionGuideAtStart(), ElboLoss(), learning_rate=2e-3),
    Variational("log-variance", DiffusionGuideAtStart(), LogVarianceLoss(), learning_rate=5e-4),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
"""The methods by the names of the command line."""
