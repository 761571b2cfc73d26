# SPDX-License-Identifier: Apache-2.0
r"""From a guide to draws that do not rest on its weights: tempered SMC and NUTS that begin where it is.

Weights put right a guide that is nearly right. Where k̂ says that they cannot, the guide still knows more than
nothing, and two methods that are exact in the limit, whatever they begin with, can begin there:

* :func:`temper_guide`: particles annealed from a mixture around the guide's draws
  (:func:`~pyro_sm.corrections.mixture_start.around_draws`) to the posterior. Finds the shares of modes that the guide
  has wrong, and with luck those it has lost within ten of its widths; gives the evidence.
* :func:`nuts_from_guide`: Pyro's NUTS, each chain from one corrected draw of the guide, with the covariance of its
  draws for the inverse mass matrix, so that the warm-up has only a step size to find. Chains stay in the mode that
  they begin in, as NUTS does; many chains begin in the shares of the weighted draws.

Both work with every guide whose draws have a log density: this package's, Pyro's, those written by hand. Pyro's own
``NeuTraReparam(guide)`` goes further, and follows the guide's probability flow instead of a covariance; a flow is a
hundred network passes for every leapfrog step.

Sources: "Sequential Monte Carlo samplers" https://doi.org/10.1111/j.1467-9868.2006.00553.x ; "NeuTra-lizing Bad
Geometry in Hamiltonian Monte Carlo Using Neural Transport" https://arxiv.org/abs/1903.03704 ; "The No-U-Turn Sampler"
https://arxiv.org/abs/1111.4246 .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from pyro_sm.base import Draws, Evaluations
from pyro_sm.corrections import Correction, ImportanceResampling
from pyro_sm.corrections.mixture_start import around_draws
from pyro_sm.corrections.tempered import TemperedParticles, TemperedSMC
from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.guides.auto_diffusion import init_to_median_or_origin
from pyro_sm.model import ModelDensity
from pyro_sm.model_trace import isolated_rng
from pyro_sm.weights import damping

_DEFAULT_SMC = TemperedSMC(num_particles=4096, num_moves=10, effective_share=0.6)
_RELIABLE = 100  # effective draws that a covariance of them rests on


@dataclass(frozen=True)
class Tempered:
    """What :func:`temper_guide` leaves.

    Args:
        samples: by site, (N, \\*shape), equally weighted.
        particles: the same in latent space, with ``log p̃``, scores, evidence and its error (nats), and the history of
            temperatures.
        evaluations: of density and gradient, the guide's pool included.
    """

    samples: dict[str, Tensor]
    particles: TemperedParticles
    evaluations: Evaluations

    @property
    def log_evidence(self) -> float:
        """``log Ẑ``, nats."""
        return self.particles.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error by genealogy, nats."""
        return self.particles.log_evidence_se


def temper_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    smc: TemperedSMC = _DEFAULT_SMC,
    num_draws: int = 4000,
    seed: int = 0,
    **kwargs: Any,
) -> Tempered:
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
        ValueError: no weight is finite, or the posterior cannot be reached (see :class:`TemperedSMC`).
    """
    density = ModelDensity(model, args, kwargs)
    with isolated_rng(seed):
        pool = draw_from_guide(guide, density, num_draws, args, kwargs)
        particles = smc.run(density, around_draws(pool))
        samples = density.unpack(particles.z)
    return Tempered(samples, particles, density.evaluations)


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
        super().configure(mass_matrix_shape, adapt_mass_matrix, options=options or {})
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
        num_chains: of them; more than one are run by Pyro in processes of their own.
        correction: how the first points are chosen from the pool; importance resampling if None.
        num_draws: of the guide; each costs one density evaluation.
        seed: of the guide's draws; the global generators are put back afterwards.
        disable_progbar: no progress bar.
        **kwargs: what the model is called with, by name.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches.
        TypeError: the guide's draws have no known log density.
        ValueError: the draws cannot be corrected.
    """
    density = ModelDensity(model, args, kwargs)
    with isolated_rng(seed):
        pool = draw_from_guide(guide, density, num_draws, args, kwargs)
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
    gamma = damping(pool.log_weight, min(max(_RELIABLE, 2 * dim) / count, 0.9))
    weight = torch.softmax(gamma * pool.log_weight.double(), 0).to(pool.z)
    centred = pool.z - weight @ pool.z
    covariance = (centred * weight.unsqueeze(-1)).T @ centred
    spread = covariance.diagonal()
    return covariance + torch.where(spread > 0, 1e-6 * spread, 1.0).diag()
