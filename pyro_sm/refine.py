# SPDX-License-Identifier: Apache-2.0
r"""From a guide to draws that do not rest on its weights: tempered SMC and NUTS that begin where it is.

Weights put right a guide that is nearly right. Where k̂ says that they cannot, the guide still knows more than
nothing, and two methods that are exact in the limit, whatever they begin with, can begin there:

* :func:`temper_guide`: particles annealed from a mixture around the guide's draws
  (:func:`~pyro_sm.smc.mixture_start.around_draws`) to the posterior. Finds the shares of modes that the guide
  has wrong, and with luck those it has lost within ten of its widths; gives the evidence.
* :func:`nuts_from_guide`: Pyro's NUTS, each chain from one corrected draw of the guide, with the covariance of its
  draws for the inverse mass matrix, so that the warm-up has only a step size to find. Chains stay in the mode that
  they begin in, as NUTS does; many chains begin in the shares of the weighted draws.

Both work with every guide whose draws have a log density: this package's, Pyro's, those written by hand. Pyro's own
``NeuTraReparam(guide)`` goes further, and follows the guide's probability flow instead of a covariance. It costs:
every gradient solves an ordinary differential equation with the network and its divergence on the right, and goes
back through the solution; hundreds of plain gradients are to be had for one (fewer with ``FlowSolver(1e-2, 1e-2)``).

Sources: "Sequential Monte Carlo samplers" https://doi.org/10.1111/j.1467-9868.2006.00553.x ; "NeuTra-lizing Bad
Geometry in Hamiltonian Monte Carlo Using Neural Transport" https://arxiv.org/abs/1903.03704 ; "The No-U-Turn Sampler"
https://arxiv.org/abs/1111.4246 .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from pyro_sm.base import Draws, Evaluations
from pyro_sm.corrections import Correction, ImportanceResampling, NoCorrection
from pyro_sm.diagnostics.export import Provenance, draws_to_arviz
from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.diagnostics.verdict.findings import Findings
from pyro_sm.diagnostics.verdict.verdict import Verdict, judge
from pyro_sm.diagnostics.verdict.weights import WeightFindings
from pyro_sm.guides.prototype import init_to_median_or_origin
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng
from pyro_sm.smc.mixture_start import around_draws, damped_covariance
from pyro_sm.smc.tempered import TemperedParticles, TemperedSMC
from pyro_sm.weights import Evidence

_DEFAULT_SMC = TemperedSMC(num_particles=4096, num_moves=10, effective_share=0.6)
_NUM_LAWS = 100  # that the start is made of
_RELIABLE = 100  # effective draws that a covariance of them rests on


class _AsTheyAre(NamedTuple):
    """Particles are draws already: all that is left to say is where they come from."""

    name: str = "tempered SMC from the guide"

    def apply(self, draws: Draws, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        return NoCorrection().apply(draws, num_samples, generator)


@dataclass(frozen=True)
class TemperedPosterior:
    """What :func:`temper_guide` leaves.

    Args:
        samples: by site, (N, \\*shape), equally weighted.
        particles: the same in latent space, with ``log p̃``, scores, evidence and its error (nats), and the history of
            temperatures.
        evaluations: of density and gradient, the guide's pool included.
        seed: of all randomness.
        density: the model with its data.
    """

    samples: dict[str, Tensor]
    particles: TemperedParticles
    evaluations: Evaluations
    seed: int
    density: ModelDensity = field(repr=False)

    @property
    def log_evidence(self) -> float:
        """``log Ẑ``, nats."""
        return self.particles.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error by genealogy, nats."""
        return self.particles.log_evidence_se

    def check(self) -> Verdict:
        """What lines of descent can tell: how many independent draws the particles are worth.

        Not whether a mode is missing, so that the verdict is at best *use with care*.
        """
        count = len(self.particles.z)
        ess = 1 / min(self.log_evidence_se**2 + 1 / count, 1.0)
        return judge(Findings(WeightFindings(num_draws=count, ess=ess)))

    def to_arviz(
        self,
        num_samples: int | None = None,
        *,
        num_chains: int = 4,
        objective: str = "not recorded",
        predictive: bool = True,
        log_likelihood: bool = True,
        prior: bool = True,
        legacy: bool | None = None,
    ) -> Any:
        """As ArviZ data: particles for a posterior, the evidence of the run, and no k̂, for there are no weights.

        Args:
            num_samples: how many of the particles, over all chains; all that ``num_chains`` divides if None.
            num_chains: how many chains they are dealt to; divides ``num_samples``.
            objective: what trained the guide, recorded.
            predictive: whether to draw ``posterior_predictive``.
            log_likelihood: whether to compute ``log_likelihood``.
            prior: whether to draw ``prior``.
            legacy: ``True`` for ``InferenceData``, ``False`` for ``DataTree``, ``None`` for what is installed.

        Raises:
            ValueError: ``num_chains`` does not divide ``num_samples``, or there are not so many particles.
            ImportError: the line of ArviZ asked for is not installed.

        Warns:
            TrustWarning: the particles are worth fewer than a hundred independent draws.
        """
        z, log_p = self.particles.z, self.particles.log_p
        if num_samples is None:
            num_samples = len(z) // max(num_chains, 1) * max(num_chains, 1)
        spent = self.evaluations
        return draws_to_arviz(
            self.density,
            Draws(z, log_p, torch.zeros_like(log_p)),
            provenance=Provenance(objective, self.seed, spent.values, spent.scores),
            num_samples=num_samples,
            num_chains=num_chains,
            correction=_AsTheyAre(),
            verdict=self.check(),
            known_evidence=Evidence(self.log_evidence, self.log_evidence_se),
            predictive=predictive,
            log_likelihood=log_likelihood,
            prior=prior,
            legacy=legacy,
        )


