# SPDX-License-Identifier: Apache-2.0
r"""A diffusion sampler in latent space: Gaussian base, denoiser and kernels together, in plain torch.

Latents ``z = m + L u`` are whitened by the base ``N(m, L Lᵀ)``; everything else happens in ``u``. Log ratios and
densities are handed out for ``z``, so ``log|det L|`` is already in them: ``log w = log p̃(z) + R``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_sm.denoiser import Denoiser, Regression
from pyro_sm.sampling.flow import FlowSolver, ProbabilityFlow
from pyro_sm.sampling.heavy_tails import HeavyTails
from pyro_sm.sampling.levels import fit_levels
from pyro_sm.sampling.reverse import Kernels, fit_kernels, path_log_ratio, sample_paths

_LEVEL_DRAWS = 1024  # levels need fewer than moments do, and look at many more places
_LEVEL_NUMBERS = 65_536  # and fewer yet of many latents: their costs are added up


@dataclass(frozen=True)
class Diffusion:
    """What a diffusion guide is, once Pyro is taken away. Satisfies ``pyro_sm.base.DiffusionProcess``.

    Args:
        denoiser: network and preconditioning, in whitened space.
        kernels: levels and fitted covariances, in whitened space.
        base_loc: (D,) ``m``.
        base_scale_tril: (D, D) ``L``, lower triangular.
        solver: for :meth:`log_prob`.
        heavy: tails of the kernels that paths are drawn with; None for Gaussian ones.
    """

    denoiser: Denoiser
    kernels: Kernels
    base_loc: Tensor
    base_scale_tril: Tensor
    solver: FlowSolver = field(default_factory=FlowSolver)
    heavy: HeavyTails | None = None

    @property
    def dim(self) -> int:
        """D."""
        return self.base_loc.shape[0]

    @property
    def ratios(self) -> Tensor:
        """Noise-to-signal ratios of the kernels, (K+1,), the first of them 0."""
        return self.kernels.ratios

    @property
    def log_scale(self) -> Tensor:
        """``log|det L|``, in nats."""
        return self.base_scale_tril.diagonal().abs().log().sum()

    def to_latent(self, u: Tensor) -> Tensor:
        """``m + L u``; (..., D) to (..., D)."""
        return self.base_loc + u @ self.base_scale_tril.T

    def to_white(self, z: Tensor) -> Tensor:
        """``L⁻¹ (z − m)``; (B, D) to (B, D)."""
        return torch.linalg.solve_triangular(self.base_scale_tril, (z - self.base_loc).T, upper=False).T

    def _noise(self, levels: int, num_draws: int) -> Tensor:
        return torch.randn(levels, num_draws, self.dim, dtype=self.base_loc.dtype, device=self.base_loc.device)

    def draw(self, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``z`` (N, D) and their path log ratio ``R`` (N,): ``E[exp(log p̃(z) + R)] = Z``."""
        noise = self._noise(len(self.ratios), num_draws)
        if self.heavy is not None:
            noise = self.heavy.inflated(noise)
        u, log_ratio = sample_paths(self.denoiser, self.kernels, noise, self.heavy)
        return self.to_latent(u), log_ratio + self.log_scale

    def path_log_ratio(self, z: Tensor) -> Tensor:
        """``R`` (N,) of a forward-noised path from each given latent ``z`` (N, D)."""
        noise = self._noise(len(self.ratios) - 1, z.shape[0])
        return path_log_ratio(self.denoiser, self.kernels, self.to_white(z), noise, self.heavy) + self.log_scale

    def fit(self, z: Tensor) -> Kernels:
        """Kernels refitted to equally weighted latents ``z`` (N, D): where they stand, then their moments."""
        u = self.to_white(z)
        noise = torch.randn_like(u)
        some = slice(min(_LEVEL_DRAWS, max(_LEVEL_NUMBERS // self.dim, 1)))
        ratios = fit_levels(self.denoiser, self.kernels.ratios, u[some], noise[some])
        return fit_kernels(self.denoiser, self.kernels._replace(ratios=ratios), u, noise)

    def white_score(self, score: Tensor) -> Tensor:
        """``Lᵀ ∇_z log p = ∇_u log p``; (B, D) to (B, D)."""
        return score @ self.base_scale_tril

    def regression(self, target_mean: Tensor, y: Tensor, r: Tensor) -> Regression:
        """The denoiser's error against a target for the clean point; whitened, (B, D), (B, D) and (B,)."""
        return self.denoiser.regression(target_mean, y, r)

    def flow(self) -> ProbabilityFlow:
        """The probability flow, in whitened space."""
        return ProbabilityFlow(self.denoiser, self.kernels, self.solver)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z)`` (B,) in nats, by the probability flow; ``z``: (B, D)."""
        return self.flow().log_prob(self.to_white(z)) - self.log_scale

    def score(self, z: Tensor, ratio: Tensor) -> Tensor:
        """Score in latent space (B, D) of the density noised by ``ratio · L ε``; ``ratio``: () or (B,) > 0."""
        white = self.denoiser.score(self.to_white(z), ratio)
        return torch.linalg.solve_triangular(self.base_scale_tril.T, white.T, upper=True).T
