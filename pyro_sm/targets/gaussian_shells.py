# SPDX-License-Identifier: Apache-2.0
r"""Two Gaussian shells under a uniform prior: curved, thin, of high dimension, and with known evidence.

    ``p̃(x) = 12^{−d} [N(|x − c|; 2, .1²) + N(|x + c|; 2, .1²)]``,   ``c = 3.5 e_1``,

the likelihood of the nested-sampling literature with its prior, uniform on the box ``[−6, 6]^d``. The box is left out
here: latents are unbounded and the score is defined everywhere. The shells end five widths inside its wall, so
``Z = 2 · 12^{−d} S_d ∫ r^{d−1} N(r; 2, .1²) dr``, ``S_d = 2π^{d/2}/Γ(d/2)``, is that of the problem in the box
but for the tip of the tail beyond the wall. By symmetry each shell has half of the mass.

Source: "MultiNest: an efficient and robust Bayesian inference tool for cosmology and particle physics"
https://arxiv.org/abs/0809.3437 .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sm.targets.grid_law import GridLaw
from pyro_sm.targets.target import CoveringGaussian, cell_shares, drawing_device


class GaussianShells:
    """The two shells in d dimensions.

    Args:
        dim: d ≥ 2.
        dtype: of draws, weights and the start; torch's default if None.

    Raises:
        ValueError: ``dim < 2``.
    """

    radius, width, centre, half_box = 2.0, 0.1, 3.5, 6.0

    def __init__(self, dim: int = 2, *, dtype: torch.dtype | None = None) -> None:
        if dim < 2:
            raise ValueError(f"expected dim >= 2, found {dim}")
        self.dim = dim
        self.name = f"Gaussian shells, d={dim}"
        self.dtype = dtype or torch.get_default_dtype()
        self._radial = GridLaw(
            lambda r: (dim - 1) * r.log() + self._log_shell(r),
            self.radius - 15 * self.width,
            self.radius + 15 * self.width,
        )
        log_sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
        self.log_evidence = math.log(2) + log_sphere + self._radial.log_norm - dim * math.log(2 * self.half_box)

    def _log_shell(self, r: Tensor) -> Tensor:
        return -0.5 * ((r - self.radius) / self.width).square() - math.log(self.width * math.sqrt(2 * math.pi))

    @property
    def start(self) -> CoveringGaussian:
        """Scale 4 along the line of the centres and 2, the radius, across it."""
        scale = torch.full((self.dim,), self.radius, dtype=self.dtype)
        scale[0] = 4.0
        return CoveringGaussian(torch.zeros_like(scale), scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p̃(x)`` (...) in nats for ``x`` (..., d)."""
        across = x[..., 1:].square().sum(-1)
        # A centre has no slope to follow: the clamp gives it the score zero.
        tiny = torch.finfo(x.dtype).tiny
        right = ((x[..., 0] - self.centre).square() + across).clamp(min=tiny).sqrt()
        left = ((x[..., 0] + self.centre).square() + across).clamp(min=tiny).sqrt()
        both = torch.logsumexp(torch.stack([self._log_shell(right), self._log_shell(left)]), 0)
        return both - self.dim * math.log(2 * self.half_box)

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, d): radius by inverse CDF on a grid, direction and shell at random."""
        device = drawing_device(generator)
        r = self._radial.sample((num_draws, 1), self.dtype, generator)
        direction = torch.randn(num_draws, self.dim, generator=generator, dtype=self.dtype, device=device)
        x = r * direction / direction.norm(dim=1, keepdim=True)
        right = torch.rand(num_draws, generator=generator, device=device) < 0.5
        x[:, 0] += torch.where(right, self.centre, -self.centre).to(x)
        return x

    def mode_weights(self) -> Tensor:
        """One half for each shell, (2,)."""
        return torch.full((2,), 0.5, dtype=self.dtype)

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) on the left and the right, (2,)."""
        return cell_shares((x[:, 0] > 0).long(), 2, x.dtype)