def _check_counts(**counts: int) -> None:
    """At least one of everything, two of ``num_draws``.

    Raises:
        ValueError: with the name of what there are too few of.
    """
    for name, value in counts.items():
        least = 2 if name == "num_draws" else 1
        if value < least:
            raise ValueError(f"expected {name} >= {least}, found {value}")


def _pool(
    guide: Callable[..., Any], density: ModelDensity, num_draws: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Draws:
    """Those of ``num_draws`` draws of the guide that are finite: others have no weight, and no moments either."""
    drawn = draw_from_guide(guide, density, num_draws, args, kwargs)
    finite = torch.isfinite(drawn.z).all(-1)
    pool = Draws(drawn.z[finite], drawn.log_p[finite], drawn.log_weight[finite])
    if len(pool.z) < 2:
        raise ValueError(f"expected at least two finite draws of the guide, found {len(pool.z)} of {num_draws}")
    return pool


def temper_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    smc: TemperedSMC = _DEFAULT_SMC,
    num_draws: int = 4000,
    seed: int = 0,
    **kwargs: Any,
) -> TemperedPosterior:
    """Tempered SMC from around a guide's draws to the posterior.

    Args:
        model: the Pyro model.
        guide: its guide; its draws must have a log density.
        *args: what the model is called with.
        smc: the tempered sampler.
        num_draws: of the guide; each costs one density evaluation.
        seed: of all randomness; the global generators are put back afterwards.
        **kwargs: what the model is called with, by name.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches.
        TypeError: the guide's draws have no known log density.
        ValueError: ``num_draws`` < 2, no weight is finite, or the posterior cannot be reached (see
            :class:`TemperedSMC`).
    """
    _check_counts(num_draws=num_draws)
    density = ModelDensity(model, args, kwargs)
    with isolated_rng(seed):
        pool = _pool(guide, density, num_draws, args, kwargs)
        particles = smc.run(density, around_draws(pool, min(_NUM_LAWS, len(pool.z))))
        samples = density.unpack(particles.z)
    return TemperedPosterior(samples, particles, replace(density.evaluations), seed, density)


