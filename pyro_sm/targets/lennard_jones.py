# SPDX-License-Identifier: Apache-2.0
r"""LJ-13 and LJ-55: Lennard-Jones clusters held together by a weak spring.

    ``E(x) = 2 Σ_{i<j} (r_ij⁻¹² − 2 r_ij⁻⁶) + ½ Σ_i |x_i − x̄|²``,   kT, temperature 1,   ``p̃ = exp(−E)``.

The 2 stands because the published energy sums over ordered pairs. On the mean-free subspace: D = 36 and 162 latents
(:mod:`pyro_sm.nn.mean_free`). ``log Z`` is not known.

``r⁻¹²`` overflows where particles meet, which is where a sampler begins. Inside a core of radius ``r_c = 0.6`` the
pair term is continued by its tangent in ``s = r²``: value and force are continuous, the energy still falls as
particles part, and all is finite at ``r = 0``. A pair at the core's edge has ``2(r_c⁻¹² − 2r_c⁻⁶) ≈ 833`` kT: never
reached at temperature 1.

Sources: "Equivariant Flows: Exact Likelihood Generative Learning for Symmetric Densities"
https://arxiv.org/abs/2006.02425 ; "Adjoint Schrödinger Bridge Sampler" https://arxiv.org/abs/2506.22565 .
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sm.nn.mean_free import MeanFree
from pyro_sm.targets.reference_draws import load_draws
from pyro_sm.targets.target import CoveringGaussian


class LennardJones:
    """The energy of positions, and ``log p̃`` of the mean-free latents.

    Args:
        num_bodies: n; 13 and 55 in the literature.
        space_dim: dimension of space.
        dtype: of the start; torch's default if None.
    """

    log_evidence = None
    pair_scale, spring, core_radius = 2.0, 1.0, 0.6

    def __init__(self, num_bodies: int = 13, space_dim: int = 3, *, dtype: torch.dtype | None = None) -> None:
        self.particles = MeanFree(num_bodies, space_dim)
        self.dim = self.particles.dim
        self.name = f"LJ-{num_bodies}"
        self.dtype = dtype or torch.get_default_dtype()

    @property
    def start(self) -> CoveringGaussian:
        """Scale: the radius of a ball that holds n particles at unit density, over √3."""
        radius = (0.75 * self.particles.num_bodies / torch.pi) ** (1 / 3)
        scale = torch.full((self.dim,), radius / 3**0.5, dtype=self.dtype)
        return CoveringGaussian(torch.zeros_like(scale), scale)

    def _pair(self, s: Tensor) -> Tensor:
        core = self.core_radius**2
        outside = s.clamp(min=core)
        inverse = outside.pow(-3)
        slope = -6 * core**-7 + 6 * core**-4
        return inverse.square() - 2 * inverse + slope * (s - outside)

    def energy(self, x: Tensor) -> Tensor:
        """``E`` (...) in kT for positions ``x`` (..., n·s); their centre does not matter."""
        pairs = self._pair(self.particles.squared_distances(x)).sum(-1)
        return self.pair_scale * pairs + 0.5 * self.spring * self.particles.squared_radii(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """``−E`` (...) in nats for latents ``x`` (..., D)."""
        return -self.energy(self.particles.to_positions(x))

    def reference_draws(self) -> Tensor:
        """Draws (N, D) of a long run of parallel tempering, in random order, in the dtype of the start.

        Raises:
            ValueError: none are shipped for this number of particles and dimension of space.
        """
        n, s = self.particles.num_bodies, self.particles.space_dim
        return load_draws(f"lj{n}" if s == 3 else f"{self.name} in {s} dimensions", self.dtype)
