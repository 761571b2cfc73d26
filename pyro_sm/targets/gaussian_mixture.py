# SPDX-License-Identifier: Apache-2.0
r"""GMM-40 and its larger kin: K equally weighted Gaussians at random places in a square or cube.

Means ``(rand(K, d) − ½)·80`` after ``torch.manual_seed(0)``, in float32, ``log Z = 0``. In two dimensions the
isotropic standard deviation is ``softplus(1) = 1.3133``; the 10- and 50-dimensional forms use 1.0
(``GaussianMixture(40, dim=50, scale=1.0)``; no seed of theirs is published, so the means are this recipe's own).

In the plane these are not K separated modes: some means are closer than one standard deviation, so modes are counted
by responsibility (nearest mean), and the figure that shows coverage is the total variation of those counts.

Sources: "Flow Annealed Importance Sampling Bootstrap" https://arxiv.org/abs/2208.01893 (d = 2); "Beyond ELBOs: A
Large-Scale Evaluation of Variational Methods for Sampling" https://arxiv.org/abs/2406.07423 (high dimension).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pyro_sm.targets.metrics import mode_total_variation
from pyro_sm.targets.target import CoveringGaussian, cell_shares, drawing_device


class GaussianMixture:
    """K isotropic Gaussians with equal weights in d dimensions; ``log Z = 0``.

    Args:
        num_modes: K (40, 80 or 120 in the literature).
        dtype: of the means and draws; torch's default if None. Whatever it is, the means are the same.
        dim: d.
        scale: standard deviation of every component; softplus(1) if None.

    Raises:
        ValueError: a count or the scale is not positive.
    """

    log_evidence = 0.0

    def __init__(
        self, num_modes: int = 40, dtype: torch.dtype | None = None, *, dim: int = 2, scale: float | None = None
    ) -> None:
        if min(num_modes, dim) < 1:
            raise ValueError(f"expected num_modes and dim >= 1, found {num_modes} and {dim}")
        if scale is not None and not scale > 0:
            raise ValueError(f"expected a positive scale, found {scale}")
        self.num_modes = num_modes
        self.dim = dim
        self.name = f"GMM-{num_modes}, d={dim}"
        generator = torch.Generator().manual_seed(0)
        # The published numbers are float32 draws; drawn in another dtype they would be other means.
        means = (torch.rand(num_modes, dim, generator=generator, dtype=torch.float32) - 0.5) * 80
        self.means = means.to(dtype or torch.get_default_dtype())
        self.scale = math.log1p(math.e) if scale is None else scale

    @property
    def start(self) -> CoveringGaussian:
        """Scale 25: the spread of means uniform in (−40, 40) is 23."""
        return CoveringGaussian(self.means.new_zeros(self.dim), self.means.new_full((self.dim,), 25.0))

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` (...) in nats for ``x`` (..., d)."""
        square = ((x.unsqueeze(-2) - self.means.to(x)) / self.scale).square().sum(-1)
        norm = math.log(self.num_modes) + self.dim * math.log(self.scale) + 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(-0.5 * square, -1) - norm

    def sample(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (num_draws, d)."""
        device = drawing_device(generator)
        index = torch.randint(self.num_modes, (num_draws,), generator=generator, device=device)
        noise = torch.randn(num_draws, self.dim, generator=generator, dtype=self.means.dtype, device=device)
        return self.means.to(device)[index] + self.scale * noise

    def mode_weights(self) -> Tensor:
        """Probability of each nearest-mean cell, (K,), from a million exact draws: close means share their draws."""
        return self._million_shares

    def mode_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, d) nearest to each mean, (K,)."""
        means = self.means.to(x.device)
        # In blocks: a million draws times K distances at once is memory for nothing.
        nearest = torch.cat([torch.cdist(part.to(means), means).argmin(1) for part in x.split(100_000)])
        return cell_shares(nearest, self.num_modes, torch.get_default_dtype())

    def mode_total_variation(self, x: Tensor, num_exact: int = 1_000_000) -> float:
        """``½ Σ_k |ŵ_k − w_k|`` against exact draws' shares: nearest-mean cells are not exactly 1/K each."""
        return mode_total_variation(self.mode_shares(x), self._exact_shares(num_exact).to(x.device))

    @cached_property
    def _million_shares(self) -> Tensor:
        return self._exact_shares(1_000_000)

    def _exact_shares(self, num_draws: int) -> Tensor:
        return self.mode_shares(self.sample(num_draws, torch.Generator().manual_seed(1)))