class _GivenMassMatrix(BlockMassMatrix):
    """An inverse mass matrix that is known before the sampler has its shape.

    Args:
        covariance: by a pair of sites, (numel, numel), in the unconstrained space Pyro's kernels move in.
    """

    def __init__(self, covariance: dict[tuple[str, str], Tensor]) -> None:
        super().__init__()
        self._covariance = covariance

    def configure(self, mass_matrix_shape: Any, adapt_mass_matrix: bool = True, options: Any = None) -> None:
        """As Pyro's, which would begin with the identity."""
        options = options or {}
        super().configure(mass_matrix_shape, adapt_mass_matrix, options=options)
        self.inverse_mass_matrix = {
            names: torch.cat([torch.cat([self._covariance[a, b] for b in names], 1) for a in names]).to(**options)
            for names in mass_matrix_shape
        }


def nuts_from_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 100,
    num_chains: int = 1,
    correction: Correction | None = None,
    num_draws: int = 4000,
    seed: int = 0,
    disable_progbar: bool = False,
    **kwargs: Any,
) -> MCMC:
    """Pyro's ``MCMC`` with a NUTS kernel that begins at the guide's draws, shaped by their covariance; not yet run.

    Usage::

        mcmc = nuts_from_guide(model, guide, data, num_chains=4)
        mcmc.run(data)
        az.from_pyro(mcmc)

    Args:
        model: the Pyro model.
        guide: its guide; its draws must have a log density.
        *args: what the model is called with.
        num_samples: draws per chain.
        warmup_steps: that adapt the step size; the mass matrix stays.
        num_chains: of them; Pyro runs them in processes of their own where there are cores enough, else in turn.
        correction: how the first points are chosen from the pool; importance resampling if None.
        num_draws: of the guide; each costs one density evaluation.
        seed: of the guide's draws; the global generators are put back afterwards.
        disable_progbar: no progress bar.
        **kwargs: what the model is called with, by name.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches.
        TypeError: the guide's draws have no known log density.
        ValueError: fewer than two draws, one sample or one chain; or the draws cannot be corrected.
    """
    _check_counts(num_samples=num_samples, num_chains=num_chains, num_draws=num_draws)
    density = ModelDensity(model, args, kwargs)
    with isolated_rng(seed):
        pool = _pool(guide, density, num_draws, args, kwargs)
        chosen = pool.z[(correction or ImportanceResampling()).apply(pool, num_chains)]
    first = {
        site.name: chosen[:, site.start : site.stop].reshape(num_chains, *site.unconstrained_shape)
        for site in density.sites
    }
    if num_chains == 1:
        first = {name: value[0] for name, value in first.items()}
    covariance = _covariance(pool)
    blocks = {
        (a.name, b.name): covariance[a.start : a.stop, b.start : b.stop] for a in density.sites for b in density.sites
    }
    kernel = NUTS(
        model,
        full_mass=True,
        adapt_mass_matrix=False,
        max_plate_nesting=density.max_plate_nesting,
        init_strategy=init_to_median_or_origin,  # for a trace of the model's shapes; chains begin at ``first``
    )
    kernel.mass_matrix_adapter = _GivenMassMatrix(blocks)
    return MCMC(
        kernel,
        num_samples,
        warmup_steps=warmup_steps,
        num_chains=num_chains,
        initial_params=first,
        disable_progbar=disable_progbar,
    )


def _covariance(pool: Draws) -> Tensor:
    """Covariance (D, D) of weighted draws, damped until enough of them count, and safe to factorise."""
    count, dim = pool.z.shape
    _, covariance = damped_covariance(pool, min(max(_RELIABLE, 2 * dim) / count, 0.9))
    return covariance.to(pool.z)
