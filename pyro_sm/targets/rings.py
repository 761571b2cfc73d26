# SPDX-License-Identifier: Apache-2.0
r"""Concentric rings in the plane, normalised, with given weights: modes that are curves around each other.

    ``p(x) = Σ_k w_k exp(−(|x| − R_k)² / 2σ²) / N_k``,

    ``N_k = 2π ∫_0^∞ r exp(−(r − R_k)²/2σ²) dr = 2π [σ² e^{−q²} + R_k σ √(π/2) (1 + erf q)]``,   ``q = R_k / (σ√2)``.

Source: this project's own; a normal radius and a uniform angle instead give the density
``Σ_k w_k N(|x|; R_k, σ²) / (2π|x|)``, which is infinite at the origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_sm.targets.grid_law import GridLaw
from pyro_sm.targets.target import CoveringGaussian, cell_shares, drawing_device


class Rings:
    """K rings; ``log Z = 0``.

    Args:
        radii: ``R_k``, increasing, (K,).
        weights: ``w_k``, summing to one, (K,).
        width: σ.
        dtype: of draws, weights and the start; torch's default if None.

    Raises:
        ValueError: radii that do not increase from above 0, weights that are not positive or do not sum to 1, unequal
            lengths, or a width that is not positive.
    """

    dim = 2
    log_evidence = 0.0

    def __init__(
        self,
        radii: Sequence[float] = (2.0, 4.0, 6.0),
        weights: Sequence[float] = (0.2, 0.3, 0.5),
        width: float = 0.2,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(radii) == 0 or len(radii) != len(weights):
            raise ValueError(f"expected as many weights as radii, found {len(weights)} and {len(radii)}")
        if not all(small < large for small, large in zip((0.0, *radii), radii, strict=False)):
            raise ValueError(f"expected increasing positive radii, found {tuple(radii)}")
        if not all(w > 0 for w in weights) or abs(math.fsum(weights) - 1) > 1e-9:
            raise ValueError(f"expected positive weights that sum to 1, found {tuple(weights)}")
        if not width > 0:
            raise ValueError(f"expected a positive width, found {width}")
        self.name = f"{len(radii)} rings"
        self.dtype = dtype or torch.get_default_dtype()
        self.width = width
        self.radii = torch.tensor(radii, dtype=torch.float64)
        q = self.radii / (width * math.sqrt(2))
        norm = width**2 * torch.exp(-q.square()) + self.radii * width * math.sqrt(math.pi / 2) * (1 + torch.erf(q))
        self._log_height = torch.tensor(weights, dtype=torch.float64).log() - (2 * math.pi * norm).log()
        self._radial = GridLaw(self._log_radial, 0.0, max(radii) + 10 * width)

    @property
    def start(self) -> CoveringGaussian:
        """Scale: the outermost radius."""
        return CoveringGaussian(torch.zeros(2, dtype=self.dtype), self.radii[-1].to(self.dtype).expand(2).clone())

    def _log_at_radius(self, r: Tensor) -> Tensor:
        off = (r.unsqueeze(-1) - self.radii.to(r)) / self.width
        return torch.logsumexp(self._log_height.to(r) - 0.5 * off.square(), -1)

    def _log_radial(self, r: Tensor) -> Tensor:
        return self._log_at_radius(r) + torch.log(2 * math.pi * r)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` (...) in nats for ``x`` (..., 2)."""
        # The clamp gives the origin, where |x| has no slope, the score zero.
        return self._log_at_radius(x.square().sum(-1).clamp(min=torch.finfo(x.dtype).tiny).sqrt())

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, 2): radius by inverse CDF on a grid, angle uniform."""
        r = self._radial.sample((num_draws, 1), self.dtype, generator)
        device = drawing_device(generator)
        angle = 2 * math.pi * torch.rand(num_draws, 1, generator=generator, dtype=self.dtype, device=device)
        return r * torch.cat([angle.cos(), angle.sin()], 1)

    def mode_weights(self) -> Tensor:
        """Probability between the midpoints of neighbouring radii, (K,): ``w_k`` but for the tails."""
        cells = torch.bucketize(self._radial.points, self._edges())
        return torch.bincount(cells, self._radial.mass, self.radii.shape[0]).to(self.dtype)

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, 2) with each ring's radius nearest, (K,)."""
        cells = torch.bucketize(x.norm(dim=-1), self._edges().to(x))
        return cell_shares(cells, self.radii.shape[0], x.dtype)

    def _edges(self) -> Tensor:
        return 0.5 * (self.radii[1:] + self.radii[:-1])
