# SPDX-License-Identifier: Apache-2.0
r"""DW-4: four particles in the plane, every pair with a double well in its distance.

    ``E(x) = Σ_{i<j} 0.9 (r_ij − 4)⁴ − 4 (r_ij − 4)²``,   kT, temperature 1,   ``p̃ = exp(−E)``.

On the mean-free subspace: D = 6 latents (:mod:`pyro_sm.nn.mean_free`). ``log Z`` is not known.

Source: "Equivariant Flows: Exact Likelihood Generative Learning for Symmetric Densities"
https://arxiv.org/abs/2006.02425 ; this scale of the energy as in "Adjoint Schrödinger Bridge Sampler"
https://arxiv.org/abs/2506.22565 .
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sm.nn.mean_free import MeanFree
from pyro_sm.targets.reference_draws import load_draws
from pyro_sm.targets.target import CoveringGaussian


class DoubleWellParticles:
    """The energy of positions, and ``log p̃`` of the mean-free latents.

    Args:
        num_bodies: n.
        space_dim: dimension of space.
        dtype: of the start; torch's default if None.
    """

    log_evidence = None
    quartic, quadratic, distance = 0.9, -4.0, 4.0

    def __init__(self, num_bodies: int = 4, space_dim: int = 2, *, dtype: torch.dtype | None = None) -> None:
        self.particles = MeanFree(num_bodies, space_dim)
        self.dim = self.particles.dim
        self.name = f"DW-{num_bodies}"
        self.dtype = dtype or torch.get_default_dtype()

    @property
    def start(self) -> CoveringGaussian:
        """Scale 2, half the distance at which the wells meet."""
        scale = torch.full((self.dim,), 2.0, dtype=self.dtype)
        return CoveringGaussian(torch.zeros_like(scale), scale)

    def energy(self, x: Tensor) -> Tensor:
        """``E`` (...) in kT for positions ``x`` (..., n·s); their centre does not matter."""
        # Two particles in one place have no direction between them: the clamp gives them no force.
        r = self.particles.squared_distances(x).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
        square = (r - self.distance).square()
        return (self.quartic * square.square() + self.quadratic * square).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """``−E`` (...) in nats for latents ``x`` (..., D)."""
        return -self.energy(self.particles.to_positions(x))

    def reference_draws(self) -> Tensor:
        """Draws (N, D) of a long run of parallel tempering, in random order, in the dtype of the start.

        Raises:
            ValueError: none are shipped for this number of particles and dimension of space.
        """
        n, s = self.particles.num_bodies, self.particles.space_dim
        return load_draws(f"dw{n}" if s == 2 else f"{self.name} in {s} dimensions", self.dtype)
